"""What kernels are compared with. `bench/rivals_<op>.py` has a function `rivals(case, device)` that yields Rival."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.bench._harness import OverBudgetError
from el4ner.kernels._cases import Case


@dataclass(frozen=True, slots=True)
class Rival:
    """One other way to get the same answer.

    run: gives the case's arrays, on the host. tolerance: what its answers may be off by, `why` the reason; None where
    it does less than the kernel (then nothing is compared, and `why` says what is missing).
    unavailable: why it cannot run here. mismatches: which share of whole numbers (ids, winners) may differ.
    """

    name: str
    run: Callable[[], tuple[NDArray[Any], ...]]
    tolerance: float | None
    why: str
    unavailable: str | None = None
    mismatches: float = 1e-3


def rivals(op: str, case: Case, device: str) -> Iterator[Rival]:
    """The rivals of an operation; none where nobody has written any."""
    name = f"el4ner.bench.rivals_{op}"
    if importlib.util.find_spec(name) is not None:
        yield from importlib.import_module(name).rivals(case, device)


_START_S = 60  # wall time that a new process may take until it calls


def crash(run: Callable[[], Any], limit_s: float | None = None) -> str | None:
    """How a process of its own that calls `run` ends, where that is by a signal; None if it ends by itself.

    run must be picklable. What it raises there is not looked at: the caller sees it on its own call.
    Raises OverBudgetError if it still runs after a minute for its start and four times limit_s, of wall time.
    """
    child = multiprocessing.get_context("spawn").Process(target=_quietly, args=(run,))
    child.start()
    child.join(None if limit_s is None else _START_S + 4 * limit_s)
    if child.is_alive():
        child.terminate()
        child.join()
        raise OverBudgetError(f"{limit_s:.3g} CPU seconds")
    return f"crashes with signal {-child.exitcode}" if child.exitcode and child.exitcode < 0 else None


def _quietly(run: Callable[[], Any]) -> None:
    with contextlib.suppress(Exception):
        run()


def to_host(*arrays: Any) -> tuple[NDArray[Any], ...]:
    """torch tensors or arrays as numpy arrays on the host; what a GPU still has to do is waited for."""
    return tuple(a if isinstance(a, np.ndarray) else a.cpu().numpy() for a in arrays)
