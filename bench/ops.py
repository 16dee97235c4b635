"""Kernels by backend: parity with the reference first, then times, interleaved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from el4ner.bench import rivals_span_topk
from el4ner.bench._harness import interleave, machine
from el4ner.kernels import available_backends
from el4ner.kernels._cases import CASES, check

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "small": {  # seconds in total, on two cores
        "best_flat": {"tokens": 100, "max_length": 8, "labels": 8},
        "choice_logprobs": {"rows": 16, "width": 576, "vocabulary": 49152, "choices": 8},
        "span_scores": {"tokens": 400, "max_length": 8, "labels": 16},
        "span_topk": {"queries": 20, "sentences": 500, "width": 384, "k": 20},
        "vote": {"members": 4, "spans": 1000, "labels": 16},
    },
    "full": {  # the shapes of the goals
        "best_flat": {"tokens": 2000, "max_length": 8, "labels": 16},
        "choice_logprobs": {"rows": 64, "width": 896, "vocabulary": 151936, "choices": 16},
        "span_scores": {"tokens": 20000, "max_length": 8, "labels": 16},
        "span_topk": {"queries": 1000, "sentences": 10000, "width": 384, "k": 20},
        "vote": {"members": 8, "spans": 20000, "labels": 16},
    },
}


def measure(op: str, *, size: str, repeats: int, seed: int) -> Iterator[dict[str, Any]]:
    """A row per backend: op, backend, shape, seed, status ("ok", "unavailable", "wrong"), reason, timing, machine.

    Timing includes argument checks, as users pay them too. Inputs are random; see kernels/_cases.py.
    """
    if op == "span_topk":  # its rivals stand beside it
        yield from rivals_span_topk.measure(size=size, repeats=repeats, seed=seed)
        return
    case = CASES[op](np.random.default_rng(seed), **SIZES[size][op])
    facts = machine()
    rows: dict[str, dict[str, Any]] = {}
    for backend, reason in available_backends(op).items():
        status = "unavailable"
        if reason is None:
            reason = check(case, backend)
            status = "ok" if reason is None else "wrong"
        rows[backend] = {"op": op, "backend": backend, "shape": case.shape, "seed": seed} | {
            "status": status,
            "reason": reason,
        }
    timings = interleave({b: partial(case.run, b) for b, row in rows.items() if row["status"] == "ok"}, repeats)
    for backend, row in rows.items():
        timing = timings[backend].to_dict() if backend in timings else None
        yield row | {"timing": timing, "machine": facts}


def summary(op: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of an operation as tables for people, one for each input; empty where there is none."""
    if op != "span_topk":
        return ""
    names = dict.fromkeys(row["data"] for row in rows)
    return "".join(rivals_span_topk.table([row for row in rows if row["data"] == name]) + "\n\n" for name in names)
