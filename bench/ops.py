"""Kernels by backend and rival: parity with the reference at the size timed first, then times, interleaved."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.bench import rivals_span_topk
from el4ner.bench._harness import Timing, interleave, machine, where
from el4ner.bench.ceilings import Ceilings, measure_ceilings
from el4ner.bench.rivals import rivals
from el4ner.errors import KernelError
from el4ner.kernels import available_backends, span_topk, vote
from el4ner.kernels._cases import CASES, Case, difference

Arrays = tuple[NDArray[Any], ...]
Run = Callable[[], Arrays]

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
        "choice_logprobs": {"rows": 64, "width": 896, "vocabulary": 151936, "choices": 16, "bf16": 1},
        "span_scores": {"tokens": 100000, "max_length": 8, "labels": 16},
        "span_topk": {"queries": 1000, "sentences": 10000, "width": 384, "k": 20},
        "vote": {"members": 8, "spans": 1_000_000, "labels": 16},
    },
    "large": {  # where FAISS may propose
        "span_topk": {"queries": 200, "sentences": 50000, "width": 384, "k": 20},
    },
    "million": {  # a GPU's
        "span_topk": {"queries": 1000, "sentences": 1_000_000, "width": 384, "k": 20},
        "choice_logprobs": {"rows": 2000, "width": 2048, "vocabulary": 151936, "choices": 16, "bf16": 1},
    },
}
# The reference is a plain loop. Where it would take minutes it answers for so many spans or queries, drawn by the seed;
# rows do not depend on each other, and all sides are compared with each other over the whole size.
SAMPLED = {"vote": 5000, "span_topk": 20}


def work(op: str, shape: Mapping[str, int]) -> tuple[str, float]:
    """What bounds an operation: ("flops", how many) or ("bytes", how many have to be moved)."""
    if op == "span_topk":
        return "flops", 2.0 * shape["query_spans"] * shape["pool_spans"] * shape["width"]
    if op == "choice_logprobs":
        return "flops", 2.0 * shape["rows"] * shape["vocabulary"] * shape["width"]
    if op == "vote":
        return "bytes", shape["spans"] * (4.0 * shape["members"] * shape["labels"] + 16)
    if op == "span_scores":
        return "bytes", 4.0 * shape["tokens"] * shape["labels"] * (shape["max_length"] + 2)
    return "bytes", 4.0 * shape["tokens"] * shape["max_length"] * shape["labels"]


def share(op: str, shape: Mapping[str, int], seconds: float, ceilings: Ceilings) -> dict[str, Any] | None:
    """How much of the machine a time means; None where no ceiling was measured."""
    bound, amount = work(op, shape)
    kind = "bf16" if shape.get("bf16") or (op == "span_topk" and "matmul" in ceilings.how) else "f32"
    moved = ceilings.read_bytes_s if op == "vote" else ceilings.copy_bytes_s  # of vote's bytes 3% are written
    ceiling = moved if bound == "bytes" else ceilings.flops_s.get(kind, 0.0)
    unit = "GB/s" if bound == "bytes" else f"{kind} GFLOP/s"
    if not ceiling:
        return None
    return {"reached": round(amount / seconds / 1e9, 1), "unit": unit, "share": round(amount / seconds / ceiling, 3)}


def _expected(case: Case, seed: int) -> tuple[NDArray[np.int64] | None, Arrays]:
    """The reference's answer and for which rows it is (None: all)."""
    rows = {"vote": case.shape.get("spans", 0), "span_topk": case.shape.get("queries", 0)}.get(case.op, 0)
    if rows <= SAMPLED.get(case.op, rows):
        return None, case.run("ref")
    picks = np.sort(np.random.default_rng(seed).choice(rows, SAMPLED[case.op], replace=False)).astype(np.int64)
    given = case.inputs
    if case.op == "vote":
        return picks, vote(given["logp"][:, picks], given["weights"], backend="ref")
    offsets = given["query_offsets"]
    spans = np.concatenate([np.arange(offsets[b], offsets[b + 1]) for b in picks])
    part = np.concatenate([[0], np.cumsum(np.diff(offsets)[picks])])
    queries, weights = given["queries"][spans], given["weights"][spans]
    return picks, span_topk(queries, part, weights, given["pool"], given["k"], backend="ref")


