"""The C++ kernels on every instruction set this machine has, against the reference: vote, spans, log-probabilities."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from el4ner.errors import KernelError, ShapeError
from el4ner.kernels import _dispatch, _threads, best_flat, choice_logprobs, span_scores, vote
from el4ner.kernels._cases import CASES

pytestmark = pytest.mark.skipif(
    _dispatch._native_reason() is not None, reason="el4ner._native is not built; there is no C++ to test"
)
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each set in turn, through the run-time switch; one this processor lacks is skipped."""
    from el4ner import _native

    name = str(request.param)
    monkeypatch.delenv("EL4NER_ISA", raising=False)
    if _native.instruction_set() < INSTRUCTION_SETS.index(name):
        pytest.skip(f"this processor has no {name}")
    if name != INSTRUCTION_SETS[-1]:
        monkeypatch.setenv("EL4NER_ISA", name)
    assert _native.instruction_set() == INSTRUCTION_SETS.index(name)
    return name


def test_a_module_built_from_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from el4ner import _native

    monkeypatch.setattr(_native, "interface", "0" * 16)
    reason = _dispatch._native_reason.__wrapped__()  # past the memory of the first answer
    assert reason is not None
    assert "built from other sources than these; reinstall" in reason


# --- vote ------------------------------------------------------------------------------------------------------------


def votes(random: np.random.Generator, kind: str, members: int, spans: int, labels: int) -> np.ndarray:
    """Distributions; or a coarse grid with ties and impossible labels; or logits far apart. Some rows abstain."""
    if kind == "distributions":
        logp = np.log(random.dirichlet(np.ones(labels), (members, spans)))
    elif kind == "ties":
        with np.errstate(divide="ignore"):
            logp = np.log(random.integers(0, 4, (members, spans, labels)) / 8)
    else:
        logp = np.minimum(random.normal(size=(members, spans, labels)) * 60 - 60, 0)
    logp[random.random((members, spans)) < 0.2] = np.nan
    return logp.astype(np.float32)


def same_votes(got: Any, expected: Any) -> None:
    assert np.array_equal(got[0], expected[0])
    # float64 sums that differ in their last bits, rounded once to float32: one unit in the last place; margins two.
    np.testing.assert_allclose(got[1], expected[1], rtol=1.2e-7, atol=1e-37)
    np.testing.assert_allclose(got[2], expected[2], rtol=0, atol=2.4e-7)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("kind", ["distributions", "ties", "far apart"])
