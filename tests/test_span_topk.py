"""span_topk in depth: every instruction set and precision against the reference, its promises as properties."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from el4ner.errors import KernelError, ShapeError
from el4ner.kernels import SpanPool, available_backends, span_topk
from el4ner.kernels._span_native import ISAS, PRECISIONS, choose_path, supported
from el4ner.kernels._threads import thread_count

# The package exports the function of the same name.
source = importlib.import_module("el4ner.kernels.span_topk")

native = pytest.mark.skipif(available_backends("span_topk")["native"] is not None, reason="no compiler built _native")
PATHS = supported()
NOWHERE = {("bf16", "avx2"), ("fp32", "amx")}  # no such instructions
SIZES = (0, 1, 31, 33)


@pytest.fixture(params=[(p, isa) for isa in ISAS for p in PRECISIONS if (p, isa) not in NOWHERE], ids="-".join)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every precision with every instruction set, forced by the run-time switch; skipped where this CPU lacks it."""
    precision, isa = request.param
    if not PATHS:
        pytest.skip("no compiler built el4ner._native")
    if request.param not in PATHS:
        pytest.skip(f"this CPU (or compiler, or system) has no {isa} for {precision}")
    monkeypatch.setenv("EL4NER_ISA", isa)
    assert choose_path(precision) == (precision, isa)
    return str(precision)


def case(
    seed: int, sentences: int, width: int, *, queries: int = 5, longest: int = 40, unit: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, SpanPool]:
    """Queries, offsets, weights and a pool; empty sentences, empty queries and zero weights among them."""
    random = np.random.default_rng(seed)

    def offsets(count: int, most: int) -> np.ndarray:
        lengths = random.integers(0, most + 1, count) * (random.random(count) < 0.8)
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def vectors(count: int) -> np.ndarray:
        out = random.normal(size=(count, width))
        if unit and count:
            out /= np.linalg.norm(out, axis=1, keepdims=True)
        return out.astype(np.float32)

    query_offsets, pool_offsets = offsets(queries, 6), offsets(sentences, longest)
    pool = SpanPool.pack(vectors(int(pool_offsets[-1])), pool_offsets)
    weights = random.choice([0.0, 0.5, 1.0, 2.0, 4.0], int(query_offsets[-1]))
    return vectors(int(query_offsets[-1])), query_offsets, weights, pool


