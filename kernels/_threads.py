"""How many threads a native kernel may use."""

from __future__ import annotations

import os
import sys


def thread_count() -> int:
    """torch's setting where torch is loaded, else OMP_NUM_THREADS, else the cores this process may use; at least 1."""
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
