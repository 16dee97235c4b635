"""What span_topk's definition gives, for comparisons: the best sentences in float64, and how far an answer agrees."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from el4ner.bench.span_pools import SpanInput

Answer: TypeAlias = tuple[NDArray[Any], NDArray[Any]]


def _totals(data: SpanInput, b: int, filled: NDArray[np.int64], vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Scores of the sentences that have spans for query b, which has spans too."""
    rows = slice(data.offsets[b], data.offsets[b + 1])
    w = data.weights[rows]
    best = np.maximum.reduceat(data.queries[rows].astype(np.float64) @ vectors.T, data.pool.offsets[filled], axis=1)
    total: NDArray[np.float32] = (w @ best / w.sum()).astype(np.float32)
    return total


def oracle(data: SpanInput, k: int) -> Answer:
    """ids (B, k) and scores (B, k) f32 by the definition in float64, best first, ties by id; padded with -1, -inf."""
    filled = np.flatnonzero(np.diff(data.pool.offsets))
    vectors = data.pool.vectors.astype(np.float64)
    count = len(data.offsets) - 1
    ids, scores = np.full((count, k), -1), np.full((count, k), -np.inf, dtype=np.float32)
    for b in range(count):
        if data.offsets[b] == data.offsets[b + 1] or not len(filled):
            continue
        total = _totals(data, b, filled, vectors)
        order = np.lexsort((filled, -total))[:k]
        ids[b, : len(order)], scores[b, : len(order)] = filled[order], total[order]
    return ids, scores


def agreement(result: Answer, expected: Answer) -> tuple[float, float]:
    """Share of the expected ids that came, and the largest difference of scores at the same rank."""
    got, want = np.asarray(result[0]), expected[0]
    hits = sum(len(set(a[a >= 0].tolist()) & set(b[b >= 0].tolist())) for a, b in zip(got, want, strict=True))
    there = want >= 0
    gap = np.abs(np.asarray(result[1], dtype=np.float64)[there] - expected[1][there].astype(np.float64))
    return hits / max(int(there.sum()), 1), float(gap.max(initial=0.0))


def agreement_but_ties(data: SpanInput, result: Answer, expected: Answer, tolerance: float) -> float:
    """As `agreement`'s share, where a sentence counts too whose true score is the k-th but for a tolerance.

    Real pools repeat texts: their sentences tie, and float32 orders them by its rounding.
    """
    filled = np.flatnonzero(np.diff(data.pool.offsets))
    vectors = data.pool.vectors.astype(np.float64)
    hits = wanted = 0
    for b in np.flatnonzero(np.diff(data.offsets)).tolist():
        got, want = ({i for i in found[0][b].tolist() if i >= 0} for found in (result, expected))
        wanted += len(want)
        hits += len(got & want)
        if got - want:
            total = dict(zip(filled.tolist(), _totals(data, b, filled, vectors).tolist(), strict=True))
            least = float(expected[1][b][len(want) - 1]) - tolerance
            hits += min(sum(total.get(i, -np.inf) >= least for i in got - want), len(want - got))
    return hits / max(wanted, 1)