def assert_same(got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    """Ids equal; scores equal but for one float32 rounding, as two orders of float64 sums may straddle a border."""
    assert np.array_equal(got[0], expected[0])
    assert np.allclose(got[1], expected[1], rtol=1.2e-7, atol=1e-15)


def assert_bits(got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    assert np.array_equal(got[0], expected[0])
    assert np.array_equal(got[1].view(np.int32), expected[1].view(np.int32))


# --- every path equals the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sentences", SIZES)
@pytest.mark.parametrize("width", [1, 3, 4, 17, 31, 33])
def test_paths_equal_the_reference(path: str, sentences: int, width: int) -> None:
    for k in (0, 1, 20, 50):
        queries, offsets, weights, pool = case(sentences * 100 + width, sentences, width)
        expected = span_topk(queries, offsets, weights, pool, k, backend="ref")
        assert_same(span_topk(queries, offsets, weights, pool, k, backend="native", precision=path), expected)


def test_paths_equal_the_reference_at_encoder_width(path: str) -> None:
    """Many candidates: buffers fill and shrink, rows share tiles, groups mix lengths."""
    queries, offsets, weights, pool = case(1, 900, 384, queries=40, longest=9)
    exclude: list[Any] = [None if b % 3 else [b, b + 1, 7] for b in range(40)]
    expected = span_topk(queries, offsets, weights, pool, 20, exclude=exclude, backend="ref")
    got = span_topk(queries, offsets, weights, pool, 20, exclude=exclude, backend="native", precision=path)
    assert_same(got, expected)
    for b, ids in enumerate(got[0].tolist()):
        assert not {b, b + 1, 7} & set(ids) or b % 3


@pytest.mark.parametrize("width", [127, 128, 129, 255, 300])
def test_paths_equal_the_reference_where_numbers_are_spread(path: str, width: int) -> None:
    """The int8 screen turns every 128 numbers; a few that are far larger than the others make its steps coarse."""
    queries, offsets, weights, pool = case(width, 120, width, queries=12, longest=9)
    factors = np.where(np.arange(width) % 50 == 7, np.float32(20), np.float32(1))
    pool = SpanPool.pack(pool.vectors * factors, pool.offsets)
    expected = span_topk(queries * factors, offsets, weights, pool, 20, backend="ref")
    assert_same(span_topk(queries * factors, offsets, weights, pool, 20, backend="native", precision=path), expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e18])
def test_paths_take_any_scale(path: str, scale: float) -> None:
    """Vectors need not have length 1, nor any common length; products would overflow or vanish in float32."""
    queries, offsets, weights, pool = case(2, 300, 21, unit=False)
    sizes = np.random.default_rng(0).choice([1e-3, 1.0, 1e3], (len(pool.vectors), 1))
    scaled = SpanPool.pack((pool.vectors * sizes * scale).astype(np.float32), pool.offsets)
    queries = queries * np.float32(min(scale, 1e15))
    expected = span_topk(queries, offsets, weights, scaled, 9, backend="ref")
    got = span_topk(queries, offsets, weights, scaled, 9, backend="native", precision=path)
    assert np.array_equal(got[0], expected[0])
    assert np.allclose(got[1], expected[1], rtol=3e-7, atol=0)


def test_paths_take_vectors_of_few_large_numbers(path: str) -> None:
    """Sums of bytes in 16 bits would overflow here: all of a vector's length lies in some of 8 neighbouring numbers."""
    random = np.random.default_rng(4)

    def vectors(count: int, sign: float) -> np.ndarray:
        out = random.normal(size=(count, 40)) * 1e-3
        for n, row in enumerate(out):
            base = 8 * random.integers(0, 5)
            few = base + np.array([[0, 1, 4, 5], [2, 3, 6, 7], [0, 1, 2, 3], [4, 6, 5, 7], range(8)][n % 5])
            row[few] = sign * (1 - 0.1 * random.random(len(few)))
        return out.astype(np.float32)

    offsets = np.arange(0, 901, 3)
    for sign in (1.0, -1.0):
        pool = SpanPool.pack(vectors(900, sign), offsets)
        asked = vectors(60, 1.0), np.arange(0, 61, 4), np.ones(60)
        got = span_topk(*asked, pool, 7, backend="native", precision=path)
        assert_same(got, span_topk(*asked, pool, 7, backend="ref"))


def test_paths_count_negative_products(path: str) -> None:
    queries, offsets, weights, pool = case(3, 200, 40)
    positive, away = np.abs(queries), SpanPool.pack(-np.abs(pool.vectors), pool.offsets)
    ids, scores = span_topk(positive, offsets, weights, away, 30, backend="native", precision=path)
    assert (scores[ids >= 0] < 0).all()
    assert_same((ids, scores), span_topk(positive, offsets, weights, away, 30, backend="ref"))


def test_paths_share_spans_that_return(path: str) -> None:
    """Common vectors are multiplied once, in sentences of nothing else too; positions whose lanes are all of these; the
    answers stay."""
    random = np.random.default_rng(6)
    vectors = random.normal(size=(9000, 96)).astype(np.float32)
    common = random.random(9000) < 0.7
    common[:900] = True  # sentences without any span of their own
    vectors[common] = vectors[8000 + random.integers(0, 40, int(common.sum()))]
    offsets = np.concatenate([[0], np.sort(random.integers(0, 9001, 1500)), [9000]])
    pool = SpanPool.pack(vectors, offsets)
    queries = np.concatenate([vectors[:30], random.normal(size=(90, 96)).astype(np.float32)])
    asked = queries, np.arange(0, 121, 4), random.choice([0.0, 1.0, 4.0], 120)
    exclude = [[b, 2 * b + 1] for b in range(30)]
    expected = span_topk(*asked, pool, 25, exclude=exclude, backend="ref")
    for threads in ("1", "3"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EL4NER_THREADS", threads)
            assert_same(span_topk(*asked, pool, 25, exclude=exclude, backend="native", precision=path), expected)
    packed = pool.packed(path, 1)
    assert packed.shared == 40
    long = np.concatenate([queries] * 5), np.array([0, 600]), np.ones(600)
    assert_same(span_topk(*long, pool, 25, backend="native", precision=path), span_topk(*long, pool, 25, backend="ref"))
    assert [made.shared for made in pool._packed.values()] == [40, 0]  # products of so many spans would take memory
    assert len(vectors) - common.sum() < packed.vectors < 0.7 * len(vectors)


def test_paths_break_ties_by_id(path: str) -> None:
    """Far more equal sentences than any buffer holds, spread among worse ones."""
    random = np.random.default_rng(4)
    best, worse = random.normal(size=(3, 24)).astype(np.float32), random.normal(size=(3, 24)).astype(np.float32)
    sentences = np.where(np.arange(2000)[:, None, None] % 2, best, worse)
    pool = SpanPool.pack(sentences.reshape(-1, 24), np.arange(0, 6001, 3))
    ids, scores = span_topk(best, np.array([0, 3]), np.ones(3), pool, 25, backend="native", precision=path)
    assert ids[0].tolist() == list(range(1, 51, 2))
    assert len(set(scores[0].tolist())) == 1
    zeros = SpanPool.pack(np.zeros((900, 24)), np.arange(901))
    for queries in (best, np.zeros((3, 24), np.float32)):
        ids, scores = span_topk(queries, np.array([0, 3]), np.ones(3), zeros, 5, backend="native", precision=path)
        assert (ids.tolist(), scores.tolist()) == ([[0, 1, 2, 3, 4]], [[0.0] * 5])


def test_near_ties_are_ordered_exactly(path: str) -> None:
    """Scores that differ by far less than any screening error."""
    random = np.random.default_rng(5)
    base = random.normal(size=64)
    noise = random.normal(size=(3000, 64)) * 1e-6
    pool = SpanPool.pack((base + noise).astype(np.float32), np.arange(3001))
    query = random.normal(size=(2, 64)).astype(np.float32)
    expected = span_topk(query, np.array([0, 2]), np.ones(2), pool, 40, backend="ref")
    assert_same(span_topk(query, np.array([0, 2]), np.ones(2), pool, 40, backend="native", precision=path), expected)


def test_paths_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact sums have one order, whatever screened and whichever instructions ran."""
    if not PATHS:
        pytest.skip("no compiler built el4ner._native")
    queries, offsets, weights, pool = case(6, 400, 53, queries=20)
    results = []
    for precision, isa in PATHS:
        monkeypatch.setenv("EL4NER_ISA", isa)
        results.append(span_topk(queries, offsets, weights, pool, 12, backend="native", precision=precision))
    for other in results[1:]:
        assert_bits(other, results[0])


def test_sums_of_bytes_are_the_same_on_amx_and_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both screen with the same integers, so every count of what was done afterwards is equal."""
    if not {("int8", "amx"), ("int8", "avx512")} <= set(PATHS):
        pytest.skip("this CPU (or compiler, or system) has no AMX")
    queries, offsets, weights, pool = case(13, 3000, 384, queries=60, longest=9)
    checked = source._Queries(queries, offsets, weights + 1, np.zeros(0, np.int64), np.zeros(61, np.int64))
    found: dict[str, dict[str, Any]] = {"amx": {}, "avx512": {}}
    for isa, done in found.items():
        monkeypatch.setenv("EL4NER_ISA", isa)
        source.span_topk_native(checked, pool, 10, "int8", done)
        assert done.pop("isa") == isa
    assert found["amx"] == found["avx512"]
    assert found["amx"]["candidates"] > found["amx"]["bounded"] > 0


@native
def test_half_precision_and_strided_input(path: str) -> None:
    queries, offsets, weights, pool = case(7, 60, 30)
    halves = pool.vectors.astype(np.float16)
    strided = np.repeat(halves, 2, axis=0)[::2]
    packed = SpanPool.pack(strided, pool.offsets)
    wide = np.asfortranarray(np.repeat(queries.astype(np.float16), 2, axis=1))[:, ::2]
    expected = span_topk(wide.astype(np.float32), offsets, weights, packed, 9, backend="ref")
    assert_same(span_topk(wide, offsets, weights[::1], packed, 9, backend="native", precision=path), expected)


# --- properties ------------------------------------------------------------------------------------------------------

BACKENDS = [name for name, reason in available_backends("span_topk").items() if reason is None]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), sentences=st.integers(0, 70), width=st.integers(1, 40), k=st.integers(0, 30))
def test_permuting_the_pool_permutes_the_ids(backend: str, seed: int, sentences: int, width: int, k: int) -> None:
    queries, offsets, weights, pool = case(seed, sentences, width, queries=3, longest=7)
    order = np.random.default_rng(seed).permutation(sentences)
    parts = [pool.vectors[pool.offsets[c] : pool.offsets[c + 1]] for c in order]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    moved = SpanPool.pack(
        np.concatenate([np.zeros((0, width), np.float32), *parts]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(int),
    )
    ids, scores = span_topk(queries, offsets, weights, pool, k, backend=backend)
    moved_ids, moved_scores = span_topk(queries, offsets, weights, moved, k, backend=backend)
    if backend == "ref":  # BLAS may sum in another order when a row has moved
        assert np.allclose(moved_scores, scores, rtol=1.2e-7, atol=1e-15)
    else:
        assert np.array_equal(moved_scores, scores)
    # Among equal scores the smaller id wins, and ids have changed: compare where scores are unique.
    for b in range(len(ids)):
        for n in range(k):
            if ids[b, n] >= 0 and (scores[b] == scores[b, n]).sum() == 1 and n < k - 1:
                assert order[moved_ids[b, n]] == ids[b, n]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), sentences=st.integers(1, 300), width=st.integers(1, 40), k=st.integers(1, 30))
