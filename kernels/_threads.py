"""How many threads a native kernel may use.

EL4NER_THREADS, else torch's number, else OMP_NUM_THREADS, else all cores that this process may use.
"""

from __future__ import annotations

import os
import sys

from el4ner.errors import KernelError

MOST = 1024
"""More than this are never started, whatever is asked for."""


def thread_count() -> int:
    """The number for the next call, at least 1; the environment is read each time.

    torch counts where it is loaded, because its numbers can be changed while the program runs. Raises KernelError if
    EL4NER_THREADS is no whole number of 1 or more; OMP_NUM_THREADS is other programs' too, and ignored if it is none.
    """
    asked = os.environ.get("EL4NER_THREADS", "").strip()
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise KernelError(f"EL4NER_THREADS={asked}; a whole number of 1 or more is needed")
        return min(int(asked), MOST)
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is one number for each nesting level
    if asked.isdecimal() and int(asked) > 0:
        return min(int(asked), MOST)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
