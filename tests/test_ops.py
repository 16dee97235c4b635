"""Kernels: every backend against the reference, the reference against brute force, promises of docstrings."""

from __future__ import annotations

import itertools
import logging
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from el4ner.errors import KernelError, ShapeError
from el4ner.kernels import (
    _dispatch,
    available_backends,
    best_flat,
    choice_logprobs,
    operations,
    span_scores,
    vote,
)
from el4ner.kernels._cases import CASES, check

SIZES = (0, 1, 31, 33)


def backends(op: str) -> list[str]:
    """What can run here besides the reference."""
    return [name for name, reason in available_backends(op).items() if reason is None and name != "ref"]


def logp_case(seed: int, members: int, spans: int, labels: int) -> np.ndarray:
    """Random votes on a coarse grid, so that ties happen; some rows abstain, some labels are impossible."""
    random = np.random.default_rng(seed)
    with np.errstate(divide="ignore"):
        logp = np.log(random.integers(0, 4, (members, spans, labels)) / 8).astype(np.float32)
    logp[random.random((members, spans)) < 0.2] = np.nan
    return logp


# --- vote ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", backends("vote"))
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("spans", SIZES)
@pytest.mark.parametrize("labels", [1, 2, 5, 33])
def test_vote_backends_agree(backend: str, hard: bool, spans: int, labels: int) -> None:
    logp = logp_case(spans * 100 + labels, 4, spans, labels)
    random = np.random.default_rng(1)
    for weights in (np.ones(4), np.array([0.0, 1.0, 0.5, 0.0]), np.zeros(4), random.integers(0, 3, (4, labels)) / 2):
        expected = vote(logp, weights, hard=hard, backend="ref")
        got = vote(logp, weights, hard=hard, backend=backend)
        assert np.array_equal(got[0], expected[0])
        # float64 sums rounded once to float32: half a unit in the last place of numbers up to 1, twice for margins.
        assert np.allclose(got[1], expected[1], atol=1.2e-7, rtol=0)
        assert np.allclose(got[2], expected[2], atol=2.4e-7, rtol=0)


def test_vote_by_hand() -> None:
    logp = np.log([[[0.9, 0.1], [0.5, 0.5]], [[0.4, 0.6], [0.5, 0.5]]])
    winners, scores, margins = vote(logp, np.array([1.0, 3.0]))
    assert winners.tolist() == [0, 0]  # 0.525 against 0.475; the tie goes to the lower label
    assert scores.tolist() == pytest.approx([0.25 * 0.9 + 0.75 * 0.4, 0.5], abs=1e-7)
    assert margins.tolist() == pytest.approx([0.05, 0.0], abs=1e-7)


def test_hard_ties_go_to_the_earlier_member() -> None:
    logp = np.log([[[0.1, 0.2, 0.7]], [[0.8, 0.1, 0.1]]])
    assert vote(logp, np.ones(2), hard=True)[0].tolist() == [2]
    assert vote(logp[::-1], np.ones(2), hard=True)[0].tolist() == [0]  # strided, and the other order
    assert vote(logp, np.array([0.0, 1.0]), hard=True)[0].tolist() == [0]  # weight 0 is not heard


def test_vote_abstentions() -> None:
    logp = np.log([[[0.2, 0.8]], [[0.9, 0.1]]])
    logp[1] = np.nan
    assert vote(logp, np.ones(2))[1].tolist() == pytest.approx([0.8])
    logp[:] = np.nan
    for hard in (False, True):
        assert [a.tolist() for a in vote(logp, np.ones(2), hard=hard)] == [[-1], [0.0], [0.0]]
    assert [a.tolist() for a in vote(np.zeros((0, 2, 3)), np.zeros(0))] == [[-1, -1], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("logp", "weights", "message"),
    [
        (np.zeros((2, 3)), np.ones(2), "3 axes"),
        (np.zeros((2, 3, 4)), np.ones(3), r"\(2,\) or \(2, 4\)"),
        (np.zeros((2, 3, 4)), -np.ones(2), "negative"),
        (np.zeros((2, 3, 4)), np.array([1.0, np.nan]), "finite"),
        (np.array([[[0.0, np.nan]]]), np.ones(1), "partly NaN"),
        (np.array([[[0.0, np.inf]]]), np.ones(1), r"\+inf"),
        (np.zeros((2, 3, 4)), np.full(2, 1.7e308), "1e-305 to 1e"),  # their sum would be infinite
        (np.zeros((2, 3, 4)), np.full(2, 5e-324), "1e-305 to 1e"),  # its products would have no digits
        (np.array([[[3.0, 30.0]]]), np.ones(1), "numbers above 0"),  # logits
        (np.array([[[0.0, 1000.0]]]), np.ones(1), "numbers above 0"),
    ],
)
def test_vote_refuses(logp: np.ndarray, weights: np.ndarray, message: str) -> None:
    for backend in ["ref", *backends("vote")]:
        with pytest.raises(ShapeError, match=message):
            vote(logp, weights, backend=backend)