def test_a_query_alone_equals_the_query_in_a_batch(backend: str, seed: int, sentences: int, width: int, k: int) -> None:
    queries, offsets, weights, pool = case(seed, sentences, width, queries=6, longest=5)
    whole = span_topk(queries, offsets, weights, pool, k, backend=backend)
    for b in range(6):
        rows = slice(offsets[b], offsets[b + 1])
        alone = span_topk(
            queries[rows], np.array([0, offsets[b + 1] - offsets[b]]), weights[rows], pool, k, backend=backend
        )
        one = whole[0][b : b + 1], whole[1][b : b + 1]
        if backend == "ref":  # BLAS sums in another order for another shape
            assert np.allclose(alone[1], one[1], rtol=1.2e-7, atol=1e-15)
        else:
            assert_bits(alone, one)


@native
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), queries=st.integers(1, 60), precision=st.sampled_from(PRECISIONS))
def test_the_number_of_threads_changes_nothing(seed: int, queries: int, precision: Any) -> None:
    """One query on many threads splits the pool, many queries split the batch."""
    vectors, offsets, weights, pool = case(seed, 3000, 48, queries=queries, longest=4)
    exclude = [[b, 2 * b] for b in range(queries)]
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for number in ("1", "2", "7"):
            patch.setenv("EL4NER_THREADS", number)
            results.append(
                span_topk(vectors, offsets, weights, pool, 15, exclude=exclude, backend="native", precision=precision)
            )
    assert_bits(results[1], results[0])
    assert_bits(results[2], results[0])


