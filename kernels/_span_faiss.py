"""SpanIndex: FAISS proposes sentences of a large pool, span_topk then scores those exactly.

The exact search reads every span of the pool for every query span; its time grows with both. Past about 200,000 spans
an index that reads a small part of the pool is faster, at the price of sentences it overlooks: scores of what is
returned are exact, but a better sentence may be missing. Whoever accepts that passes an index to `span_topk`; nothing
chooses it on its own. `span_recall` measures the price.

What is proposed: FAISS finds the nearest pool spans of each query span, and a sentence is estimated by

    estimate[b, c] = sum_i w[i] max(nearest products of span i with spans of c, else the least product found for i)

so that a sentence near in several spans comes before one that is near in a single span. Only the best estimates are
scored. The imputed value is that of XTR (arXiv:2304.01982). Numbers of neighbours and sentences: kernels/NOTES.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from el4ner.errors import KernelError, ShapeError
from el4ner.kernels._dispatch import njit, to_index
from el4ner.kernels._span_pool import Floats, Ints, SpanPool, check_pool

Doubles: TypeAlias = NDArray[np.float64]
Sentences: TypeAlias = NDArray[np.int32]

LARGE = 200_000
"""Spans from which an index is worth its training; a recommendation, not a switch."""

_SAMPLE = 64  # spans for each cell that training sees; FAISS asks for at least 39
_CENTROIDS = 16  # of a code of 4 bits, each of which stands for two numbers of a vector
_MOST_ON_GPU = 2048  # neighbours of a query
_NEIGHBOURS = 1 << 21  # held at a time


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise KernelError(
            f"candidates from FAISS need the module faiss ({error}); install el4ner[cpu] or el4ner[gpu]"
        ) from None
    return faiss


@njit
def _shortlist(
    spans: Ints, products: Floats, begins: Ints, weights: Doubles, owners: Sentences, sentences: int, most: int
) -> tuple[Ints, Ints]:
    """The sentences of the highest estimates of each query, sorted by id, and where each query's begin (B+1,).

    spans, products (Q, n): neighbours of each query span, nearest first, -1 where there are no more; owners (S,): the
    sentence of a pool span; most: sentences of a query.
    """
    queries = len(begins) - 1
    out = np.empty(queries * most, np.int64)
    out_begins = np.zeros(queries + 1, np.int64)
    estimates = np.zeros(sentences, np.float32)  # above what is imputed
    seen_by = np.full(sentences, -1, np.int32)  # the last query span that found a sentence
    found = np.empty(sentences, np.int64)
    for b in range(queries):
        count = 0
        for i in range(begins[b], begins[b + 1]):
            n = spans.shape[1]
            while n > 0 and spans[i, n - 1] < 0:
                n -= 1
            for j in range(n):
                sentence = owners[spans[i, j]]
                if seen_by[sentence] == i:
                    continue  # by a nearer span already
                if seen_by[sentence] < begins[b]:  # by an earlier query, if at all
                    estimates[sentence] = 0
                    found[count] = sentence
                    count += 1
                seen_by[sentence] = i
                estimates[sentence] += weights[i] * (products[i, j] - products[i, n - 1])
        used = out_begins[b]
        if count <= most:
            out[used : used + count] = np.sort(found[:count])
            out_begins[b + 1] = used + count
            continue
        least = np.partition(estimates[found[:count]], count - most)[count - most]
        for n in range(count):  # those above first, so that ties do not take their places
            if estimates[found[n]] > least:
                out[used] = found[n]
                used += 1
        for n in range(count):
            if estimates[found[n]] == least and used < out_begins[b] + most:
                out[used] = found[n]
                used += 1
        out[out_begins[b] : used] = np.sort(out[out_begins[b] : used])
        out_begins[b + 1] = used
    return out[: out_begins[queries]].copy(), out_begins


@dataclass(frozen=True, slots=True, eq=False)
class SpanIndex:
    """An inverted index over the spans of one pool. Use `build`.

    On the CPU a vector is a code of 2 bits a number (a fifteenth of the pool's memory, ids included), on a GPU of 8.
    """

    pool: SpanPool
    index: Any
    cells: int
    probes: int
    on_gpu: bool
    owners: Sentences  # (S,): the sentence of each span

    @classmethod
    def build(cls, pool: SpanPool, *, cells: int | None = None, probes: int | None = None, seed: int = 0) -> SpanIndex:
        """Train and fill an index; on the GPU where the installed faiss has one.

        cells: by default half the square root of the number of spans. probes: by default a 32nd of the cells, 8
        at least where there are so many.
        Raises KernelError without faiss, ShapeError for a pool without spans, of width 0, or numbers out of range.
        """
        check_pool(pool)
        spans = len(pool.vectors)
        if not spans:
            raise ShapeError("the pool has no spans; an index needs at least one")
        if not pool.width:  # FAISS divides by it and ends the process
            raise ShapeError(f"the pool's {spans} spans are 0 numbers wide; an index needs vectors")
        cells = max(1, min(round(spans**0.5 / 2), spans // 39 or 1)) if cells is None else cells
        cells = to_index("cells", cells)
        probes = min(cells, max(8, cells // 32)) if probes is None else to_index("probes", probes)
        if not 1 <= probes <= cells <= spans:
            raise ShapeError(f"cells={cells}, probes={probes}; allowed: 1 <= probes <= cells <= {spans} spans")
        faiss = _faiss()
        on_gpu = getattr(faiss, "get_num_gpus", lambda: 0)() > 0
        # Codes of 4 bits are compared in registers, many at a time, but on the CPU only, and need a few spans to train.
        codes = (
            "SQ8" if on_gpu or spans < _CENTROIDS else f"PQ{pool.width // 2 if pool.width % 2 == 0 else pool.width}x4fs"
        )
        index = faiss.index_factory(pool.width, f"IVF{cells},{codes}", faiss.METRIC_INNER_PRODUCT)
        for clustering in (index.cp, *((index.pq.cp,) if codes != "SQ8" else ())):
            clustering.seed = seed
            clustering.min_points_per_centroid = 1  # small pools are for tests; FAISS would warn on stderr
        if on_gpu:
            index = faiss.index_cpu_to_all_gpus(index)
        sample = np.random.default_rng(seed).permutation(spans)[: _SAMPLE * max(cells, _CENTROIDS)]
        index.train(pool.vectors[np.sort(sample)])
        index.add(pool.vectors)
        settings = faiss.GpuParameterSpace() if on_gpu else faiss.ParameterSpace()
        settings.set_index_parameter(index, "nprobe", probes)
        owners = np.repeat(np.arange(pool.sentences, dtype=np.int32), np.diff(pool.offsets))
        return cls(pool, index, cells, probes, on_gpu, owners)

    def propose(self, queries: Floats, offsets: Ints, weights: Doubles, k: int) -> tuple[Ints, Ints]:
        """Sentences that may be among the best k: ids, sorted within a query, and (B+1,) offsets.

        queries (Q, D) f32, offsets (B+1,) i64, weights (Q,) f64 > 0. A query span has 4 sqrt(S) neighbours in a pool of
        S spans, 256 at least (2,048 at most on a GPU); a query gets 15 k sentences, 300 at least.
        """
        spans, sentences = len(self.pool.vectors), self.pool.sentences
        nearest = min(max(256, round(4 * spans**0.5)), spans, _MOST_ON_GPU if self.on_gpu else spans)
        most = min(max(300, 15 * k), sentences)
        parts: list[Ints] = []
        begins = np.zeros(len(offsets), np.int64)
        first = 0
        while first < len(offsets) - 1:  # queries whose neighbours take some 25 MB
            rows = offsets[first] + max(1, _NEIGHBOURS // nearest)
            last = max(first + 1, int(np.searchsorted(offsets, rows, side="right")) - 1)
            span = slice(offsets[first], offsets[last])
            ids = np.zeros(0, np.int64)
            if span.stop > span.start:
                products, found = self.index.search(queries[span], nearest)
                own = offsets[first : last + 1] - offsets[first]
                ids, ends = _shortlist(found, products, own, weights[span], self.owners, sentences, most)
                begins[first : last + 1] = begins[first] + ends
            else:
                begins[last] = begins[first]
            parts.append(ids)
            first = last
        return np.concatenate([np.zeros(0, np.int64), *parts]), begins