# --- span_scores and best_flat ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["ref", *backends("span_scores")])
@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("max_length", [1, 7, 40])
def test_span_scores_equals_the_definition(backend: str, tokens: int, max_length: int) -> None:
    random = np.random.default_rng(tokens)
    mean, last = random.normal(size=(2, tokens, 4)).astype(np.float32)
    out = span_scores(mean, last, max_length, backend=backend)
    assert out.shape == (tokens, max_length, 4)
    assert out.dtype == np.float32
    for i, n in itertools.product(range(tokens), range(max_length)):
        if i + n < tokens:
            expected = mean[i : i + n + 1].astype(np.float64).mean(axis=0) + last[i + n]
            assert np.allclose(out[i, n], expected, atol=1e-6, rtol=0)  # one rounding of numbers up to about 8
        else:
            assert (out[i, n] == -np.inf).all()


def test_span_scores_refuses() -> None:
    good = np.zeros((3, 2), dtype=np.float32)
    for mean, last, length in [(good, good[:2], 2), (good, good, 0), (good * np.nan, good, 2), (good[0], good, 2)]:
        with pytest.raises(ShapeError):
            span_scores(mean, last, length)


def flat_oracle(scores: np.ndarray, none: int) -> list[tuple[int, int, int]]:
    """All sets of disjoint spans: largest gain, fewest spans, earliest starts, shortest spans, lowest labels."""
    tokens, max_length, labels = scores.shape
    options = [
        (i, i + n + 1, label, float(scores[i, n, label]) - float(scores[i, n, none]))
        for i in range(tokens)
        for n in range(min(max_length, tokens - i))
        for label in range(labels)
        if label != none and scores[i, n, label] > scores[i, n, none]
    ]
    best: tuple[Any, ...] = (0.0, 0, [], [])
    for size in range(1, tokens + 1):
        for chosen in itertools.combinations(options, size):
            if all(a[1] <= b[0] for a, b in itertools.pairwise(chosen)):
                gain = -sum(span[3] for span in chosen)
                key = (gain, size, [(a, b, label) for a, b, label, _ in chosen])
                best = min(best, key) if best[2] else (key if gain < 0 else best)
    return best[2]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_best_flat_is_the_optimum(data: st.DataObject) -> None:
    tokens, max_length, labels = (data.draw(st.integers(1, high)) for high in (4, 3, 3))
    none = data.draw(st.integers(0, labels - 1))
    numbers = data.draw(st.lists(st.integers(-2, 2), min_size=tokens * max_length * labels, max_size=36))
    scores = np.array(numbers[: tokens * max_length * labels], dtype=np.float32).reshape(tokens, max_length, labels)
    expected = flat_oracle(scores, none)
    for backend in ["ref", *backends("best_flat")]:
        assert best_flat(scores, none, backend=backend) == expected


@pytest.mark.parametrize("tokens", SIZES)
def test_best_flat_of_span_scores_backends_agree(tokens: int) -> None:
    random = np.random.default_rng(tokens)
    mean, last = random.normal(size=(2, tokens, 4)).astype(np.float32)
    scores = span_scores(mean, last, 7)
    spans = best_flat(scores, 3, backend="ref")
    assert (len(spans) > 0) == (tokens > 0)
    for backend in backends("best_flat"):
        assert best_flat(scores, 3, backend=backend) == spans


def test_best_flat_edges() -> None:
    only_none = np.zeros((3, 2, 1), dtype=np.float32)
    assert best_flat(only_none, 0) == []
    scores = np.zeros((2, 2, 2), dtype=np.float32)
    assert best_flat(scores, 1) == []  # nothing gained
    scores[0, 1, 0], scores[0, 0, 0], scores[1, 0, 0] = 2, 1, 1
    assert best_flat(scores, 1) == [(0, 2, 0)]  # equal sums: fewer spans
    scores[1, 1] = np.nan  # past the end: not read
    assert best_flat(scores, 1) == [(0, 2, 0)]
    for wrong, none in [(scores * np.nan, 1), (scores, 2), (scores[0], 1)]:
        with pytest.raises(ShapeError):
            best_flat(wrong, none)


