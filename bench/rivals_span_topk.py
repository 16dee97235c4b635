"""span_topk against its rivals: who answers the same question is checked first, then all are timed in turns.

One thread for everybody, in a process of its own, because libraries read the number of their threads when they are
loaded. Times are CPU seconds of that process (its one thread), which a busy machine changes less than wall time.
Several rivals answer less: `answers` says what, and a ratio against them is a ratio against less work.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.bench import span_packing
from el4ner.bench._harness import machine
from el4ner.bench.rivals import Rival, crash, to_host
from el4ner.bench.span_oracle import Answer, agreement, agreement_but_ties, oracle
from el4ner.bench.span_pools import REAL, SYNTHETIC, SpanInput, real, synthetic
from el4ner.errors import KernelError
from el4ner.kernels import SpanIndex, _span_native, available_backends, span_topk
from el4ner.kernels._cases import Case
from el4ner.kernels._span_faiss import LARGE

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")
SIZES = {
    "small": {"queries": 20, "sentences": 500, "width": 384},
    "full": {"queries": 1000, "sentences": 10000, "width": 384},
    "large": {"queries": 200, "sentences": 50000, "width": 384},  # 250,000 spans: here FAISS may propose
}
K = 20
# Queries whose products torch holds at a time (60 MB at 50,000 spans): the fastest of 25, 50, 100 and 300.
_CHUNK = 50

SENTENCES = "the k best sentences, weighted, exact"
PROPOSED = "exact scores of what FAISS proposes; agreement is recall"
ROUNDED = "the k best sentences, weighted, from rounded numbers"
UNWEIGHTED = "unweighted scores of all sentences"
SPANS = "the k nearest spans of each query span"


@dataclass(frozen=True, slots=True)
class Side:
    """One way to answer. run() does all of it, or the first part of the queries: `part` says which share of the work.

    judge(result) -> (agreement, largest difference of a score), compared with what it claims to answer.
    fragile: its library has been seen to crash, so it is tried in another process first; run can be pickled then.
    """

    name: str
    answers: str
    run: Callable[[], Any]
    judge: Callable[[Any], tuple[float, float]]
    tolerance: float
    precision: str = "fp32"
    part: float = 1.0
    fragile: bool = False


def exactly(result: Answer, expected: Answer) -> tuple[float, float]:
    """Like `agreement`, but of whole rows in their order: one id off is wrong."""
    same = float(np.mean(np.all(result[0] == expected[0], axis=1))) if len(expected[0]) else 1.0
    return same, agreement(result, expected)[1]


# --- ours ------------------------------------------------------------------------------------------------------------


def our_sides(data: SpanInput, k: int, expected: Answer) -> list[Side]:
    """Every screening precision on every instruction set (the portable loops are for small sizes), then numba."""

    def call(backend: str, precision: str, isa: str) -> Answer:
        os.environ["EL4NER_ISA"] = isa
        return span_topk(
            data.queries, data.offsets, data.weights, data.pool, k, backend=backend, precision=precision,  # type: ignore[arg-type]
        )  # fmt: skip

    paths = [p for p in _span_native.supported() if p[1] != "portable" or data.products < 10**9]
    sides = [
        Side(f"el4ner native {p} {isa}", SENTENCES, lambda p=p, isa=isa: call("native", p, isa),  # type: ignore[misc]
             lambda r: exactly(r, expected), 1.2e-7, p)
        for p, isa in paths
    ]  # fmt: skip
    if available_backends("span_topk")["numba"] is None:
        sides.append(
            Side("el4ner numba", SENTENCES, lambda: call("numba", "auto", ""), lambda r: exactly(r, expected), 1.2e-7)
        )
    return sides


def candidate_sides(data: SpanInput, k: int, expected: Answer) -> list[Side]:
    """span_topk with candidates from FAISS, where the pool is large enough for it; training is not in the time."""
    if len(data.pool.vectors) < LARGE or not importlib.util.find_spec("faiss"):
        return []
    index = SpanIndex.build(data.pool)

    def judge(result: Answer) -> tuple[float, float]:
        true = [dict(zip(ids.tolist(), scores.tolist(), strict=True)) for ids, scores in zip(*expected, strict=True)]
        gaps = [
            abs(score - true[b][sentence])
            for b, row in enumerate(zip(*result, strict=True))
            for sentence, score in zip(row[0].tolist(), row[1].tolist(), strict=True)
            if sentence >= 0 and sentence in true[b]
        ]
        return agreement(result, expected)[0], max(gaps, default=0.0)

    def run() -> Answer:
        os.environ["EL4NER_ISA"] = ""
        return span_topk(data.queries, data.offsets, data.weights, data.pool, k, candidates=index)

    return [Side(f"el4ner with FAISS, {index.probes} of {index.cells} cells", PROPOSED, run, judge, 1.2e-7)]


# --- rivals ----------------------------------------------------------------------------------------------------------


def torch_ways(data: SpanInput, k: int, device: str) -> list[tuple[str, str, Callable[[], Answer], float, str]]:
    """torch: matmul + segment_reduce + topk, and sentences sorted by length in fp32 and bf16.

    name, what it answers, the call, by how much its scores may be off, precision. Answers come back to the host.
    """
    import torch

    filled = np.flatnonzero(np.diff(data.pool.offsets))
    lengths = np.diff(data.pool.offsets)[filled]
    sizes = np.diff(data.offsets)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    totals = np.bincount(owners, weights=data.weights, minlength=len(sizes))
    names, owner, shares, counts, vectors, queries = (
        torch.from_numpy(array).to(device)
        for array in (filled, owners, (data.weights / totals[owners]).astype(np.float32), lengths, data.pool.vectors,
                      data.queries)
    )  # fmt: skip
    buckets = [(int(n), np.flatnonzero(lengths == n)) for n in np.unique(lengths)]
    starts = data.pool.offsets[:-1][filled]
    panels = {
        n: vectors[torch.from_numpy((starts[which][:, None] + np.arange(n)).ravel()).to(device)] for n, which in buckets
    }
    halves = {n: panel.bfloat16() for n, panel in panels.items()}
    order = torch.from_numpy(np.concatenate([which for _, which in buckets])).to(device)

    def chunks(best: Callable[[Any], Any], named: Any) -> Answer:
        """best: query rows -> maxima (sentences, rows)."""
        found = []
        for b in range(0, len(data.offsets) - 1, _CHUNK):
            end = min(b + _CHUNK, len(data.offsets) - 1)
            rows = slice(data.offsets[b], data.offsets[end])
            # index_add_ was three times as fast as a product with a matrix of weights
            scores = torch.zeros(len(filled), end - b, device=device)
            scores.index_add_(1, owner[rows] - b, best(queries[rows]).mul_(shares[rows]))
            found.append(scores.T.topk(min(k, len(filled)), dim=1))
        return to_host(torch.cat([named[i] for _, i in found]), torch.cat([s for s, _ in found]))  # type: ignore[return-value]

    def segments(rows: Any) -> Any:
        return torch.segment_reduce(vectors @ rows.T, "max", lengths=counts, axis=0)

    def bucketed(rows: Any, by_length: Mapping[int, Any]) -> Any:
        rows = rows.to(next(iter(by_length.values())).dtype)
        return torch.cat(
            [(panel @ rows.T).view(-1, n, len(rows)).amax(dim=1).float() for n, panel in by_length.items()]
        )

    # bf16 has 8 bits: a product of two unit vectors is off by 2^-8 at most, and results are rounded once more.
    return [
        ("torch fp32 matmul + segment_reduce + topk", SENTENCES, lambda: chunks(segments, names), 5e-6, "fp32"),
        ("torch fp32 bucketed by length", SENTENCES,
         lambda: chunks(lambda r: bucketed(r, panels), names[order]), 5e-6, "fp32"),
        ("torch bf16 bucketed by length", ROUNDED,
         lambda: chunks(lambda r: bucketed(r, halves), names[order]), 1e-2, "bf16"),
    ]  # fmt: skip


def torch_sides(data: SpanInput, k: int, expected: Answer) -> list[Side]:
    """`torch_ways` on the CPU, to be compared with what is expected."""
    # Empty queries score 0 everywhere there; they are left out of the comparison.
    asked = np.flatnonzero(np.diff(data.offsets))
    want = expected[0][asked], expected[1][asked]

    def judge(result: Answer, answers: str, tolerance: float) -> tuple[float, float]:
        share, gap = agreement((result[0][asked], result[1][asked]), want)
        return (share if answers == ROUNDED else agreement_but_ties(data, result, expected, tolerance)), gap

    return [
        Side(name, answers, run, partial(judge, answers=answers, tolerance=tolerance), tolerance, precision)
        for name, answers, run, tolerance, precision in torch_ways(data, k, "cpu")
    ]


def rivals(case: Case, device: str) -> Iterator[Rival]:
    """torch beside named backends, and on a GPU. What bf16 rounds away changes the order: it is not compared there."""
    given = case.inputs
    data = SpanInput("case", given["queries"], given["query_offsets"], given["weights"], given["pool"])
    for name, answers, run, tolerance, precision in torch_ways(data, given["k"], device):
        # Neighbours in the order of a million sentences are some 1e-4 apart, so that float32 swaps a few.
        yield Rival(name, run, tolerance if precision == "fp32" else None, answers, mismatches=1e-2)


def _nearest(data: SpanInput, rows: int, k: int) -> NDArray[np.int64]:
    """The k nearest spans of the first query spans, by numpy."""
    products = data.queries[:rows] @ data.pool.vectors.T
    return np.argsort(-products, axis=1, kind="stable")[:, :k].astype(np.int64)


def _shared(found: NDArray[Any], wanted: NDArray[np.int64]) -> float:
    """Share of equal neighbours. Spans that occur twice make this less than 1 without an error."""
    rows = zip(found[: len(wanted)].tolist(), wanted.tolist(), strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in rows])) if len(wanted) else 1.0


def span_sides(data: SpanInput, k: int) -> list[Side]:
    """Searches for single spans: less than is asked for. usearch answers the first 100 spans."""
    rows = min(100, len(data.queries))
    wanted = _nearest(data, rows, k)
    sides = []
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.IndexFlatIP(data.pool.width)
        index.add(data.pool.vectors)
        sides.append(
            Side("faiss IndexFlatIP on spans", SPANS, lambda: index.search(data.queries, k)[1],
                 lambda r: (_shared(r, wanted), 0.0), 0.0)
        )  # fmt: skip
    if importlib.util.find_spec("usearch"):
        from usearch.index import MetricKind, search  # type: ignore[attr-defined]  # re-exported without saying so

        some = data.queries[:rows]
        sides.append(
            Side("usearch exact on spans", SPANS,
                 lambda: np.asarray(search(data.pool.vectors, some, k, MetricKind.IP, exact=True, threads=1).keys),
                 lambda r: (_shared(r, wanted), 0.0), 0.0, part=rows / len(data.queries))
        )  # fmt: skip
    return sides


def _maxsim(function: str, queries: list[NDArray[Any]], documents: Any) -> list[NDArray[Any]]:
    import maxsim_cpu

    return [getattr(maxsim_cpu, function)(query, documents) for query in queries]


def maxsim_sides(data: SpanInput) -> list[Side]:
    """maxsim-cpu: a query at a time, unweighted, nothing selected; 10 queries. Uniform: 5 spans a sentence."""
    if not importlib.util.find_spec("maxsim_cpu"):
        return []
    some = [data.queries[data.offsets[b] : data.offsets[b + 1]] for b in range(min(10, len(data.offsets) - 1))]
    some = [rows for rows in some if len(rows)]
    share = sum(map(len, some)) / len(data.queries)
    pool, offsets = data.pool.vectors, data.pool.offsets
    documents = [pool[offsets[c] : offsets[c + 1]] for c in np.flatnonzero(np.diff(offsets))]
    uniform = np.ascontiguousarray(pool[: len(pool) // 5 * 5].reshape(-1, 5, data.pool.width))
    starts = offsets[:-1][np.flatnonzero(np.diff(offsets))]

    def judge(result: list[NDArray[Any]], starts: NDArray[np.int64], end: int) -> tuple[float, float]:
        gaps = [
            np.abs(got - np.maximum.reduceat(rows @ pool[:end].T, starts, axis=1).sum(axis=0)).max()
            for got, rows in zip(result, some, strict=True)
        ]
        return 1.0, float(max(gaps))

    every_fifth = np.arange(0, uniform.shape[0] * 5, 5)
    return [
        Side("maxsim-cpu variable lengths", UNWEIGHTED,
             partial(_maxsim, "maxsim_scores_variable", some, documents),
             lambda r: judge(r, starts, len(pool)), 1e-4, part=share, fragile=True),
        Side("maxsim-cpu uniform lengths", UNWEIGHTED, partial(_maxsim, "maxsim_scores", some, uniform),
             lambda r: judge(r, every_fifth, uniform.shape[0] * 5), 1e-4, part=share, fragile=True),
    ]  # fmt: skip


# --- measuring -------------------------------------------------------------------------------------------------------


def _check(side: Side, crashed: str | None = None) -> dict[str, Any]:
    """status, reason, agreement and difference of a side. Exact ones must agree, rounded ones say how far they do."""
    if side.fragile and (ended := crashed or crash(side.run)):
        return {"status": "unavailable", "reason": ended}
    try:
        share, gap = side.judge(side.run())
    except (KernelError, RuntimeError, ValueError, TypeError) as error:
        return {"status": "unavailable", "reason": f"{type(error).__name__}: {error}".partition("\n")[0]}
    facts = {"agreement": round(share, 5), "difference": gap}
    # In float32 a last place or two of the k decides now and then otherwise; ours have no such excuse.
    ours = side.name.startswith("el4ner")
    least = 0.5 if side.answers != SENTENCES else 1.0 if ours else 0.999
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


def rows(
    data: SpanInput, *, k: int, repeats: int, seed: int, facts: Mapping[str, Any], crashed: str | None = None
) -> Iterator[dict[str, Any]]:
    """A row per side: what it answers, agreement, timing, ratio to ours, share of the core's ceiling.

    crashed: how an earlier try ended; fragile sides are left out then, for this reason.
    """
    expected = oracle(data, k)
    sides = our_sides(data, k, expected) + candidate_sides(data, k, expected) + torch_sides(data, k, expected)
    sides += span_sides(data, k) + maxsim_sides(data)
    checks = {side.name: _check(side, crashed) for side in sides}
    timings = _turns([side for side in sides if checks[side.name]["status"] == "ok"], repeats)
    native = available_backends("span_topk")["native"] is None
    certified, peaks = (_certified(data, k), _peaks()) if native else ({}, {})
    ours = next((timings[side.name]["median_s"] for side in sides if side.name in timings), None)
    shape = data.shape | {"k": k}
    for side in sides:
        timing = timings.get(side.name)
        rate = 2e-9 * data.products / timing["median_s"] if timing else None
        peak = peaks.get(side.precision)
        yield {
            "op": "span_topk", "side": side.name, "answers": side.answers, "data": data.name,
            "precision": side.precision,
            "shape": shape, "seed": seed, "part_timed": side.part, **checks[side.name], "timing": timing,
            "times_ours": timing["median_s"] / ours if timing and ours else None, "gops": rate, "peak_gops": peak,
            "share_of_peak": rate / peak if rate and peak else None, **certified.get(side.name, {}), "machine": facts,
            "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
        }  # fmt: skip


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


def measure(*, size: str, repeats: int, seed: int, names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """All rows, from one single-threaded process per input. Real pools need EL4NER_DATA and the embedded encoder."""
    if not names:
        names = ["clustered"] if size == "small" else [*SYNTHETIC, *(REAL if os.environ.get("EL4NER_DATA") else ())]
        names += ["packing"] if size == "full" else []
    env = {**_openblas(), **os.environ, **dict.fromkeys((*THREADS, "EL4NER_THREADS"), "1"), "PYTHONSAFEPATH": "1"}
    for name in names:
        words = ["--data", name, "--size", size, "--repeats", str(repeats), "--seed", str(seed)]
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
    parser.add_argument("--data", choices=[*SYNTHETIC, *REAL, "packing"], default="clustered")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crashed", help="how an earlier try ended: leave out rivals that may crash")
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    if given.data == "packing":
        for row in span_packing.rows(repeats=given.repeats, seed=given.seed, facts=machine()):
            print(json.dumps(row), flush=True)
        return
    sizes = SIZES[given.size]
    if given.data in REAL:
        data = real(given.data, queries=sizes["queries"], sentences=REAL[given.data], seed=given.seed)
    else:
        data = synthetic(given.data, **sizes, seed=given.seed)
    for row in rows(data, k=K, repeats=given.repeats, seed=given.seed, facts=machine(), crashed=given.crashed):
        print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
