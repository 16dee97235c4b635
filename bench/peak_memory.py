"""The most memory a process has held since the last reset, where the system says so."""

from __future__ import annotations

import sys
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak() -> None:
    """Begin anew: the peak is then what is held now. Does nothing where the system cannot (not Linux)."""
    if _CLEAR.exists():
        try:
            _CLEAR.write_text("5")
        except OSError:  # some containers mount it read-only; the peak is then that of the whole process
            return
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.reset_peak_memory_stats()


def peak_mib() -> int | None:
    """MiB held at most since the last reset, on the host and (if used) on the GPU together; None where not known."""
    if not _STATUS.exists():
        return None
    line = next((row for row in _STATUS.read_text().splitlines() if row.startswith("VmHWM:")), None)
    if line is None:
        return None
    mib = int(line.split()[1]) >> 10
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        mib += int(sys.modules["torch"].cuda.max_memory_allocated()) >> 20
    return mib