@pytest.mark.parametrize("members", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_vote_equals_the_reference(instruction_set: str, kind: str, members: int, hard: bool) -> None:
    random = np.random.default_rng(members)
    for labels in (1, 2, 7, 8, 9, 16, 17, 33):
        for spans in (0, 1, 31, 33):
            logp = votes(random, kind, members, spans, labels)
            choices = [np.ones(members), np.zeros(members), random.random(members)]
            choices += [random.integers(0, 3, (members, labels)) / 2, random.random(members) * 1e-300]
            for weights in choices:
                same_votes(
                    vote(logp, weights, hard=hard, backend="native"), vote(logp, weights, hard=hard, backend="ref")
                )


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("kind", ["distributions", "ties", "far apart"])
def test_vote_where_most_spans_hear_everybody(instruction_set: str, kind: str, hard: bool) -> None:
    """Runs of 16 spans without an abstention, and some with one, all, or numbers of the far ends in the middle."""
    random = np.random.default_rng(7)
    for members in (1, 2, 3, 5, 8):
        for labels in (1, 2, 7, 15, 16):
            logp = votes(random, kind, members, 99, labels)
            logp[np.isnan(logp)] = -1.0
            logp[-1, 37] = np.nan
            logp[:, 70] = np.nan
            logp[0, 85] = 80.0 if hard else -100.0  # probabilities are at most 1, first choices need not be
            heavy = random.integers(0, 3, (members, labels)) / 2
            for weights in (np.ones(members), np.zeros(members), random.random(members), heavy):
                same_votes(
                    vote(logp, weights, hard=hard, backend="native"), vote(logp, weights, hard=hard, backend="ref")
                )


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("spans", [0, 1, 7, 31, 33, 80])
def test_vote_where_members_abstain(instruction_set: str, spans: int, hard: bool) -> None:
    """Any share of abstentions, any NaN: 0x7fc00000 is numpy's, 0xffc00000 is 0 / 0 on x86, others carry bits."""
    random = np.random.default_rng(spans)
    for members in (1, 2, 5, 8):
        for labels in (1, 3, 8, 9, 16):
            heavy = random.integers(0, 3, (members, labels)) / 2
            for share in (0.02, 0.5, 0.9, 1.0):
                logp = votes(random, "distributions", members, spans, labels)
                logp[random.random((members, spans)) < share] = np.nan
                logp[:, 5:9] = np.nan  # nobody
                silent = np.isnan(logp)
                kinds = np.array([0x7FC00000, 0xFFC00000, 0x7FC00001, 0xFFFFFFFF], np.uint32)
                logp.view(np.uint32)[silent] = random.choice(kinds, int(silent.sum()))
                for weights in (np.ones(members), random.random(members), heavy):
                    got = vote(logp, weights, hard=hard, backend="native")
                    same_votes(got, vote(logp, weights, hard=hard, backend="ref"))
                    assert (got[0][5:9] == -1).all()


@pytest.mark.parametrize("hard", [False, True])
def test_vote_refuses_a_bad_number_wherever_it_stands(instruction_set: str, hard: bool) -> None:
    """In whole blocks and in what is left over; in the first label, which tells who abstains, and in others."""
    random = np.random.default_rng(3)
    for labels in (2, 8, 9, 16):
        for abstain in (False, True):
            logp = votes(random, "distributions", 3, 41, labels)
            logp[np.isnan(logp)] = -1.0
            if abstain:
                logp[0, ::3] = np.nan
            for member, span, label in itertools.product((0, 2), (0, 6, 20, 40), (0, labels // 2, labels - 1)):
                wrong = logp.copy()
                # a number in a row of NaN, or NaN in a row of numbers: the row is partly NaN
                wrong[member, span, label] = -np.inf if np.isnan(wrong[member, span, 0]) else np.nan
                with pytest.raises(ShapeError, match="partly NaN"):
                    vote(wrong, np.ones(3), hard=hard, backend="native")
                wrong[member, span] = -1.0
                wrong[member, span, label] = np.inf
                with pytest.raises(ShapeError, match="inf"):
                    vote(wrong, np.ones(3), hard=hard, backend="native")


def test_vote_large_numbers_of_no_weight_change_nothing(instruction_set: str) -> None:
    """exp(200) is infinite in float32, infinity times 0 no number; the label's score is its other member's."""
    logp = np.full((2, 20, 3), -9.0, np.float32)
    logp[1, :, 1] = -0.1
    logp[0, 4, 1] = 200.0
    weights = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    got = vote(logp, weights, backend="native")
    same_votes(got, vote(logp, weights, backend="ref"))
    assert got[0].tolist() == [1] * 20


def test_vote_refuses_a_score_above_one_amid_others(instruction_set: str) -> None:
    logp = votes(np.random.default_rng(7), "distributions", 3, 99, 16)
    logp[np.isnan(logp)] = -1.0
    logp[0, 85] = 80.0
    with pytest.raises(ShapeError, match="logp holds numbers above 0"):
        vote(logp, np.ones(3), backend="native")


def test_vote_near_ties_are_decided_in_float64(instruction_set: str) -> None:
    """Winners that a float32 exponential would get wrong: scores one part in a million apart, either way round."""
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(6), (5, 400))
    p[:, :, 3] = p[:, :, 2] * (1 + random.choice([-1e-6, 0.0, 1e-6], (1, 400)))
    p[:, :, 2:4] += 1  # these two lead
    p /= 2  # still probabilities
    logp = np.log(p).astype(np.float32)
    same_votes(vote(logp, np.ones(5), backend="native"), vote(logp, np.ones(5), backend="ref"))


@pytest.mark.parametrize("op", ["vote", "span_scores", "best_flat", "choice_logprobs", "span_topk"])
def test_an_unknown_instruction_set_is_refused(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[op](np.random.default_rng(0))
    for name in ("sse", "AVX2"):
        monkeypatch.setenv("EL4NER_ISA", name)
        with pytest.raises(KernelError, match=f"EL4NER_ISA={name}; allowed: auto, amx"):
            case.run("native")
    monkeypatch.setenv("EL4NER_ISA", "")
    case.run("native")


def test_vote_refuses_bad_rows(instruction_set: str) -> None:
    for members, labels in ((2, 5), (9, 17)):
        for where, what in (((0, 0, 0), np.nan), ((1, 20, labels - 1), np.nan), ((1, 3, 1), np.inf)):
            logp = np.zeros((members, 21, labels), dtype=np.float32)
            logp[where] = what
            for hard in (False, True):
                with pytest.raises(ShapeError, match="partly NaN" if np.isnan(what) else "inf"):
                    vote(logp, np.ones(members), hard=hard, backend="native")


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    logp = votes(random, "distributions", 4, 50_000, 12)
    mean, last = random.normal(size=(2, 40_000, 9)).astype(np.float32)
    hidden, head = random.normal(size=(5, 48)).astype(np.float32), random.normal(size=(2100, 48)).astype(np.float32)

    def results() -> list[np.ndarray]:
        logprobs = choice_logprobs(hidden, head, np.arange(7), backend="native")
        return [*vote(logp, np.ones(4), backend="native"), span_scores(mean, last, 6, backend="native"), logprobs]

    def results_with(count: int) -> list[np.ndarray]:
        for module in ("vote", "span_scores", "choice_logprobs"):
            monkeypatch.setattr(sys.modules[f"el4ner.kernels.{module}"], "thread_count", lambda: count)
        return results()

    for got, expected in zip(results_with(threads), results_with(1), strict=True):
        assert got.tobytes() == expected.tobytes()


def test_thread_count_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _threads.thread_count() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert _threads.thread_count() >= 1


# --- span_scores and best_flat ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [1, 3, 8, 17])
@pytest.mark.parametrize("tokens", [0, 1, 31, 33])
def test_span_scores_has_the_bits_of_the_reference(instruction_set: str, tokens: int, labels: int) -> None:
    """The same float64 operations in the same order, so not a bit may differ."""
    mean, last = np.random.default_rng(tokens).normal(size=(2, tokens, 2 * labels)).astype(np.float32)[:, :, ::2]
    for max_length in (1, 7, 40):
        got = span_scores(mean, last, max_length, backend="native")
        assert got.tobytes() == span_scores(mean, last, max_length, backend="ref").tobytes()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 12), st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 4, 1000]), st.integers(0, 2**32 - 1)
)
def test_best_flat_equals_the_reference(tokens: int, length: int, labels: int, steps: int, seed: int) -> None:
    """steps: how many different scores there are; with few of them most sums tie."""
    random = np.random.default_rng(seed)
    scores = (random.integers(-steps, steps + 1, (tokens, length, labels)) / steps).astype(np.float32)
    scores[random.random(scores.shape) < 0.1] = -np.inf
    none = int(random.integers(labels))
    scores[:, :, none] = 0
    assert best_flat(scores, none, backend="native") == best_flat(scores, none, backend="ref")


