"""What Ctrl-C does to a command: the first press ends it in order, others do not break into that with a traceback."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

INTERRUPTED = 130
"""Exit code of a command that was interrupted."""
_PATIENCE_S = 10.0
"""Seconds that a command has to end; a press after that ends the process at once."""


def end_in_order() -> None:
    """From now on the first SIGINT raises KeyboardInterrupt and later ones do nothing for a while.

    For the start of a process, in its main thread. Does nothing where SIGINT is ignored, as under nohup.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    first: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            signal.default_int_handler(number, frame)  # raises
        if time.monotonic() - first[0] > _PATIENCE_S:
            os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, handle)
