"""span_topk: every backend against the definition, written out here in float64; what it and SpanPool refuse."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest

from el4ner.errors import KernelError, ShapeError
from el4ner.kernels import SpanPool, available_backends, span_topk
from el4ner.kernels._cases import difference

SIZES = (0, 1, 31, 33)
BACKENDS = [name for name, reason in available_backends("span_topk").items() if reason is None]


def ragged(random: np.random.Generator, sentences: int, longest: int = 40) -> np.ndarray:
    """Offsets of sentences with 0 to `longest` spans, empty ones among them."""
    counts = random.integers(0, longest + 1, sentences) * (random.random(sentences) < 0.7)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def topk_oracle(
    queries: np.ndarray, offsets: np.ndarray, weights: np.ndarray, vectors: np.ndarray, pool: np.ndarray, k: int
) -> tuple[list[list[int]], list[list[float]]]:
    """The definition, spelled out with Python's exact sums."""
    ids, scores = [], []
    for b in range(len(offsets) - 1):
        rows = [i for i in range(offsets[b], offsets[b + 1]) if weights[i] > 0]
        found = []
        for c in range(len(pool) - 1):
            if rows and pool[c + 1] > pool[c]:
                best = [
                    max(
                        math.fsum(map(float.__mul__, queries[i].tolist(), vectors[j].tolist()))
                        for j in range(*pool[c : c + 2])
                    )
                    for i in rows
                ]
                total = math.fsum(float(weights[i]) * top for i, top in zip(rows, best, strict=True))
                found.append((-np.float32(total / math.fsum(weights[rows].tolist())), c))
        found = sorted(found)[:k]
        ids.append([c for _, c in found] + [-1] * (k - len(found)))
        scores.append([-float(score) for score, _ in found] + [-math.inf] * (k - len(found)))
    return ids, scores