def test_best_flat_checks_what_it_reads() -> None:
    scores = np.zeros((3, 2, 2), dtype=np.float32)
    scores[2, 1] = np.nan  # past the end
    assert best_flat(scores, 1, backend="native") == []
    for value, label in ((np.nan, 0), (np.inf, 0), (-np.inf, 1)):
        wrong = scores.copy()
        wrong[1, 1, label] = value
        for backend in ("ref", "native"):
            with pytest.raises(ShapeError, match="inside the text"):
                best_flat(wrong, 1, backend=backend)


# --- choice_logprobs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 13, 14, 15, 31, 33])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_choice_logprobs_equals_the_reference(instruction_set: str, dtype: str, rows: int) -> None:
    import torch

    random = torch.Generator().manual_seed(rows)
    for width, vocabulary in ((1, 1), (5, 33), (33, 511), (64, 513), (70, 1100), (300, 97), (515, 64)):
        hidden = torch.randn(rows, width, generator=random).to(getattr(torch, dtype))
        head = (torch.randn(vocabulary, width, generator=random) * 3 / width**0.5).to(getattr(torch, dtype))
        ids = torch.randint(-1, vocabulary, (rows, 4), generator=random)
        ids[:, 0] = 0
        bias = torch.randn(vocabulary, generator=random)
        for extra in ({}, {"bias": bias, "soft_cap": 5.0, "scale": 0.5}, {"n_vocab": max(1, vocabulary // 2)}):
            kept = ids.clamp(max=extra.get("n_vocab", vocabulary) - 1)
            got = choice_logprobs(hidden, head, kept, backend="native", **extra)  # type: ignore[arg-type]
            expected = choice_logprobs(hidden, head, kept, backend="ref", **extra)  # type: ignore[arg-type]
            # Float32 sums of up to 515 products, together up to about 12, and of 1,100 exponentials, against float64.
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_choice_logprobs_rows_do_not_depend_on_each_other(instruction_set: str) -> None:
    import torch

    random = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(40, 96, generator=random), torch.randn(1500, 96, generator=random)
    for dtype in (torch.float32, torch.bfloat16):
        together = choice_logprobs(hidden.to(dtype), head.to(dtype), torch.arange(3), backend="native")
        for r in (0, 7, 39):
            # `choices` columns come from torch, whose product may round otherwise: 1e-5; the sum itself has equal bits.
            alone = choice_logprobs(hidden[r : r + 1].to(dtype), head.to(dtype), torch.arange(3), backend="native")
            np.testing.assert_allclose(alone[0], together[r], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_choice_log_totals_have_the_same_bits_in_any_batch(instruction_set: str, dtype: str) -> None:
    """Some paths are for few rows."""
    import torch

    from el4ner import _native

    random = torch.Generator().manual_seed(2)
    for width in (64, 97, 300):
        hidden, head = (torch.randn(n, width, generator=random).to(getattr(torch, dtype)) for n in (33, 1100))
        run = _native.choice_log_totals_f32
        if dtype == "bfloat16":
            hidden, head, run = hidden.view(torch.uint16), head.view(torch.uint16), _native.choice_log_totals_bf16
        together = np.empty(33)
        run(hidden.numpy(), head.numpy(), None, 1.0, 0.0, together, 1)
        for rows in (1, 6, 7, 14, 15, 31):
            few = np.empty(rows)
            run(hidden[-rows:].numpy(), head.numpy(), None, 1.0, 0.0, few, 1)
            assert few.tobytes() == together[-rows:].tobytes()


def test_choice_logprobs_bfloat16_is_the_same_on_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of bfloat16, or widened to float32: the products are exact either way, only sums round."""
    import torch

    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(17, 301, generator=random).to(torch.bfloat16)
    head = (torch.randn(777, 301, generator=random) * 3 / 301**0.5).to(torch.bfloat16)
    expected = choice_logprobs(hidden, head, torch.arange(9), backend="ref")
    for name in ("", *INSTRUCTION_SETS[:-1]):  # where this processor has less, its widest
        monkeypatch.setenv("EL4NER_ISA", name)
        got = choice_logprobs(hidden, head, torch.arange(9), backend="native")
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_choice_logprobs_extremes(instruction_set: str) -> None:
    hidden = np.full((1, 4), 100.0, np.float32)
    head = np.zeros((600, 4), np.float32)
    head[0], head[599] = 3, -3
    out = choice_logprobs(hidden, head, np.array([0, 1, 599]), backend="native")
    assert out[0].tolist() == pytest.approx([0.0, -1200.0, -2400.0], abs=1e-3)
    masked = np.zeros(600, np.float32)
    masked[1:] = -np.inf  # a bias of -inf forbids a token
    assert choice_logprobs(hidden, head, np.array([0]), bias=masked, backend="native").tolist() == [[0.0]]
    for backend in ("ref", "torch", "numba", "native"):
        for broken in ({"bias": np.full(600, np.nan, np.float32)}, {"bias": np.full(600, -np.inf, np.float32)}):
            with pytest.raises(ShapeError, match="NaN"):
                choice_logprobs(hidden, head, np.array([0]), backend=backend, **broken)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_choice_logprobs_over_the_vocabulary_sum_to_one(rows: int, width: int, vocabulary: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(rows, width)).astype(np.float32)
    head = random.normal(size=(vocabulary, width)).astype(np.float32)
    everything = choice_logprobs(hidden, head, np.arange(vocabulary), backend="native")
    # up to 700 probabilities, each off by a few 1e-6 of itself
    assert np.exp(everything.astype(np.float64)).sum(axis=1) == pytest.approx(np.ones(rows), abs=2e-5)