@native
def test_identical_query_spans_share_a_row_and_count_each() -> None:
    queries, _, _, pool = case(8, 200, 16)
    rows = queries[[0, 0, 1, 0, 1]]
    offsets, weights = np.array([0, 3, 5]), np.array([1.0, 2.0, 4.0, 1.0, 0.5])
    expected = span_topk(rows, offsets, weights, pool, 9, backend="ref")
    assert_same(span_topk(rows, offsets, weights, pool, 9, backend="native"), expected)


# --- what a caller may see -------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("spans", [1, 3])
def test_more_queries_than_are_regrouped_at_a_time(path: str, spans: int) -> None:
    """Blocks are made of 1,024 queries, or so many spans, at a time; answers stand where their queries do."""
    queries, _, _, pool = case(19, 40, 8, queries=40, longest=5)
    picks = np.random.default_rng(3).integers(0, len(queries), 2500 * spans)
    offsets, weights = np.arange(0, len(picks) + 1, spans), np.ones(len(picks))
    expected = span_topk(queries[picks], offsets, weights, pool, 4, backend="ref")
    assert_same(span_topk(queries[picks], offsets, weights, pool, 4, backend="native", precision=path), expected)


@native
def test_large_numbers_among_small_ones_cost_few_exact_scores() -> None:
    """Encoders have components that are always large. Spread over eight, they loosen the screen little."""
    queries, offsets, weights, pool = case(11, 1500, 256, queries=30, longest=6)
    factors = np.where(np.arange(256) % 100 == 7, np.float32(6), np.float32(1))
    bounded = {}
    for name, scale in (("even", np.float32(1)), ("uneven", factors)):
        scaled, done = SpanPool.pack(pool.vectors * scale, pool.offsets), {}
        checked = source._Queries(queries * scale, offsets, weights + 1, np.zeros(0, np.int64), np.zeros(31, np.int64))
        source.span_topk_native(checked, scaled, 10, "int8", done)
        bounded[name] = done["bounded"]
    assert 0 < bounded["uneven"] < 0.8 * bounded["even"]  # 1.13 times as many if they were not spread


