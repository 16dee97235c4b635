"""span_topk: the k pool sentences whose spans match a query's spans best (weighted ragged MaxSim with top-k).

    score[b, c] = sum_i w[i] max_(j in c) q[i] . v[j] / sum_i w[i]        i over the spans of query b of weight > 0

With unit vectors the products are cosines. Maxima start at minus infinity, so negative products count as they are.
A sentence without spans is never returned; a query without spans of positive weight gets only padding. Scores are
computed in float64 and rounded to float32; the order is (rounded score descending, id ascending), so two backends
agree unless a float64 score lies within its own rounding (about 1e-15) of a border between two float32 numbers.
Source: EL4NER, demonstration retrieval by span similarity; MaxSim is ColBERT's (arXiv:2004.12832).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from el4ner.errors import KernelError, ShapeError
from el4ner.kernels import _dispatch, _span_native
from el4ner.kernels._dispatch import Array, njit
from el4ner.kernels._span_faiss import SpanIndex
from el4ner.kernels._span_pool import SpanPool, check_pool, largest_norm
from el4ner.kernels._threads import thread_count
from el4ner.kernels.span_topk_triton import span_topk_triton

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int64]
_Doubles = NDArray[np.float64]
TopK = tuple[_Ints, _Floats]
Exclude = Sequence["int | Collection[int] | None"]
Precision = Literal["auto", "fp32", "bf16", "int8"]

MOST_SHARING = 512
"""Spans of a query beyond which vectors that sentences have in common are multiplied each by itself: a block of queries
has as many rows as its longest query at least, and a row's products with these vectors take up to 25 KB."""
MOST_COLUMNS = 60_000
"""D at most on the native backend, as csrc/span_topk.cpp has it."""
LARGEST_PRODUCT = 1e38
"""Lengths of a query span and a pool span multiply to less, so that no score, no sum on its way overflows float32."""

# float32 products held at a time, in numbers (64 MB): query spans x pool spans. Not tuned.
_TILE = 1 << 24


@dataclass(frozen=True, slots=True)
class _Queries:
    """Checked queries: spans of positive weight only; excluded ids as CSR."""

    vectors: _Floats  # (Q, D)
    offsets: _Ints  # (B+1,)
    weights: _Doubles  # (Q,)
    excluded: _Ints  # ids, query by query
    excluded_offsets: _Ints  # (B+1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def skip(self, b: int) -> _Ints:
        """Ids that query b must not get."""
        return self.excluded[self.excluded_offsets[b] : self.excluded_offsets[b + 1]]


def _padding(queries: int, k: int) -> TopK:
    return np.full((queries, k), -1, dtype=np.int64), np.full((queries, k), -np.inf, dtype=np.float32)


def span_topk_ref(queries: _Queries, pool: SpanPool, k: int) -> TopK:
    """One query at a time: all products in float64, maxima by sentence, weights, a full sort."""
    ids, scores = _padding(len(queries), k)
    vectors = pool.vectors.astype(np.float64)
    for b in range(len(queries)):
        spans = slice(queries.offsets[b], queries.offsets[b + 1])
        w = queries.weights[spans]
        if not len(w):
            continue
        products = queries.vectors[spans].astype(np.float64) @ vectors.T  # (q, S)
        total = np.full(pool.sentences, -np.inf, dtype=np.float32)
        for c in range(pool.sentences):
            start, end = pool.offsets[c], pool.offsets[c + 1]
            if end > start:
                total[c] = (w * products[:, start:end].max(axis=1)).sum() / w.sum()
        total[queries.skip(b)] = -np.inf
        order = np.lexsort((np.arange(pool.sentences), -total))[:k]
        order = order[total[order] > -np.inf]
        ids[b, : len(order)], scores[b, : len(order)] = order, total[order]
    return ids, scores


@njit
def _screen(products: _Floats, weights: _Doubles, offsets: _Ints, first: int, out: _Doubles) -> None:
    """Add w[i] * max over each sentence's products to out (N,), for sentences from `first` on.

    products (q, columns) of the spans from offsets[first] on.
    """
    base = offsets[first]
    end = base + products.shape[1]
    for i in range(products.shape[0]):
        c = first
        while c < len(offsets) - 1 and offsets[c + 1] <= end:
            if offsets[c + 1] > offsets[c]:
                top = products[i, offsets[c] - base]
                for j in range(offsets[c] - base + 1, offsets[c + 1] - base):
                    top = max(top, products[i, j])
                out[c] += weights[i] * top
            c += 1