# --- choice_logprobs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["ref", *backends("choice_logprobs")])
@pytest.mark.parametrize("normalise", ["vocab", "choices"])
@pytest.mark.parametrize("rows", SIZES)
def test_choice_logprobs_equals_the_definition(
    backend: str, normalise: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["el4ner.kernels.choice_logprobs"], "_BLOCK", 32)  # several blocks, a short last one
    random = np.random.default_rng(rows)
    hidden = random.normal(size=(rows, 24)).astype(np.float32)[:, ::2]  # strided
    head = random.normal(size=(101, 12)).astype(np.float32)
    bias = random.normal(size=101).astype(np.float32)
    ids = random.integers(0, 101, (rows, 5))
    ids[:, 3] = -1
    for extra in ({}, {"bias": bias}, {"soft_cap": 3.0, "scale": 0.5, "bias": bias}):
        out = choice_logprobs(hidden, head, ids, normalise, backend=backend, **extra)
        logits = hidden.astype(np.float64) @ head.T * extra.get("scale", 1.0) + extra.get("bias", 0.0)
        logits = 3 * np.tanh(logits / 3) if "soft_cap" in extra else logits
        chosen = np.where(ids >= 0, np.take_along_axis(logits, ids, axis=1), -np.inf)
        over = logits if normalise == "vocab" else chosen
        with np.errstate(divide="ignore"):
            expected = chosen - np.log(np.exp(over).sum(axis=1, keepdims=True))
        assert out.dtype == np.float32
        assert out.shape == (rows, 5)
        # Dots of 12 float32 products of size about 1 to 10, at most 24 units in the last place of 16.
        assert np.allclose(out, expected, atol=2e-5, rtol=0)
        assert (out[:, 3] == -np.inf).all()


@pytest.mark.parametrize("backend", backends("choice_logprobs"))
def test_choice_logprobs_half_precision(backend: str) -> None:
    import torch

    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 64, generator=random).to(torch.bfloat16)
    head = (torch.randn(20_000, 64, generator=random) / 4).to(torch.bfloat16)
    ids = torch.arange(6)
    out = choice_logprobs(hidden, head, ids, backend=backend)
    # Logits in the sum are rounded to 8 bits: 2^-9 of values up to 8, averaged; 0.02 leaves room.
    assert np.allclose(out, choice_logprobs(hidden, head, ids, backend="ref"), atol=0.02, rtol=0)
    assert (out <= 0).all()
    exact = choice_logprobs(hidden, head, ids, "choices", backend=backend)
    assert np.allclose(exact, choice_logprobs(hidden, head, ids, "choices", backend="ref"), atol=2e-5, rtol=0)
    assert np.exp(exact).sum(axis=1) == pytest.approx(np.ones(9), abs=1e-5)


def test_choice_logprobs_large_logits_do_not_overflow() -> None:
    hidden, head = np.full((1, 4), 100.0, np.float32), np.diag(np.arange(4)).astype(np.float32)
    for backend in ["ref", *backends("choice_logprobs")]:
        out = choice_logprobs(hidden, head, np.array([3, 0]), backend=backend)
        assert out.tolist() == [pytest.approx([0.0, -300.0], abs=1e-3)]