@pytest.mark.parametrize("backend", [*BACKENDS])
@pytest.mark.parametrize("sentences", SIZES)
@pytest.mark.parametrize("width", [1, 5, 33])
@pytest.mark.parametrize("k", [0, 1, 7, 40])
def test_span_topk_equals_the_definition(backend: str, sentences: int, width: int, k: int) -> None:
    random = np.random.default_rng(sentences * 1000 + width)
    pool_offsets, query_offsets = ragged(random, sentences, 9), ragged(random, 5, 4)
    vectors = random.normal(size=(pool_offsets[-1], width)).astype(np.float32)
    queries = random.normal(size=(query_offsets[-1], width)).astype(np.float32)
    weights = random.choice([0.0, 1.0, 2.0, 4.0], len(queries))
    ids, scores = span_topk(queries, query_offsets, weights, SpanPool.pack(vectors, pool_offsets), k, backend=backend)
    expected_ids, expected_scores = topk_oracle(queries, query_offsets, weights, vectors, pool_offsets, k)
    assert ids.dtype == np.int64
    assert scores.dtype == np.float32
    assert ids.tolist() == expected_ids
    # Two float32 roundings of the same float64 score differ by one unit in the last place at most.
    assert np.allclose(scores, np.array(expected_scores).reshape(5, k), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("backend", [*BACKENDS])
def test_span_topk_negative_products_count(backend: str) -> None:
    """Maxima that started at 0, or zero padding, would give 0 here."""
    pool = SpanPool.pack(np.array([[-1, 0], [0, -1], [-0.6, -0.8]]), np.array([0, 2, 2, 3]))
    ids, scores = span_topk(np.array([[0.6, 0.8]]), np.array([0, 1]), np.ones(1), pool, 3, backend=backend)
    assert ids.tolist() == [[0, 2, -1]]
    assert scores[0, :2].tolist() == pytest.approx([-0.6, -1.0])
    assert scores[0, 2] == -np.inf


@pytest.mark.parametrize("backend", [*BACKENDS])
def test_span_topk_ties_empty_queries_and_exclusions(backend: str) -> None:
    random = np.random.default_rng(3)
    sentence = random.normal(size=(3, 37)).astype(np.float32)
    pool = SpanPool.pack(np.tile(sentence, (50, 1)), np.arange(0, 151, 3))  # fifty times the same sentence
    queries = random.normal(size=(4, 37)).astype(np.float32)
    offsets, weights = np.array([0, 0, 2, 4]), np.array([1.0, 2.0, 0.0, 0.0])
    ids, scores = span_topk(queries, offsets, weights, pool, 4, backend=backend)
    assert ids.tolist() == [[-1] * 4, [0, 1, 2, 3], [-1] * 4]  # no spans; ties by id; weights all 0
    assert not np.isnan(scores).any()
    exclude: list[Any] = [None, [0, 2], 7]
    assert span_topk(queries, offsets, weights, pool, 4, exclude=exclude, backend=backend)[0][1].tolist() == [
        1,
        3,
        4,
        5,
    ]
    everything = [[], range(50), []]
    assert (span_topk(queries, offsets, weights, pool, 4, exclude=everything, backend=backend)[0] == -1).all()


@pytest.mark.parametrize("backend", [*BACKENDS])
def test_span_topk_alone_equals_batch_and_pool_order_does_not_matter(backend: str) -> None:
    random = np.random.default_rng(5)
    offsets, pool_offsets = np.arange(0, 61, 3), np.arange(0, 401, 4)
    queries, vectors = random.normal(size=(60, 24)).astype(np.float32), random.normal(size=(400, 24)).astype(np.float32)
    weights = random.random(60)
    pool = SpanPool.pack(vectors, pool_offsets)
    ids, scores = span_topk(queries, offsets, weights, pool, 5, backend=backend)
    for b in range(20):
        rows = slice(3 * b, 3 * b + 3)
        alone = span_topk(queries[rows], np.array([0, 3]), weights[rows], pool, 5, backend=backend)
        assert alone[0].tolist() == [ids[b].tolist()]
        assert np.allclose(alone[1][0], scores[b], rtol=1.2e-7, atol=0)
    order = random.permutation(100)
    shuffled = SpanPool.pack(vectors.reshape(100, 4, 24)[order].reshape(400, 24), pool_offsets)
    moved, moved_scores = span_topk(queries, offsets, weights, shuffled, 5, backend=backend)
    assert np.array_equal(order[moved], ids)
    assert np.allclose(moved_scores, scores, rtol=1.2e-7, atol=0)


def test_span_topk_takes_strided_half_and_torch_input() -> None:
    import torch

    random = np.random.default_rng(6)
    vectors = random.normal(size=(40, 16)).astype(np.float16)
    pool = SpanPool.pack(np.repeat(vectors, 2, axis=1)[:, ::2], np.arange(0, 41, 4))
    assert np.array_equal(pool.vectors, vectors.astype(np.float32))
    queries = torch.from_numpy(vectors[:4]).to(torch.bfloat16)
    ids, _ = span_topk(queries, torch.tensor([0, 4]), torch.ones(4), pool, 2)
    assert ids[0, 0] == 0


@pytest.mark.parametrize(
    "change", ["width", "weights", "offsets", "nan", "negative", "k", "precision", "exclude", "exclude id"]
)
def test_span_topk_refuses(change: str) -> None:
    pool = SpanPool.pack(np.eye(3), np.array([0, 1, 3]))
    queries, offsets, weights = np.eye(3), np.array([0, 1, 3]), np.ones(3)
    options: dict[str, Any] = {"k": 1}
    if change == "width":
        queries = np.eye(4)[:3]
    elif change == "weights":
        weights = np.ones(2)
    elif change == "offsets":
        offsets = np.array([0, 2, 1, 3])
    elif change == "nan":
        queries[1, 1] = np.nan
    elif change == "negative":
        weights[2] = -1
    else:
        wrong = {"k": ("k", -1), "precision": ("precision", "fp8"), "exclude": ("exclude", [None])}
        name, value = wrong.get(change, ("exclude", [2, None]))
        options[name] = value
    for backend in [*BACKENDS]:
        with pytest.raises(ValueError, match=r"\w"):
            span_topk(queries, offsets, weights, pool, **options, backend=backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 2.0}, "k=2.0; a whole number"),
        ({"k": None}, "k=None; a whole number"),
        ({"pool": np.eye(3)}, r"pool is a ndarray; make one with SpanPool\.pack"),
        ({"candidates": np.eye(3)}, "SpanIndex.build"),
        ({"weights": np.full(3, 1e308)}, "1e-100 to 1e"),
        ({"weights": np.full(3, 5e-324)}, "1e-100 to 1e"),
        ({"queries": np.eye(3) * 3e38}, "must be below 1e"),
        ({"query_offsets": np.array([0, 2**63 - 1, -(2**62), 3])}, "never fall"),  # differences overflow
        ({"query_offsets": np.array([0, 2**64 - 1, 3], dtype=np.uint64)}, "18446744073709551615"),
        ({"exclude": [[0.7], None]}, r"exclude holds \[0.7\]"),
        ({"exclude": ["01", None]}, "exclude holds '01'"),
        ({"exclude": [[True, False], None]}, r"exclude holds \[True, False\]"),  # a mask is no list of ids
        ({"exclude": [np.array([True, False]), None]}, "exclude holds array"),
        ({"exclude": [10**30, None]}, "allowed: pool ids 0 to 1"),
        ({"exclude": {0: 1, 1: 0}}, "exclude is a dict"),
        ({"exclude": 3}, "exclude is a int"),
    ],
)
def test_span_topk_refuses_what_would_be_nonsense(options: dict[str, Any], message: str) -> None:
    pool = SpanPool.pack(np.eye(3), np.array([0, 1, 3]))
    given = {"queries": np.eye(3), "query_offsets": np.array([0, 1, 3]), "weights": np.ones(3), "pool": pool, "k": 1}
    for backend in [*BACKENDS]:
        with pytest.raises(ShapeError, match=message):
            span_topk(**(given | options), backend=backend)


