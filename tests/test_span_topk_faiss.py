"""Candidates from FAISS: exact scores, measured recall, and an explicit choice."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest

from el4ner.errors import KernelError, ShapeError
from el4ner.kernels import SpanIndex, SpanPool, _span_faiss, available_backends, span_recall, span_topk

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="faiss is not installed (el4ner[cpu])"
)
BACKENDS = [name for name, reason in available_backends("span_topk").items() if reason is None]


def a_case(sentences: int = 400, width: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray, SpanPool]:
    """Spans around 40 centres, empty sentences and an empty query among them."""
    random = np.random.default_rng(sentences)
    offsets = np.concatenate([[0], np.cumsum(random.integers(0, 6, sentences))]).astype(np.int64)
    query_offsets = np.array([0, 3, 3, 7, 12], dtype=np.int64)
    centres = random.normal(size=(40, width))

    def vectors(count: int) -> np.ndarray:
        out = centres[random.integers(0, 40, count)] + 0.3 * random.normal(size=(count, width))
        return (out / np.linalg.norm(out, axis=1, keepdims=True)).astype(np.float32)

    return (
        vectors(12),
        query_offsets,
        random.choice([1.0, 2.0, 4.0], 12),
        SpanPool.pack(vectors(int(offsets[-1])), offsets),
    )


@needs_faiss
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_index_that_probes_everything_is_exact(backend: str) -> None:
    queries, offsets, weights, pool = a_case(40)
    index = SpanIndex.build(pool, cells=3, probes=3)
    exclude: list[Any] = [None, 3, [1, 2], [30]]
    # 256 neighbours of each span are more than the pool has
    found = span_topk(queries, offsets, weights, pool, 9, exclude=exclude, candidates=index, backend=backend)
    expected = span_topk(queries, offsets, weights, pool, 9, exclude=exclude, backend="ref")
    assert np.array_equal(found[0], expected[0])
    assert np.allclose(found[1], expected[1], rtol=1.2e-7, atol=1e-15)
    assert span_recall(queries, offsets, weights, index, 9, exclude=exclude) == 1.0


@needs_faiss
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_found_is_scored_exactly_and_recall_says_what_is_missed(backend: str) -> None:
    queries, offsets, weights, pool = a_case(3000)
    index = SpanIndex.build(pool, cells=190, probes=1)  # 40 spans, where a centre has 190
    ids, scores = span_topk(queries, offsets, weights, pool, 20, candidates=index, backend=backend)
    all_ids, all_scores = span_topk(queries, offsets, weights, pool, pool.sentences, backend="ref")
    for b in range(4):
        true = dict(zip(all_ids[b].tolist(), all_scores[b].tolist(), strict=True))
        got = [(c, s) for c, s in zip(ids[b].tolist(), scores[b].tolist(), strict=True) if c >= 0]
        assert [true[c] for c, _ in got] == pytest.approx([s for _, s in got], rel=1.2e-7)
        assert got == sorted(got, key=lambda pair: (-pair[1], pair[0]))
    recall = span_recall(queries, offsets, weights, index, 20)
    hits = sum(len(set(ids[b].tolist()) & set(all_ids[b, :20].tolist()) - {-1}) for b in range(4))
    assert recall == pytest.approx(hits / 60)  # three queries ask for anything
    assert 0.1 < recall < 1.0


@needs_faiss
def test_more_probes_find_no_less() -> None:
    queries, offsets, weights, pool = a_case(3000)
    recalls = [
        span_recall(queries, offsets, weights, SpanIndex.build(pool, cells=190, probes=probes), 20)
        for probes in (1, 8, 190)
    ]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1] == 1.0


@needs_faiss
def test_by_default_nearly_all_is_found() -> None:
    queries, offsets, weights, pool = a_case(3000)
    assert span_recall(queries, offsets, weights, SpanIndex.build(pool), 20) >= 0.99


def test_the_shortlist_is_the_best_estimates() -> None:
    """Against the formula written with dictionaries; values are multiples of 1/8, so that sums are exact and tie."""
    random = np.random.default_rng(3)
    owners = np.sort(random.integers(0, 50, 120)).astype(np.int32)
    found = np.stack([random.permutation(120)[:30] for _ in range(12)]).astype(np.int64)
    found[5, 20:] = found[6, :] = -1  # what faiss says where it knows no more
    products = -np.sort(-random.integers(-8, 8, (12, 30)) / 8, axis=1).astype(np.float32)
    begins, weights = np.array([0, 4, 4, 6, 7, 12]), random.choice([1.0, 2.0, 4.0], 12)
    for most in (1, 5, 20, 50):
        ids, ends = _span_faiss._shortlist(found, products, begins, weights, owners, 50, most)
        for b in range(5):
            own = ids[ends[b] : ends[b + 1]].tolist()
            estimates: dict[int, float] = {}
            for i in range(begins[b], begins[b + 1]):
                known = [(owners[s], p) for s, p in zip(found[i], products[i], strict=True) if s >= 0]
                best: dict[int, float] = {}
                for c, p in known:
                    best[int(c)] = max(best.get(int(c), -9.0), float(p))
                for c, p in best.items():
                    estimates[c] = estimates.get(c, 0.0) + weights[i] * (p - float(known[-1][1]))
            assert own == sorted(set(own) & set(estimates))
            assert len(own) == min(most, len(estimates))
            left = [value for c, value in estimates.items() if c not in own]
            assert not left or min(estimates[c] for c in own) >= max(left)


@needs_faiss
def test_queries_in_small_blocks_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, offsets, weights, pool = a_case(3000)
    index = SpanIndex.build(pool)
    offsets = np.array([0, 0, 3, 3, 7, 12, 12])  # empty queries at both ends
    expected = index.propose(queries, offsets, weights, 5)
    monkeypatch.setattr(_span_faiss, "_NEIGHBOURS", 1)  # a query at a time
    got = index.propose(queries, offsets, weights, 5)
    assert [array.tolist() for array in got] == [array.tolist() for array in expected]
    assert np.diff(got[1]).tolist()[::5] == [0, 0]
    assert got[1][-1] == len(got[0])


@needs_faiss
def test_wrong_uses_are_refused() -> None:
    queries, offsets, weights, pool = a_case(40)
    index = SpanIndex.build(pool)
    with pytest.raises(ShapeError, match="index of another pool"):
        span_topk(queries, offsets, weights, a_case(41)[3], 3, candidates=index)
    with pytest.raises(ShapeError, match="no spans"):
        SpanIndex.build(SpanPool.pack(np.zeros((0, 4)), np.array([0, 0])))
    with pytest.raises(ShapeError, match="probes=9"):
        SpanIndex.build(pool, cells=4, probes=9)
    empty = span_topk(np.zeros((0, 24)), np.array([0, 0]), np.zeros(0), pool, 3, candidates=index)
    assert empty[0].tolist() == [[-1, -1, -1]]
    assert span_recall(np.zeros((0, 24)), np.array([0, 0]), np.zeros(0), index, 3) == 1.0


def test_a_pool_of_width_zero_and_other_things_are_refused() -> None:
    with pytest.raises(ShapeError, match="3 spans are 0 numbers wide"):  # FAISS would end the process
        SpanIndex.build(SpanPool.pack(np.zeros((3, 0)), np.array([0, 3])))
    pool = SpanPool.pack(np.eye(4), np.array([0, 2, 4]))
    for wrong in ({"cells": 2.0}, {"cells": 2, "probes": 1.0}):
        with pytest.raises(ShapeError, match="a whole number is needed"):
            SpanIndex.build(pool, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"pool is a ndarray; make one with SpanPool\.pack"):
        SpanIndex.build(np.eye(4))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="candidates is a ndarray"):
        span_recall(np.eye(4), np.array([0, 4]), np.ones(4), np.eye(4), 1)  # type: ignore[arg-type]


def test_without_faiss_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(KernelError, match=r"install el4ner\[cpu\] or el4ner\[gpu\]"):
        SpanIndex.build(a_case(40)[3])