def test_choice_logprobs_refuses() -> None:
    hidden, head, ids = np.zeros((2, 3), np.float32), np.zeros((5, 3), np.float32), np.array([0, 4])
    calls: list[tuple[Any, Any, Any, dict[str, Any]]] = [
        (hidden[:, :2], head, ids, {}),
        (hidden[0], head, ids, {}),
        (hidden, head, np.array([5]), {}),
        (hidden, head, np.array([-2]), {}),
        (hidden, head, np.array([0.5]), {}),
        (hidden, head, np.array([[0], [-1]]), {}),
        (hidden, head, np.array([[0]]), {}),
        (hidden * np.nan, head, ids, {}),
        (hidden, head, ids, {"normalise": "labels"}),
        (hidden, head, ids, {"bias": np.zeros(4)}),
        (hidden, head, ids, {"soft_cap": 0.0}),
        (hidden, head, ids, {"soft_cap": np.inf}),
        (hidden, head, ids, {"soft_cap": 1e-300}),
        (hidden, head, ids, {"scale": np.nan}),
        (hidden, head, ids, {"scale": 1e300}),
        (hidden, head, ids, {"n_vocab": 3.0}),
        (hidden, head, ids, {"bias": np.array([0.0, np.inf, 0.0, 0.0, 0.0])}),  # all others would be at -inf
        (hidden, head, ids, {"bias": np.array(["a"] * 5)}),
        (hidden, head.astype(int), ids, {}),  # states would be cut to whole numbers
        (hidden, head * 1j, ids, {}),
        (hidden.astype(object), head, ids, {}),
        (hidden, head, np.array([0, 2**64 - 1], dtype=np.uint64), {}),  # as int64 it is the padding
    ]
    for *arguments, options in calls:
        for backend in ["ref", *backends("choice_logprobs")]:
            with pytest.raises(ShapeError):
                choice_logprobs(*arguments, **options, backend=backend)


def test_choice_logprobs_takes_lists_and_any_order_of_bytes() -> None:
    random = np.random.default_rng(9)
    hidden, head = (random.normal(size=shape).astype(np.float32) for shape in ((2, 3), (5, 3)))
    ids, bias = [[0, 4], [1, 2]], [0.0, 1.0, 2.0, 3.0, 4.0]
    for backend in ["ref", *backends("choice_logprobs")]:
        expected = choice_logprobs(hidden, head, np.array(ids), bias=np.array(bias), backend=backend)
        for got in (
            choice_logprobs(hidden, head, ids, bias=bias, backend=backend),
            choice_logprobs(hidden.astype(">f4"), head.astype(">f4"), np.array(ids, ">i4"), bias=bias, backend=backend),
            choice_logprobs(hidden[:, ::-1], head[:, ::-1], ids, bias=np.array(bias), backend=backend),
            choice_logprobs(np.asfortranarray(hidden), np.asfortranarray(head), ids, bias=bias, backend=backend),
        ):
            assert np.allclose(got, expected, atol=1e-6)


# --- dispatch --------------------------------------------------------------------------------------------------------


def test_every_operation_has_a_case_and_every_backend_passes_it() -> None:
    assert set(operations()) == set(CASES)
    for op in operations():
        for backend in ["ref", *backends(op)]:
            assert check(CASES[op](np.random.default_rng(1)), backend) is None


def test_a_backend_asked_for_by_name_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    logp, weights = np.zeros((1, 1, 2)), np.ones(1)
    with pytest.raises(KernelError, match="allowed: auto, native"):
        vote(logp, weights, backend="gpu")
    with pytest.raises(KernelError, match="best_flat has no torch implementation"):
        best_flat(logp, 0, backend="torch")
    with pytest.raises(KernelError, match="allowed: best_flat"):
        available_backends("nothing")
    monkeypatch.setattr(_dispatch, "_native_reason", lambda: "not built")
    with pytest.raises(KernelError, match="cannot run: not built"):
        vote(logp, weights, backend="native")
    assert _dispatch.choose("vote").__name__ == "vote_numba"  # without a compiler numba takes over


def test_environment_forces_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EL4NER_BACKEND", "ref")
    for op in operations():
        assert _dispatch.choose(op).__name__.endswith("_ref")
    assert _dispatch.choose("vote", "numba").__name__ == "vote_numba"
    monkeypatch.setenv("EL4NER_BACKEND", "fast")
    with pytest.raises(KernelError, match="allowed: auto, ref"):
        vote(np.zeros((1, 1, 2)), np.ones(1))


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="el4ner.kernels._dispatch"):
        for _ in range(3):
            vote(np.zeros((1, 1, 2)), np.ones(1), backend="ref")
    assert [record.message for record in caplog.records] == ["vote runs on backend ref (cpu)"]


def test_backends_leave_no_output_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (floats) or a mark (integers); nothing of it may come out."""
    empty = np.empty

    def marked(shape: Any, dtype: Any = float) -> np.ndarray:
        out = empty(shape, dtype)
        out[...] = np.nan if out.dtype.kind == "f" else -77
        return out

    monkeypatch.setattr(np, "empty", marked)
    for op in operations():
        case = CASES[op](np.random.default_rng(2))
        for backend in backends(op):
            for array in case.run(backend):
                assert not np.isnan(array).any()
                assert not (array == -77).any()