class _Judge:
    """Compares answers with the reference's, and with the first right answer over the whole size."""

    def __init__(self, case: Case, seed: int) -> None:
        self._picks, self._expected = _expected(case, seed)
        self._first: Arrays | None = None

    @property
    def sampled(self) -> bool:
        """Whether the reference answered for some rows only."""
        return self._picks is not None

    def check(self, run: Run, tolerance: float, why: str, mismatches: float = 0.0) -> tuple[float | None, str | None]:
        """(largest difference, None) if the answer is right; else (None or the difference, the reason why not).

        mismatches: which share of whole numbers (ids, winners) may differ.
        """
        result, reason = _attempt(run)
        if result is None:
            return None, reason
        picked = result if self._picks is None else tuple(array[self._picks] for array in result)
        gap, differ = _gap(picked, self._expected)
        if self._first is not None and self._picks is not None:
            gap_all, differ_all = _gap(result, self._first)
            gap, differ = max(gap, gap_all / 2), max(differ, differ_all)  # both may be off, in opposite directions
        if gap > tolerance or differ > mismatches:
            said = f"differs from ref by {gap:.3g}; allowed: {tolerance:.3g} ({why})"
            return gap, said + (f"; {differ:.2g} of its whole numbers differ" if differ else "")
        self._first = self._first or result
        return gap, None


def _attempt(run: Run) -> tuple[Arrays | None, str | None]:
    """The answer, or None and why there is none: memory, say, or an operator that torch lacks on this device."""
    try:
        return run(), None
    except KernelError as error:
        return None, str(error)
    except RuntimeError as error:
        return None, f"{type(error).__name__}: {error}".partition("\n")[0]


def _gap(result: Arrays, expected: Arrays) -> tuple[float, float]:
    """Largest difference of the floats (infinite for other shapes, or NaN), share of whole numbers that differ."""
    whole = [(got, want) for got, want in zip(result, expected, strict=True) if want.dtype.kind in "iu"]
    if any(got.shape != want.shape for got, want in whole):
        return float("inf"), 1.0
    differ = max((float((got != want).mean()) for got, want in whole if want.size), default=0.0)
    floats = [(got, want) for got, want in zip(result, expected, strict=True) if want.dtype.kind not in "iu"]
    return difference([got for got, _ in floats], [want for _, want in floats]), differ


def make_case(op: str, size: str, seed: int, device: str) -> Case:
    """The random input of an operation at a size. Raises KernelError where the size is not defined for it."""
    if op not in SIZES[size]:
        defined = ", ".join(name for name, ops in SIZES.items() if op in ops)
        raise KernelError(f"{op} has no size {size!r}; allowed: {defined}")
    shape: dict[str, Any] = dict(SIZES[size][op])
    if "device" in inspect.signature(CASES[op]).parameters:
        shape["device"] = device
    return CASES[op](np.random.default_rng(seed), **shape)


def _span_topk_rows(
    size: str, repeats: int, seed: int, inputs: tuple[str, ...], sides: tuple[str, ...], budget_s: float | None
) -> Iterator[dict[str, Any]]:
    """The rows of span_topk on one thread of the CPU, shaped like those of the other operations."""
    for row in rivals_span_topk.measure(
        size=size, repeats=repeats, seed=seed, names=inputs, only=sides, budget_s=budget_s
    ):
        roof = row["share_of_peak"] and {
            "reached": round(row["gops"], 1),
            "unit": f"{row['precision']} GOP/s",
            "share": round(row["share_of_peak"], 3),
        }
        same = {"backend": row["side"], "rival": not row["side"].startswith("el4ner"), "size": size, "device": "cpu"}
        yield row | same | {"roofline": roof}


def _checked(
    case: Case, same: Mapping[str, Any], backends: tuple[str, ...]
) -> tuple[dict[str, dict[str, Any]], dict[str, Run]]:
    """By name: the row of each backend and rival, with whether its answer was right, and the calls to be timed.

    same: what all rows say; backends: only these.
    """
    judge = _Judge(case, same["seed"])
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for backend, unavailable in available_backends(case.op).items():
        if backends and backend not in backends:
            continue
        row = rows[backend] = {**same, "backend": backend, "rival": False, "status": "unavailable", "difference": None}
        row["reason"] = reason = _skipped(backend, unavailable, judge, case)
        if reason is None:
            row["difference"], row["reason"] = judge.check(partial(case.run, backend), case.tolerance, case.why)
            row["status"] = "wrong" if row["reason"] else "ok"
            runs[backend] = partial(case.run, backend)
    for rival in rivals(case.op, case, same["device"]):
        row = rows[rival.name] = {**same, "backend": rival.name, "rival": True, "status": "unavailable"}
        row |= {"difference": None, "reason": rival.unavailable, "note": rival.why}
        if rival.unavailable is None:
            if rival.tolerance is not None:
                row["difference"], row["reason"] = judge.check(rival.run, rival.tolerance, rival.why, rival.mismatches)
            else:
                row["reason"] = _attempt(rival.run)[1]
            row["status"] = "wrong" if row["reason"] else "ok"
            runs[rival.name] = rival.run
    return rows, runs


