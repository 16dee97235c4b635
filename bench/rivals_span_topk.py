"""span_topk against its rivals: who answers the same question is checked first, then all are timed in turns.

One thread for everybody, in a process of its own, because libraries read the number of their threads when they are
loaded. Times are CPU seconds of that process (its one thread), which a busy machine changes less than wall time.
Several rivals answer less (`span_sides.py`): `answers` says what.

At size "large" the definition answers a part of the queries, drawn by the seed, and so do the rivals and the slower of
ours; the fastest of ours answers all, and FAISS's candidates are compared with it. A rival that takes more time than a
budget is dropped: its row says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from el4ner.bench import rivals_span_topk_cuda, span_packing
from el4ner.bench._harness import OverBudgetError, machine, within
from el4ner.bench.rivals import Rival, crash
from el4ner.bench.span_oracle import oracle
from el4ner.bench.span_pools import REAL, SYNTHETIC, SpanInput, real, synthetic
from el4ner.bench.span_sides import (
    PROPOSED,
    SENTENCES,
    Side,
    candidate_sides,
    maxsim_sides,
    our_sides,
    span_sides,
    torch_sides,
    torch_ways,
)
from el4ner.errors import KernelError
from el4ner.kernels import _span_native, available_backends
from el4ner.kernels._cases import Case

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")
SIZES = {
    "small": {"queries": 20, "sentences": 500, "width": 384},
    "full": {"queries": 1000, "sentences": 10000, "width": 384},
    "large": {"queries": 200, "sentences": 50000, "width": 384},  # 250,000 spans: here FAISS may propose
}
SAMPLED = {"large": 10}
"""Queries that the definition and the rivals answer; all by default."""
BUDGETS = {"small": 60.0, "full": 240.0, "large": 12.0}
"""CPU seconds that all calls of a rival may take."""
K = 20
INPUTS = (*SYNTHETIC, *REAL["full"], "packing")
"""By name: random numbers, the spans of benchmarks, and the packing of a pool instead of a search in it."""


def rivals(case: Case, device: str) -> Iterator[Rival]:
    """torch beside named backends; on a GPU also libraries made for it. Where numbers are rounded, scores count."""
    given = case.inputs
    data = SpanInput("case", given["queries"], given["query_offsets"], given["weights"], given["pool"])
    for name, answers, run, tolerance, precision in torch_ways(data, given["k"], device):
        # Neighbours in the order of a million sentences are some 1e-4 apart: float32 swaps a few, 16 bits most of them.
        yield Rival(name, run, tolerance, answers, mismatches=1e-2 if precision == "fp32" else 1.0)
    if device == "cuda":
        yield from rivals_span_topk_cuda.rivals(data, given["k"], device)


# --- measuring -------------------------------------------------------------------------------------------------------


def _check(side: Side, crashed: str | None = None, call_s: float | None = None) -> dict[str, Any]:
    """status, reason, agreement and difference of a side. Exact ones must agree, rounded ones say how far they do.

    call_s: CPU seconds that a call of a rival may take. crashed: how an earlier try of fragile ones ended.
    """
    call_s = None if side.ours else call_s
    try:
        if side.fragile and (ended := crashed or crash(side.run, call_s)):
            return {"status": "unavailable", "reason": ended}
        with within(call_s):
            result = side.run()
        share, gap = side.judge(result)
    except OverBudgetError as error:
        part = "" if side.part == 1 else f" for {side.part:.1%} of the work"
        return {"status": "dropped", "reason": f"one call takes more than {error}{part}; --budget allows more"}
    except (KernelError, RuntimeError, ValueError, TypeError) as error:
        return {"status": "unavailable", "reason": f"{type(error).__name__}: {error}".partition("\n")[0]}
    facts = {"agreement": round(share, 5), "difference": gap}
    # In float32 a last place or two of the k decides now and then otherwise; ours have no such excuse.
    least = 0.0 if side.answers == PROPOSED else 0.5 if side.answers != SENTENCES else 1.0 if side.ours else 0.999
    if share < least or gap > side.tolerance:
        return facts | {
            "status": "wrong",
            "reason": f"agreement {share:.4f}, at least {least}; scores off by {gap:.3g}, at most {side.tolerance:.3g}",
        }
    return facts | {"status": "ok", "reason": None}


def _turns(sides: Sequence[Side], repeats: int) -> dict[str, dict[str, Any]]:
    """CPU and wall seconds of each side for the whole work, in turns whose order rotates."""
    cpu: dict[str, list[float]] = {side.name: [] for side in sides}
    wall: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(repeats):
        for n in range(len(sides)):
            side = sides[(n + turn) % len(sides)]
            began, began_cpu = time.perf_counter(), time.process_time()
            side.run()
            cpu[side.name].append((time.process_time() - began_cpu) / side.part)
            wall[side.name].append((time.perf_counter() - began) / side.part)
    return {
        name: {
            "clock": "process CPU time", "median_s": statistics.median(taken), "min_s": min(taken), "max_s": max(taken),
            "wall_median_s": statistics.median(wall[name]), "repeats": repeats,
        }
        for name, taken in cpu.items()
    }  # fmt: skip


def _certified(data: SpanInput, k: int) -> dict[str, dict[str, Any]]:
    """By side: what the screen left over. certified: share of queries whose candidates stayed within their buffer."""
    from el4ner.kernels.span_topk import _Queries, span_topk_native

    nothing = np.zeros(0, np.int64), np.zeros(len(data.offsets), np.int64)
    found = {}
    for precision, isa in _span_native.supported():
        if isa != "portable":
            os.environ["EL4NER_ISA"] = isa
            done: dict[str, Any] = {}
            span_topk_native(
                _Queries(data.queries, data.offsets, data.weights, *nothing), data.pool, k, precision, done
            )
            count = max(done["queries"], 1)
            found[f"el4ner native {precision} {isa}"] = {
                "certified": done["certified"] / count,
                "candidates_per_query": done["candidates"] / count,
                "bounded_per_query": done["bounded"] / count,
                "rescored_per_query": done["rescored"] / count,
            }
    return found


def _peaks() -> dict[str, float]:
    """Measured ceiling of one core by precision, 10^9 operations a second."""
    from el4ner import _native

    best: dict[str, float] = {}
    for precision, isa in _span_native.supported():
        best[precision] = max(best.get(precision, 0.0), _native.span_topk_peak(precision, isa))
    return best


def _sides(data: SpanInput, k: int, seed: int, sample: int | None) -> list[Side]:
    """All sides; where only a sample of the queries is asked, the fastest of ours answers all queries nevertheless."""
    count = len(data.offsets) - 1
    if sample is None or sample >= count:
        expected = oracle(data, k)
        sides = [*our_sides(data, k, expected), *candidate_sides(data, k), *torch_sides(data, k, expected)]
        return [*sides, *span_sides(data, k), *maxsim_sides(data)]
    picks = np.sort(np.random.default_rng(seed).choice(count, sample, replace=False)).astype(np.int64)
    asked = data.only(picks)
    expected = oracle(asked, k)
    share = len(asked.queries) / len(data.queries)
    rest = [*our_sides(asked, k, expected)[1:], *torch_sides(asked, k, expected)]
    rest += [*span_sides(asked, k), *maxsim_sides(asked)]
    part = [replace(side, part=side.part * share) for side in rest]
    return [*our_sides(data, k, expected, picks)[:1], *candidate_sides(data, k), *part]


def rows(
    data: SpanInput,
    *,
    k: int,
    repeats: int,
    seed: int,
    facts: Mapping[str, Any],
    crashed: str | None = None,
    sample: int | None = None,
    budget_s: float | None = None,
    only: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """A row per side: what it answers, agreement, timing, ratio to ours, share of the core's ceiling.

    crashed: how an earlier try ended; fragile sides are left out then, for this reason. sample: queries that most sides
    answer; budget_s: CPU seconds that a rival may take in all; only: sides whose names hold one of these.
    """
    sides = [side for side in _sides(data, k, seed, sample) if not only or any(name in side.name for name in only)]
    call_s = None if budget_s is None else budget_s / (repeats + 1)
    checks = {side.name: _check(side, crashed, call_s) for side in sides}
    timings = _turns([side for side in sides if checks[side.name]["status"] == "ok"], repeats)
    native = available_backends("span_topk")["native"] is None
    certified = _certified(data if sample is None else data.only(np.arange(sample)), k) if native else {}
    peaks = _peaks() if native else {}
    ours = next((timings[side.name]["median_s"] for side in sides if side.name in timings), None)
    shape = data.shape | {"k": k}
    for side in sides:
        timing = timings.get(side.name)
        rate = 2e-9 * data.products / timing["median_s"] if timing and side.answers != PROPOSED else None
        peak = peaks.get(side.precision)
        row = {
            "op": "span_topk", "side": side.name, "answers": side.answers, "data": data.name,
            "precision": side.precision,
            "shape": shape, "seed": seed, "part_timed": side.part, **checks[side.name], **side.facts, "timing": timing,
            "times_ours": timing["median_s"] / ours if timing and ours else None, "gops": rate, "peak_gops": peak,
            "share_of_peak": rate / peak if rate and peak else None, **certified.get(side.name, {}), "machine": facts,
            "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"), "checked_queries": sample or shape["queries"],
        }  # fmt: skip
        if side.answers == PROPOSED and timing and ours:
            row |= {"recall": row["agreement"], "speedup_over_exact": round(ours / timing["median_s"], 2)}
        yield row


def table(measured: Sequence[Mapping[str, Any]]) -> str:
    """The rows of one input as text: CPU seconds, spread, times ours, share of the ceiling, agreement."""
    if not measured:
        return ""
    shape, facts = measured[0]["shape"], measured[0]["machine"]
    sizes = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in shape.items())
    lines = [
        f"span_topk, {measured[0]['data']}: {sizes}",
        f"{facts['cpu']}, 1 thread, CPU time, commit {facts['commit']}, torch {facts['versions']['torch']}",
        f"{'side':44} {'median s':>9} {'min..max':>15} {'x ours':>7} {'of peak':>8} {'agrees':>8}  answers",
    ]
    for row in measured:
        timing = row["timing"]
        if timing is None:
            lines.append(f"{row['side']:44} {row['status']}: {row['reason']}")
            continue
        spread = f"{timing['min_s']:.3f}..{timing['max_s']:.3f}"
        ratio = f"{row['times_ours']:.2f}" if row["times_ours"] else "-"
        share = f"{row['share_of_peak']:.0%}" if row["share_of_peak"] else "-"
        part = "" if row["part_timed"] == 1 else f" (from {row['part_timed']:.1%} of the work)"
        if "recall" in row:
            part = f": recall {row['recall']:.4f} over {row['recall_over']}, {row['speedup_over_exact']} times as fast"
        lines.append(
            f"{row['side']:44} {timing['median_s']:9.3f} {spread:>15} {ratio:>7} {share:>8} {row['agreement']:8.4f}"
            f"  {row['answers']}{part}"
        )
    return "\n".join(lines)


def _openblas() -> dict[str, str]:
    """Which of its loops OpenBLAS is to take, so that rivals are measured at their best.

    The one in faiss-cpu 1.15.1 does not know newer Xeons and takes its SSE3 loops: 7.0 s instead of 1.6 with AMX.
    """
    flags = machine()["instruction_sets"]
    return {"OPENBLAS_CORETYPE": "SkylakeX" if "avx512bw" in flags else "Haswell"} if "avx2" in flags else {}


def measure(
    *,
    size: str,
    repeats: int,
    seed: int,
    names: Sequence[str] = (),
    only: Sequence[str] = (),
    budget_s: float | None = None,
) -> Iterator[dict[str, Any]]:
    """All rows, from one single-threaded process per input. Real pools need EL4NER_DATA and the embedded encoder.

    names: inputs; only: sides whose names hold one of these; budget_s: CPU seconds of a rival, by default the size's.
    """
    if not names:
        real_names = REAL.get(size, {}) if os.environ.get("EL4NER_DATA") else {}
        names = ["clustered"] if size == "small" else [*SYNTHETIC, *real_names]
        names += ["packing"] if size == "full" and not only else []
    env = {**_openblas(), **os.environ, **dict.fromkeys((*THREADS, "EL4NER_THREADS"), "1"), "PYTHONSAFEPATH": "1"}
    for name in names:
        words = ["--data", name, "--size", size, "--repeats", str(repeats), "--seed", str(seed)]
        words += ["--budget", str(budget_s)] if budget_s else []
        words += [word for side in only for word in ("--only", side)]
        command = [sys.executable, "-m", "el4ner.bench.rivals_span_topk", *words]
        # elsewhere than in a checkout, whose folder `kernels` would hide the package of that name
        with tempfile.TemporaryDirectory() as folder:
            call = partial(subprocess.run, env=env, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
            done = call(command)
            if done.returncode < 0:  # a library that crashes now and then need not have done so when it was tried
                done = call([*command, "--crashed", f"crashed with signal {-done.returncode} while it was timed"])
        if done.returncode:
            raise KernelError(f"measuring span_topk on {name} failed with exit code {done.returncode}; see above")
        yield from map(json.loads, done.stdout.splitlines())


def main(arguments: Sequence[str] | None = None) -> None:
    """One input in this process, whose threads the caller has set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=INPUTS, default="clustered")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crashed", help="how an earlier try ended: leave out rivals that may crash")
    parser.add_argument("--budget", type=float, help="CPU seconds that all calls of a rival may take")
    parser.add_argument("--only", action="append", default=[], help="sides whose name holds this")
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    if given.data == "packing":
        for row in span_packing.rows(repeats=given.repeats, seed=given.seed, facts=machine()):
            print(json.dumps(row), flush=True)
        return
    sizes = SIZES[given.size]
    if given.data not in SYNTHETIC:
        of_train = {**REAL["full"], **REAL.get(given.size, {})}[given.data]
        data = real(given.data, queries=sizes["queries"], sentences=of_train, seed=given.seed)
    else:
        data = synthetic(given.data, **sizes, seed=given.seed)
    for row in rows(
        data, k=K, repeats=given.repeats, seed=given.seed, facts=machine(), crashed=given.crashed,
        sample=SAMPLED.get(given.size), budget_s=given.budget or BUDGETS[given.size], only=given.only,
    ):  # fmt: skip
        print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