@njit
def _rescore(
    vectors: _Floats, weights: _Doubles, pool: _Floats, offsets: _Ints, candidates: _Ints, out: _Floats
) -> None:
    """Exact scores of some sentences: float64 sums in a fixed order, whatever the batch; rounded once to float32."""
    for n in range(len(candidates)):
        total, weight = 0.0, 0.0
        for i in range(len(weights)):
            top = -np.inf
            for j in range(offsets[candidates[n]], offsets[candidates[n] + 1]):
                dot = 0.0
                for d in range(vectors.shape[1]):
                    dot += np.float64(vectors[i, d]) * np.float64(pool[j, d])
                top = max(top, dot)
            total += weights[i] * top
            weight += weights[i]
        out[n] = total / weight


def _tiles(offsets: _Ints, columns: int) -> list[tuple[int, int]]:
    """Runs of whole sentences with at most `columns` spans each (a longer sentence is a run of its own)."""
    tiles, first = [], 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + columns, side="right")) - 1
        last = max(last, first + 1)
        tiles.append((first, last))
        first = last
    return tiles


def _select(approximate: _Doubles, queries: _Queries, b: int, pool: SpanPool, k: int, error: float) -> TopK:
    """The exact top k of one query from screening scores that are off by at most `error`."""
    spans = slice(queries.offsets[b], queries.offsets[b + 1])
    approximate[np.diff(pool.offsets) == 0] = -np.inf
    approximate[queries.skip(b)] = -np.inf
    border = np.partition(approximate, -k)[-k] if k < len(approximate) else -np.inf
    # Whoever belongs to the true top k is at most 2 errors below the k-th screening score.
    candidates = np.flatnonzero((approximate >= border - 2 * error) & (approximate > -np.inf))
    exact = np.empty(len(candidates), dtype=np.float32)
    _rescore(queries.vectors[spans], queries.weights[spans], pool.vectors, pool.offsets, candidates, exact)
    order = np.lexsort((candidates, -exact))[:k]
    return candidates[order], exact[order]