@native
def test_statistics_say_what_was_certified() -> None:
    queries, offsets, weights, pool = case(9, 500, 64, queries=30)
    checked = source._Queries(queries, offsets, weights + 1, np.zeros(0, np.int64), np.zeros(31, np.int64))
    found: dict[str, Any] = {}
    source.span_topk_native(checked, pool, 10, "int8", found)
    assert found["queries"] == 30
    assert 0 < found["certified"] <= 30
    assert found["candidates"] >= found["rescored"] > 0
    assert found["precision"] == "int8"


@native
def test_memory_of_packed_copies() -> None:
    """Lanes of mixed length waste little: 5% here, at 2,000 sentences of 1 to 9 spans."""
    random = np.random.default_rng(10)
    offsets = np.concatenate([[0], np.cumsum(random.integers(1, 10, 2000))])
    pool = SpanPool.pack(random.normal(size=(offsets[-1], 384)).astype(np.float32), offsets)
    for precision, share in (("fp32", 1.0), ("bf16", 0.5), ("int8", 0.25)):
        size = pool.packed(precision, 1).nbytes
        assert size <= pool.vectors.nbytes * share * 1.05 + 20 * 2000
        assert pool.packed(precision, 1) is pool.packed(precision, 1)


@native
def test_copies_of_a_pool_leave_packed_copies_behind() -> None:
    queries, offsets, weights, pool = case(11, 40, 8)
    expected = span_topk(queries, offsets, weights, pool, 5, backend="native")
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert not other._packed
        assert_bits(span_topk(queries, offsets, weights, other, 5, backend="native"), expected)


