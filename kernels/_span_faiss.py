"""SpanIndex: FAISS proposes sentences of a large pool, span_topk then scores those exactly.

The exact search reads every span of the pool for every query span; its time grows with both. Past about 200,000 spans
an index that reads a small part of the pool is faster, at the price of sentences it overlooks: scores of what is
returned are exact, but a better sentence may be missing. Whoever accepts that passes an index to `span_topk`; nothing
chooses it on its own. `span_recall` measures the price.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.errors import KernelError, ShapeError
from el4ner.kernels._dispatch import to_index
from el4ner.kernels._span_pool import Floats, Ints, SpanPool, check_pool

LARGE = 200_000
"""Spans from which an index is worth its training; a recommendation, not a switch."""

_SAMPLE = 64  # spans for each cell that training sees; FAISS asks for at least 39


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise KernelError(
            f"candidates from FAISS need the module faiss ({error}); install el4ner[cpu] or el4ner[gpu]"
        ) from None
    return faiss


@dataclass(frozen=True, slots=True, eq=False)
class SpanIndex:
    """An inverted index over the spans of one pool, 8 bits a number (a quarter of the pool's memory). Use `build`.

    cells: how many lists the spans are divided into; probes: how many of them a query span looks into.
    """

    pool: SpanPool
    index: Any
    cells: int
    probes: int
    on_gpu: bool

    @classmethod
    def build(cls, pool: SpanPool, *, cells: int | None = None, probes: int | None = None, seed: int = 0) -> SpanIndex:
        """Train and fill an index; on the GPU where the installed faiss has one.

        cells: by default twice the square root of the number of spans. probes: by default a sixteenth of the cells.
        Raises KernelError without faiss, ShapeError for a pool without spans, of width 0, or numbers out of range.
        """
        check_pool(pool)
        spans = len(pool.vectors)
        if not spans:
            raise ShapeError("the pool has no spans; an index needs at least one")
        if not pool.width:  # FAISS divides by it and ends the process
            raise ShapeError(f"the pool's {spans} spans are 0 numbers wide; an index needs vectors")
        cells = max(1, min(round(2 * spans**0.5), spans // 39 or 1)) if cells is None else cells
        cells = to_index("cells", cells)
        probes = max(1, cells // 16) if probes is None else to_index("probes", probes)
        if not 1 <= probes <= cells <= spans:
            raise ShapeError(f"cells={cells}, probes={probes}; allowed: 1 <= probes <= cells <= {spans} spans")
        faiss = _faiss()
        quantiser = faiss.IndexFlatIP(pool.width)
        kind = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(quantiser, pool.width, cells, kind, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed
        index.cp.min_points_per_centroid = 1  # small pools are for tests; FAISS would warn on stderr
        on_gpu = getattr(faiss, "get_num_gpus", lambda: 0)() > 0
        if on_gpu:
            index = faiss.index_cpu_to_all_gpus(index)
        sample = np.random.default_rng(seed).permutation(spans)[: _SAMPLE * cells]
        index.train(pool.vectors[np.sort(sample)])
        index.add(pool.vectors)
        settings = faiss.GpuParameterSpace() if on_gpu else faiss.ParameterSpace()
        settings.set_index_parameter(index, "nprobe", probes)
        return cls(pool, index, cells, probes, on_gpu)

    def propose(self, queries: Floats, offsets: Ints, per_span: int) -> tuple[Ints, Ints]:
        """Sentences that hold one of the nearest spans of a query span: ids, sorted within a query, and (B+1,) offsets.

        queries (Q, D) f32, offsets (B+1,) i64; per_span: neighbours of each query span (2,048 at most on a GPU).
        """
        count = len(offsets) - 1
        if not len(queries):
            return np.zeros(0, np.int64), np.zeros(count + 1, np.int64)
        per_span = min(per_span, len(self.pool.vectors), 2048)
        _, spans = self.index.search(queries, per_span)  # (Q, per_span), -1 where the probed cells hold no more
        sentences = np.searchsorted(self.pool.offsets, spans, side="right") - 1
        owner = np.repeat(np.arange(count), np.diff(offsets))
        found = spans >= 0
        keys: NDArray[np.int64] = np.unique(
            (owner[:, None] * self.pool.sentences + sentences)[found].astype(np.int64)
        )  # sorted by query, then by id
        begins = np.searchsorted(keys, np.arange(count + 1, dtype=np.int64) * self.pool.sentences)
        return keys % self.pool.sentences, begins.astype(np.int64)
