"""How long a pool takes to be ready for span_topk: the checks of SpanPool.pack and the packed copy that screens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from el4ner.kernels import SpanPool, _span_native, span_topk

SENTENCES = 100_000


def rows(*, repeats: int, seed: int, facts: Mapping[str, Any], sentences: int = SENTENCES) -> Iterator[dict[str, Any]]:
    """A row per screening precision that this CPU has, shaped like those of `rivals_span_topk.rows`; on this thread.

    Each pool is asked for its own sentences first: every one must find itself, else the row is "wrong" and has no time.
    """
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(random.integers(1, 10, sentences))]).astype(np.int64)
    vectors = random.standard_normal((int(offsets[-1]), 384), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    asked = random.choice(sentences, 20, replace=False)
    queries = np.concatenate([vectors[offsets[c] : offsets[c + 1]] for c in asked])
    begins = np.concatenate([[0], np.cumsum(np.diff(offsets)[asked])]).astype(np.int64)
    for precision in dict.fromkeys(p for p, isa in _span_native.supported() if isa != "portable"):
        pool = SpanPool.pack(vectors, offsets)
        ids, _ = span_topk(queries, begins, np.ones(len(queries)), pool, 1, backend="native", precision=precision)  # type: ignore[arg-type]
        found = float(np.mean(ids[:, 0] == asked))
        cpu: list[float] = []
        wall: list[float] = []
        for _ in range(repeats if found == 1.0 else 0):
            began, began_cpu = time.perf_counter(), time.process_time()
            SpanPool.pack(vectors, offsets).packed(precision, 1)
            cpu.append(time.process_time() - began_cpu)
            wall.append(time.perf_counter() - began)
        timing = cpu and {
            "clock": "process CPU time", "median_s": statistics.median(cpu), "min_s": min(cpu), "max_s": max(cpu),
            "wall_median_s": statistics.median(wall), "repeats": repeats,
        }  # fmt: skip
        yield {
            "op": "span_topk", "side": f"el4ner SpanPool.pack and {precision} copy",
            "answers": "a pool ready to search", "data": "packing", "precision": precision,
            "shape": {"sentences": sentences, "pool_spans": len(vectors), "width": vectors.shape[1]}, "seed": seed,
            "part_timed": 1.0, "status": "ok" if timing else "wrong", "agreement": found, "difference": 0.0,
            "reason": None if timing else "sentences do not find themselves", "timing": timing or None,
            "times_ours": None, "gops": None, "peak_gops": None, "share_of_peak": None, "machine": facts,
        }  # fmt: skip