@pytest.mark.parametrize("length", [1e-30, 1e-3, 1e18])
@pytest.mark.parametrize("sizes", [(1e-100, 1e100), (1e-30, 1e30), (1e100,), (1e-100,)])
def test_span_topk_far_weights_and_lengths(length: float, sizes: tuple[float, ...]) -> None:
    random = np.random.default_rng(8)
    pool_offsets = ragged(random, 60, 6)
    pool = SpanPool.pack(random.normal(size=(int(pool_offsets[-1]), 7)) * length, pool_offsets)
    queries, offsets = random.normal(size=(23, 7)) * length, np.array([0, 0, 3, 10, 23])
    weights = random.choice(sizes, 23)
    expected = span_topk(queries, offsets, weights, pool, 7, backend="ref")
    for backend in BACKENDS:
        for got, wanted in zip(span_topk(queries, offsets, weights, pool, 7, backend=backend), expected, strict=True):
            assert np.array_equal(got, wanted)


def test_span_topk_takes_ids_to_exclude_in_every_form() -> None:
    import torch

    pool = SpanPool.pack(np.eye(3), np.array([0, 1, 3]))
    for exclude in (
        [[0, 0, 0], {1}],
        [0, 1],
        np.array([0, 1]),
        torch.tensor([0, 1]),
        [torch.tensor([0]), torch.tensor(1)],
        np.array([[0, 0], [1, 1]]),
    ):
        for backend in [*BACKENDS]:
            ids, _ = span_topk(np.eye(3), np.array([0, 1, 3]), np.ones(3), pool, 2, exclude=exclude, backend=backend)
            assert ids.tolist() == [[1, -1], [0, -1]]


def test_span_topk_native_says_how_wide_it_goes() -> None:
    pool = SpanPool.pack(np.ones((1, 60_001), np.float32), np.array([0, 1]))
    for backend in [*BACKENDS]:
        if backend == "native":
            with pytest.raises(KernelError, match="up to 60000 columns"):
                span_topk(pool.vectors, pool.offsets, np.ones(1), pool, 1, backend=backend)
        elif backend != "triton":
            assert span_topk(pool.vectors, pool.offsets, np.ones(1), pool, 1, backend=backend)[0].tolist() == [[0]]


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], [0, 2**63 - 1, -(2**62), 3], []])
def test_span_pool_refuses_offsets(offsets: list[int]) -> None:
    with pytest.raises(ShapeError, match="offsets"):
        SpanPool.pack(np.eye(3), np.array(offsets, dtype=np.int64))
    with pytest.raises(ShapeError, match="only finite"):
        SpanPool.pack(np.full((1, 2), np.nan), np.array([0, 1]))


def test_span_topk_blocks_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and blocks give the same answer as one large one."""
    from el4ner.kernels import span_topk as module

    source = sys.modules["el4ner.kernels.span_topk"]
    assert module is not source  # the package exports the function of the same name
    random = np.random.default_rng(8)
    pool_offsets, offsets = ragged(random, 300), ragged(random, 30, 5)
    vectors, queries = random.normal(size=(pool_offsets[-1], 8)), random.normal(size=(offsets[-1], 8))
    pool = SpanPool.pack(vectors, pool_offsets)
    whole = span_topk(queries, offsets, np.ones(len(queries)), pool, 10, backend="numba")
    monkeypatch.setattr(source, "_TILE", 600)
    small = span_topk(queries, offsets, np.ones(len(queries)), pool, 10, backend="numba")
    assert difference(small, whole) == 0
    assert [b - a for a, b in source._tiles(np.array([0, 9, 9, 10, 11, 30]), 10)] == [3, 1, 1]