@native
def test_switches_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, offsets, weights, pool = case(12, 40, 8)
    monkeypatch.setenv("EL4NER_ISA", "avx9")
    with pytest.raises(KernelError, match="EL4NER_ISA=avx9; allowed: auto"):
        span_topk(queries, offsets, weights, pool, 5, backend="native")
    if ("int8", "amx") in PATHS:
        monkeypatch.setenv("EL4NER_ISA", "amx")
        assert choose_path("auto") == ("int8", "amx")
        assert choose_path("fp32") == ("fp32", "avx512")  # the next best that has it
    elif ("bf16", "avx512") in supported():
        monkeypatch.setenv("EL4NER_ISA", "amx")
        with pytest.raises(KernelError, match="this CPU allows: auto, avx512_bf16, avx512, "):
            choose_path("auto")
    if ("int8", "avx512") in supported():
        monkeypatch.setenv("EL4NER_ISA", "avx512_bf16")  # a name that choice_logprobs has
        assert choose_path("auto") == ("int8", "avx512")
    monkeypatch.setenv("EL4NER_ISA", "portable")
    assert choose_path("auto") == ("fp32", "portable")
    assert choose_path("int8") == ("int8", "portable")
    monkeypatch.setenv("EL4NER_THREADS", "none")
    with pytest.raises(KernelError, match="EL4NER_THREADS=none"):
        span_topk(queries, offsets, weights, pool, 5, backend="native")
    monkeypatch.setenv("EL4NER_THREADS", "3")
    assert thread_count() == 3
    monkeypatch.delenv("EL4NER_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # its number would count
    assert thread_count() == 5


def test_paths_are_known() -> None:
    assert {isa for _, isa in PATHS} <= set(ISAS)
    assert {precision for precision, _ in PATHS} <= set(PRECISIONS)
    if PATHS:  # the portable loops run everywhere
        assert {(precision, "portable") for precision in PRECISIONS} <= set(PATHS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(backend: str, wrong: float) -> None:
    queries, offsets, weights, pool = case(13, 5, 4)
    bad = queries.copy()
    bad[0, 0] = wrong
    with pytest.raises(ShapeError, match="finite"):
        span_topk(bad, offsets, weights, pool, 3, backend=backend)
    with pytest.raises(ShapeError, match="finite"):
        span_topk(queries, offsets, np.where(np.arange(len(weights)) == 0, wrong, weights), pool, 3, backend=backend)
    with pytest.raises(ShapeError, match="finite"):
        SpanPool.pack(np.full((1, 4), wrong), np.array([0, 1]))


EMPTY_QUERIES_SCRIPT = """
import numpy as np
from el4ner.kernels import SpanPool, span_topk

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

vectors = np.random.default_rng(0).standard_normal((600, 32), dtype=np.float32)
pool, offsets = SpanPool.pack(vectors, np.arange(0, 601, 3)), np.append(np.zeros(100000, np.int64), 1)
span_topk(vectors[:1], offsets[-2:], np.ones(1), pool, 1, backend="native")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = peak()
ids, _ = span_topk(vectors[:1], offsets, np.ones(1), pool, 1, backend="native")
assert ids[-1, 0] == 0 and (ids[:-1] == -1).all()
print((peak() - before) / 100000)
"""


@native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset through Linux's /proc")
def test_queries_without_spans_do_not_wait_for_their_answers(tmp_path: Path) -> None:
    """A batch of texts without phrases takes its arrays, some 80 bytes a query; each of those who wait has 216 more."""
    done = subprocess.run(
        [sys.executable, "-c", EMPTY_QUERIES_SCRIPT], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert float(done.stdout) < 150


MEMORY_SCRIPT = """
import ctypes
import sys
import numpy as np
from el4ner.kernels import SpanPool, span_topk

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages: 2 MB more or less, as the system likes
precision, repeated = sys.argv[1], int(sys.argv[2])
random = np.random.default_rng(0)
offsets = np.concatenate([[0], np.cumsum(random.integers(1, 10, 10000))]).astype(np.int64)
vectors = random.standard_normal((offsets[-1], 384), dtype=np.float32)
copies = np.flatnonzero(np.arange(len(vectors)) % 2 * (repeated > 0))
vectors[copies] = vectors[copies % max(2 * repeated, 1) // 2 * 2]
pool = SpanPool.pack(vectors, offsets)
queries, query_offsets, weights = vectors[:2400] + np.float32(0.1), np.arange(0, 2401, 6), np.ones(2400)
pool.packed(precision, 1)
span_topk(queries[:6], query_offsets[:2], weights[:6], pool, 20, precision=precision)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before = peak()
ids, _ = span_topk(queries, query_offsets, weights, pool, 20, precision=precision)
assert (ids >= 0).all()
print((peak() - before) / vectors.nbytes)
"""


@native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset through Linux's /proc")
@pytest.mark.parametrize("repeated", [0, 5000])
@pytest.mark.parametrize(("precision", "threads"), [("int8", 1), ("fp32", 1), ("int8", 16), ("fp32", 16), ("bf16", 16)])
def test_memory_beyond_the_pool_is_small(precision: str, threads: int, repeated: int, tmp_path: Path) -> None:
    """Under 5% of a pool of 50,073 spans, with random vectors, which leave the most candidates, and 400 queries.

    Half of the spans are among `repeated` vectors, whose products are kept. A process of its own for each number: what
    one call has freed, the next takes without asking the system for it.
    """
    if next((isa for p, isa in PATHS if p == precision), "portable") == "portable":
        pytest.skip(f"this CPU screens {precision} with the portable loops: minutes, and the same memory")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, precision, str(repeated)],
        env={**os.environ, "EL4NER_THREADS": str(threads), "PYTHONSAFEPATH": "1"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 0.05
