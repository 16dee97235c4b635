"""Ways to answer what span_topk answers: ours, torch's, and libraries that answer less. Nothing is timed here.

A side that answers less says what: a ratio against it is a ratio against less work.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.bench.rivals import to_host
from el4ner.bench.span_oracle import Answer, agreement, agreement_but_ties
from el4ner.bench.span_pools import SpanInput
from el4ner.kernels import SpanIndex, _span_native, available_backends, span_topk
from el4ner.kernels._span_faiss import LARGE

# Queries whose products torch holds at a time (60 MB at 50,000 spans): the fastest of 25, 50, 100 and 300.
_CHUNK = 50

SENTENCES = "the k best sentences, weighted, exact"
PROPOSED = "exact scores of what FAISS proposes"
ROUNDED = "the k best sentences, weighted, from rounded numbers"
UNWEIGHTED = "unweighted scores of all sentences"
SPANS = "the k nearest spans of each query span"


@dataclass(frozen=True, slots=True)
class Side:
    """One way to answer. run() does all of it, or the first part of the queries: `part` says which share of the work.

    judge(result) -> (agreement, largest difference of a score), compared with what it claims to answer.
    fragile: its library has been seen to crash, so it is tried in another process first; run can be pickled then.
    facts: what its row says besides.
    """

    name: str
    answers: str
    run: Callable[[], Any]
    judge: Callable[[Any], tuple[float, float]]
    tolerance: float
    precision: str = "fp32"
    part: float = 1.0
    fragile: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it is el4ner's."""
        return self.name.startswith("el4ner")


def exactly(result: Answer, expected: Answer) -> tuple[float, float]:
    """Like `agreement`, but of whole rows in their order: one id off is wrong."""
    same = float(np.mean(np.all(result[0] == expected[0], axis=1))) if len(expected[0]) else 1.0
    return same, agreement(result, expected)[1]


# --- ours ------------------------------------------------------------------------------------------------------------


def our_sides(data: SpanInput, k: int, expected: Answer, picks: NDArray[np.int64] | None = None) -> list[Side]:
    """Every screening precision on every instruction set (the portable loops are for small sizes), then numba.

    picks: the queries that `expected` is of; all by default.
    """

    def judge(result: Answer) -> tuple[float, float]:
        return exactly(result if picks is None else (result[0][picks], result[1][picks]), expected)

    def call(backend: str, precision: str, isa: str) -> Answer:
        os.environ["EL4NER_ISA"] = isa
        return span_topk(
            data.queries, data.offsets, data.weights, data.pool, k, backend=backend, precision=precision,  # type: ignore[arg-type]
        )  # fmt: skip

    paths = [p for p in _span_native.supported() if p[1] != "portable" or data.products < 10**9]
    sides = [
        Side(f"el4ner native {p} {isa}", SENTENCES, lambda p=p, isa=isa: call("native", p, isa),  # type: ignore[misc]
             judge, 1.2e-7, p)
        for p, isa in paths
    ]  # fmt: skip
    if available_backends("span_topk")["numba"] is None:
        sides.append(Side("el4ner numba", SENTENCES, lambda: call("numba", "auto", ""), judge, 1.2e-7))
    return sides


def candidate_sides(data: SpanInput, k: int) -> list[Side]:
    """span_topk with candidates from FAISS, where the pool is large enough for it; training is not in the time.

    Recall is of all queries, against our own exact answer, which other sides check against the definition.
    """
    if len(data.pool.vectors) < LARGE or not importlib.util.find_spec("faiss"):
        return []
    given = (data.queries, data.offsets, data.weights, data.pool, k)
    began = time.process_time()
    index = SpanIndex.build(data.pool)
    index_cpu_s = round(time.process_time() - began, 2)
    facts = {"index_cpu_s": index_cpu_s, "recall_over": f"all {len(data.offsets) - 1} queries"}
    exact = span_topk(*given)

    def judge(result: Answer) -> tuple[float, float]:
        true = [dict(zip(ids.tolist(), scores.tolist(), strict=True)) for ids, scores in zip(*exact, strict=True)]
        gaps = [
            abs(score - true[b][sentence])
            for b, row in enumerate(zip(*result, strict=True))
            for sentence, score in zip(row[0].tolist(), row[1].tolist(), strict=True)
            if sentence >= 0 and sentence in true[b]
        ]
        return agreement(result, exact)[0], max(gaps, default=0.0)

    def run() -> Answer:
        os.environ["EL4NER_ISA"] = ""
        return span_topk(*given, candidates=index)

    name = f"el4ner with FAISS, {index.probes} of {index.cells} cells"
    return [Side(name, PROPOSED, run, judge, 1.2e-7, facts=facts)]


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
        # Below 333 queries of this width faiss 1.15 takes pair after pair: 5 GFLOP/s where OpenBLAS reaches 50 to 70.
        faiss.cvar.distance_compute_blas_threshold = 1
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