def measure(
    op: str,
    *,
    size: str,
    repeats: int,
    seed: int,
    device: str = "cpu",
    backends: tuple[str, ...] = (),
    ceilings: Ceilings | None = None,
    sides: tuple[str, ...] = (),
    inputs: tuple[str, ...] = (),
    budget_s: float | None = None,
) -> Iterator[dict[str, Any]]:
    """A row per backend and rival: what was run, whether it was right, its times, its ratio to the fastest backend.

    status: "ok", "unavailable", "wrong" (then it is not timed, and `reason` says why). ratio: how many times slower
    than the fastest of our backends, median, least and most over rounds. Timing includes argument checks and, on CUDA,
    the way of the answer to the host, as users pay them too. backends: only these; all that can run by default.

    span_topk on the CPU is measured on one thread in processes of its own, with more rivals and inputs; naming backends
    or a GPU's size gives rows like those of the other operations instead. sides, inputs, budget_s: of these processes;
    which sides and inputs, and CPU seconds that all calls of a rival may take.
    """
    if op == "span_topk" and device == "cpu" and not backends and size in rivals_span_topk.SIZES:
        yield from _span_topk_rows(size, repeats, seed, inputs, sides, budget_s)
        return
    case = make_case(op, size, seed, device)
    facts, ceilings = machine(), ceilings or measure_ceilings(device)
    same = {"op": op, "size": size, "shape": case.shape, "device": device, "seed": seed}
    rows, runs = _checked(case, same, backends)
    timings = interleave({name: run for name, run in runs.items() if rows[name]["status"] == "ok"}, repeats)
    own = [timing for name, timing in timings.items() if not rows[name]["rival"]]
    fastest = min(own, key=lambda timing: timing.median_s, default=None)
    for name, row in rows.items():
        yield (
            row
            | _times(op, case, timings.get(name), fastest, ceilings)
            | {
                "ceilings": ceilings.to_dict(),
                "machine": facts,
            }
        )


def _skipped(backend: str, unavailable: str | None, judge: _Judge, case: Case) -> str | None:
    """Why a backend is not run: it cannot, or it is the reference at a size that would take it minutes."""
    if unavailable is None and backend == "ref" and judge.sampled:
        return f"the reference answered for {SAMPLED[case.op]} rows only; it would take minutes for all"
    return unavailable


def _times(op: str, case: Case, timing: Timing | None, fastest: Timing | None, ceilings: Ceilings) -> dict[str, Any]:
    if timing is None or fastest is None:
        return {"timing": None if timing is None else timing.to_dict(), "ratio": None, "roofline": None}
    ratio = dict(zip(("median", "min", "max"), (round(r, 3) for r in timing.ratio_to(fastest)), strict=True))
    return {
        "timing": timing.to_dict(),
        "ratio": ratio,
        "roofline": share(op, case.shape, timing.median_s, ceilings),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one operation and size as lines for reading."""
    first = rows[0]
    if "side" in first:  # span_topk in processes of its own: a table for each input
        inputs = dict.fromkeys(row["data"] for row in rows)
        return "\n\n".join(rivals_span_topk.table([row for row in rows if row["data"] == name]) for name in inputs)
    shape = " ".join(f"{name}={number}" for name, number in first["shape"].items())
    lines = [f"{first['op']} ({first['size']}, {first['device']}): {shape}"]
    lines.append(
        f"  {'':<42}{'median ms':>10}{'min':>10}{'max':>10}{'cpu ms':>10}{'ratio':>8}  spread        of ceiling"
    )
    for row in rows:
        name = f"{row['backend']}{' (rival)' if row['rival'] else ''}"
        if row["timing"] is None:
            lines.append(f"  {name:<42}{row['status']}: {row['reason']}")
            continue
        times = [row["timing"][key] * 1e3 for key in ("median_s", "min_s", "max_s", "cpu_median_s")]
        ratio, roof = row["ratio"], row["roofline"]
        line = f"  {name:<42}" + "".join(f"{ms:>10.2f}" for ms in times)
        if ratio:
            line += f"{ratio['median']:>8.2f}  {_spread(ratio):<14}"
        lines.append(line + (f"{roof['share']:.0%} ({roof['reached']} {roof['unit']})" if roof else ""))
    facts, ceilings = first["machine"], first["ceilings"]
    versions = " ".join(f"{name} {version}" for name, version in facts["versions"].items())
    card = f", {facts['cuda'][0]['name']}" if first["device"] == "cuda" and facts["cuda"] else ""
    lines.append(f"  {where(facts, card)}")
    lines.append(f"  Python {facts['python']} {versions}; ceilings: {ceilings}")
    return "\n".join(lines)


def _spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['min']:.2f}..{ratio['max']:.2f}"