def span_topk_numba(queries: _Queries, pool: SpanPool, k: int) -> TopK:
    """Screening by float32 matrix products, then exact scores of all that the error bound cannot rule out."""
    ids, scores = _padding(len(queries), k)
    if not k or not pool.sentences or not len(queries.vectors):
        return ids, scores
    # |fl(q.v) - q.v| <= D u / (1 - D u) |q| |v| for any order of summation, u = 2^-24 (Higham, Accuracy and Stability,
    # 3.5); a weighted mean of maxima is off by no more. 1e-12 covers the float64 sums, 1.2e-7 the final rounding.
    bound = pool.width * 2.0**-24 / (1 - pool.width * 2.0**-24) + 1e-12 + 1.2e-7
    # A block of queries whose spans need at most one tile of products with 4,096 or all pool spans.
    columns = min(max(len(pool.vectors), 1), max(4096, _TILE // 256))
    start = 0
    while start < len(queries):
        rows = queries.offsets[start] + max(1, _TILE // columns)
        end = max(start + 1, int(np.searchsorted(queries.offsets, rows, side="right")) - 1)
        end = min(end, start + max(1, _TILE // pool.sentences), len(queries))
        first_row = queries.offsets[start]
        block = queries.vectors[first_row : queries.offsets[end]]
        total = np.zeros((end - start, pool.sentences))
        for first, last in _tiles(pool.offsets, columns):
            products = block @ pool.vectors[pool.offsets[first] : pool.offsets[last]].T  # (rows, columns)
            for b in range(start, end):
                spans = slice(queries.offsets[b], queries.offsets[b + 1])
                rows_b = slice(queries.offsets[b] - first_row, queries.offsets[b + 1] - first_row)
                _screen(products[rows_b], queries.weights[spans], pool.offsets, first, total[b - start])
        for b in range(start, end):
            spans = slice(queries.offsets[b], queries.offsets[b + 1])
            weight = queries.weights[spans].sum()
            if weight > 0:
                error = bound * largest_norm(queries.vectors[spans]) * pool.largest_norm
                best, exact = _select(total[b - start] / weight, queries, b, pool, min(k, pool.sentences), error)
                ids[b, : len(best)], scores[b, : len(best)] = best, exact
        start = end
    return ids, scores


def span_topk_native(
    queries: _Queries, pool: SpanPool, k: int, precision: str = "auto", statistics: dict[str, Any] | None = None
) -> TopK:
    """C++ (csrc/span_topk.hpp): screening with one sentence per SIMD lane, then exact scores within certified bounds.

    statistics: takes what screened and how many queries, candidates and exact scores there were.
    """
    from el4ner import _native

    if pool.width > MOST_COLUMNS:  # sums of bytes stay below 2^31
        raise KernelError(
            f"span_topk: backend='native' takes up to {MOST_COLUMNS} columns, not {pool.width}; backend='numba' more"
        )
    ids, scores = _padding(len(queries), k)
    chosen, isa = _span_native.choose_path(precision)
    threads = thread_count()
    longest = int(np.diff(queries.offsets).max(initial=0))
    packed = pool.packed(chosen, threads, isa, share=longest <= MOST_SHARING)
    done = _native.span_topk_search(
        packed, pool.vectors, pool.offsets, pool.largest_norm, queries.vectors, queries.offsets, queries.weights,
        queries.excluded, queries.excluded_offsets, isa, threads, ids, scores,
    )  # fmt: skip
    if statistics is not None:
        statistics.update(done, precision=chosen, isa=isa, threads=threads)
    return ids, scores


def _among(queries: _Queries, index: SpanIndex, k: int, native: bool) -> TopK:
    """The exact best k of the sentences that an index proposes; queries for which it proposes too few are padded."""
    proposed, begins = index.propose(queries.vectors, queries.offsets, queries.weights, k)
    ids, scores = _padding(len(queries), k)
    pool = index.pool
    if native:
        from el4ner import _native

        _native.span_topk_choose(
            pool.vectors, pool.offsets, pool.largest_norm, queries.vectors, queries.offsets, queries.weights,
            queries.excluded, queries.excluded_offsets, proposed, begins, _span_native.choose_path("fp32")[1],
            thread_count(), ids, scores,
        )  # fmt: skip
        return ids, scores
    for b in range(len(queries)):
        candidates = np.setdiff1d(proposed[begins[b] : begins[b + 1]], queries.skip(b))
        spans = slice(queries.offsets[b], queries.offsets[b + 1])
        exact = np.empty(len(candidates), dtype=np.float32)
        _rescore(queries.vectors[spans], queries.weights[spans], pool.vectors, pool.offsets, candidates, exact)
        order = np.lexsort((candidates, -exact))[:k]
        ids[b, : len(order)], scores[b, : len(order)] = candidates[order], exact[order]
    return ids, scores


_dispatch.register(
    "span_topk", ref=span_topk_ref, numba=span_topk_numba, native=span_topk_native, triton=span_topk_triton
)


def _excluded(exclude: Exclude | None, queries: int, sentences: int) -> tuple[_Ints, _Ints]:
    """exclude as CSR: ids and (B+1,) offsets."""
    lists: list[list[int]] = [[] for _ in range(queries)]
    if exclude is not None:
        if not hasattr(exclude, "__len__") or isinstance(exclude, str | bytes | Mapping | Set):
            raise ShapeError(f"exclude is a {type(exclude).__name__}; give a sequence with an entry for each query")
        if len(exclude) != queries:
            raise ShapeError(f"exclude has {len(exclude)} entries with {queries} queries; give one for each, or None")
        lists = [[] if entry is None else sorted(_pool_ids(entry)) for entry in exclude]
    ids = [i for entry in lists for i in entry]
    if ids and (min(ids) < 0 or max(ids) >= sentences):
        raise ShapeError(f"exclude holds {min(ids)}..{max(ids)}; allowed: pool ids 0 to {sentences - 1}")
    return np.array(ids, dtype=np.int64), np.cumsum([0, *map(len, lists)], dtype=np.int64)


def _pool_ids(entry: Any) -> list[int]:
    """The ids that one entry of exclude holds: it is one, or a collection of some."""
    try:
        if isinstance(entry, int | np.integer) or getattr(entry, "ndim", None) == 0:
            entry = [entry]
        if any(isinstance(i, bool) for i in entry):
            raise TypeError  # a mask over the pool would be taken for the ids 0 and 1
        return [operator.index(i) for i in entry]
    except TypeError:
        raise ShapeError(f"exclude holds {entry!r}; allowed: a pool id, a collection of some, or None") from None


def _checked(queries: Array, query_offsets: Array, weights: Array, pool: SpanPool, exclude: Exclude | None) -> _Queries:
    """The queries as arrays, spans of weight 0 left out. Raises ShapeError as `span_topk` says."""
    vectors = _dispatch.to_numpy("queries", queries, 2, np.float32)
    offsets = _dispatch.to_numpy("query_offsets", query_offsets, 1, np.int64)
    weights_ = _dispatch.to_numpy("weights", weights, 1, np.float64)
    if vectors.shape[1] != pool.width:
        raise ShapeError(f"queries have {vectors.shape[1]} columns, the pool {pool.width}; use one encoder for both")
    if len(weights_) != len(vectors):
        raise ShapeError(f"weights has {len(weights_)} entries for {len(vectors)} query spans; give one for each")
    _dispatch.check_offsets("query_offsets", offsets, len(vectors))
    norm = largest_norm(vectors)
    if not np.isfinite(norm):
        _dispatch.check_finite("queries", vectors)
    if not norm * pool.largest_norm < LARGEST_PRODUCT:
        raise ShapeError(
            f"vectors of length {norm:.3g} and {pool.largest_norm:.3g}: their product must be below "
            f"{LARGEST_PRODUCT:.0e}, for float32; unit vectors give cosines"
        )
    _dispatch.check_weights("weights", weights_, 1e-100, 1e100)
    ids, ids_offsets = _excluded(exclude, len(offsets) - 1, pool.sentences)
    used = weights_ > 0  # a span of weight 0 has no say
    kept = np.concatenate([[0], np.cumsum(used)])[offsets].astype(np.int64)
    if not used.all():  # else no copy
        vectors, weights_ = vectors[used], weights_[used]
    return _Queries(vectors, kept, weights_, ids, ids_offsets)


def span_topk(
    queries: Array,
    query_offsets: Array,
    weights: Array,
    pool: SpanPool,
    k: int,
    *,
    exclude: Exclude | None = None,
    backend: str = "auto",
    precision: Precision = "auto",
    candidates: SpanIndex | None = None,
) -> TopK:
    """The k pool sentences whose spans match a query's spans best (the formula is at the top of this file).

    queries (Q, D) f32, query_offsets (B+1,) i64, weights (Q,) f32 >= 0; exclude: for each query a pool id, several,
    or None (its own sentence, say). precision: what screens candidates on the native backend; answers are exact with
    each, and "auto" is the fastest. kernels/_span_native.py explains `EL4NER_ISA`, kernels/_threads.py EL4NER_THREADS.
    candidates: None searches the whole pool, exactly, and that is fast up to some 200,000 spans. A `SpanIndex` of this
    pool makes the search approximate: what FAISS proposes is scored, exactly; `span_recall` measures what is lost.
    Returns ids (B, k) i64 and scores (B, k) f32, best first, padded with -1 and -inf.
    Raises ShapeError (a ValueError) on shapes that do not fit, NaN, infinity, vectors so long that scores could pass
    float32, negative weights (or positive ones beyond 1e-100 to 1e100) or k; KernelError if the backend cannot run: the
    native one takes up to 60,000 columns.

    >>> pool = SpanPool.pack(np.eye(2, dtype=np.float32), np.array([0, 1, 2]))
    >>> span_topk(np.array([[0.6, 0.8]]), np.array([0, 1]), np.ones(1), pool, 1)[0].tolist()
    [[1]]
    """
    run = _dispatch.choose("span_topk", backend, "cpu")
    if precision not in ("auto", *_span_native.PRECISIONS):
        raise ShapeError(f"precision={precision!r}; allowed: auto, {', '.join(_span_native.PRECISIONS)}")
    check_pool(pool)
    k = _dispatch.to_index("k", k)
    if k < 0:
        raise ShapeError(f"k={k}; it must be 0 or more")
    checked = _checked(queries, query_offsets, weights, pool, exclude)
    if candidates is not None:
        if getattr(candidates, "pool", None) is not pool:  # an array, say, has none
            raise ShapeError("candidates is an index of another pool; build one with SpanIndex.build(pool)")
        return _among(checked, candidates, k, run is span_topk_native)
    # Only the native backend screens in more than one precision; the answer is the same.
    result: TopK = run(checked, pool, k, precision) if run is span_topk_native else run(checked, pool, k)
    return result


def span_recall(
    queries: Array,
    query_offsets: Array,
    weights: Array,
    candidates: SpanIndex,
    k: int,
    *,
    exclude: Exclude | None = None,
) -> float:
    """Share of the true k best sentences that an approximate search finds, over all queries; 1 if there are none.

    Arguments and errors as for `span_topk`. It searches the whole pool too, so give it a sample of queries.
    """
    if not isinstance(candidates, SpanIndex):
        raise ShapeError(f"candidates is a {type(candidates).__name__}; build one with SpanIndex.build(pool)")
    pool = candidates.pool
    exact, _ = span_topk(queries, query_offsets, weights, pool, k, exclude=exclude)
    found, _ = span_topk(queries, query_offsets, weights, pool, k, exclude=exclude, candidates=candidates)
    wanted = [set(row[row >= 0].tolist()) for row in exact]
    hits = sum(len(own & set(row.tolist())) for own, row in zip(wanted, found, strict=True))
    return hits / max(sum(map(len, wanted)), 1) if any(wanted) else 1.0
