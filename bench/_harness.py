"""Timing and facts about the machine: what every row of a measurement needs to mean something."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from el4ner.doctor import diagnose_hardware

VERSIONS = ("el4ner", "torch", "transformers", "tokenizers", "llguidance", "numpy", "numba")
"""What answers and times depend on."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall time of one side: median, fastest and slowest of `repeats` calls, in seconds; the process's CPU time too.

    samples_s: the wall time of every call; the n-th calls of all sides follow each other.
    """

    median_s: float
    min_s: float
    max_s: float
    repeats: int
    cpu_median_s: float
    samples_s: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """How many times slower this side is than the other: median, least and most over rounds."""
        ratios = [mine / theirs for mine, theirs in zip(self.samples_s, other.samples_s, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def slower(timing: Timing, ours: Timing, share: float = 1.0) -> dict[str, Any]:
    """How many times as long a side takes as ours: median, least, most over rounds, and by CPU time.

    share: our amount of work over the side's, where it did less.
    """
    ratio = (round(value * share, 2) for value in timing.ratio_to(ours))
    speedup = dict(zip(("median", "min", "max"), ratio, strict=True))
    return {"speedup": speedup, "cpu_speedup": round(timing.cpu_median_s / ours.cpu_median_s * share, 2)}


def interleave(sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Time several functions in turns, so that a busy neighbour slows all of them alike.

    Each is called `warmup` times before (compilation, caches), then `repeats` times; the order rotates each round.
    Functions must finish their work before they return (results on the host). Raises ValueError if repeats < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; it must be at least 1")
    for run in sides.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(repeats):
        shift = turn % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            start, cpu_start = time.perf_counter(), time.process_time()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    return {
        name: Timing(statistics.median(s), min(s), max(s), repeats, statistics.median(cpu[name]), tuple(s))
        for name, s in seconds.items()
    }


class OverBudgetError(Exception):
    """Something took more time than it may; the message says how much that is."""


@contextlib.contextmanager
def within(cpu_s: float | None) -> Iterator[None]:
    """What runs here may take so many CPU seconds of the process; None: any number.

    Raises OverBudgetError: at once where Python code runs, behind a call that does not come back before; where the
    system has no such timer, and outside the main thread, only at the end.
    """
    if cpu_s is None:
        yield
        return
    said = f"{cpu_s:.3g} CPU seconds"

    def over(*_: object) -> None:
        raise OverBudgetError(said)

    timed = hasattr(signal, "SIGPROF") and threading.current_thread() is threading.main_thread()
    began = time.process_time()
    if timed:
        before = signal.signal(signal.SIGPROF, over)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    except Exception as error:  # some extension modules make another of what is raised while they run
        if isinstance(error.__cause__, OverBudgetError):
            raise OverBudgetError(said) from error
        raise
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
    if time.process_time() - began > cpu_s:
        raise OverBudgetError(said)


def commit() -> str | None:
    """The commit this code was measured at, "+changes" if files differ from it; None outside a git checkout."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    revision = git("rev-parse", "--short=12", "HEAD")
    # An installed copy may lie inside some other project's checkout: its commit would be a lie.
    if revision is None or git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return f"{revision}+changes" if git("status", "--porcelain", "--untracked-files=no") else revision


def machine() -> dict[str, Any]:
    """Hardware, versions, threads and commit, as they go into each row."""
    import torch

    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {
        **diagnose_hardware(),
        "python": platform.python_version(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "load_1min": load,
        "commit": commit(),
    }


def where(facts: Mapping[str, Any], card: str = "") -> str:
    """The facts of `machine` that every table ends with, on one line. card: what stands behind the processor."""
    return f"{facts['cpu']}{card}, {facts['threads']} threads, load {facts['load_1min']}, commit {facts['commit']}"
