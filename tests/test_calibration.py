"""Scores fitted to how often what decoding keeps is right."""

from __future__ import annotations

import numpy as np
import pytest

from el4ner.calibration import Calibration, fit_calibration
from el4ner.engines.base import FloatArray
from el4ner.operating import Decided
from el4ner.records import Candidate, Span
from el4ner.voters.stacking import Stack

TRUE = Calibration(slope=0.7, shift=0.5)


def apart(shares: FloatArray, truth: np.ndarray, candidates: int = 1) -> Decided:
    """Sentences of `candidates` spans that do not overlap."""
    spans = tuple(Candidate(Span(4 * i, 4 * i + 3), ("a",)) for i in range(candidates))
    rows = shares.reshape(-1, candidates, shares.shape[1])
    targets = truth.reshape(-1, candidates)
    gold = [int((own < shares.shape[1] - 1).sum()) for own in targets]
    return Decided([spans] * len(rows), list(rows), list(targets), gold, "flat")


def drawn(n: int, seed: int = 0) -> FloatArray:
    rng = np.random.default_rng(seed)
    return rng.dirichlet([1.0, 0.5, 0.5], n).astype(np.float32)


def truth_under(shares: FloatArray, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([rng.choice(len(row), p=row / row.sum()) for row in shares.astype(np.float64)])


def test_the_slope_and_shift_behind_the_truth_are_found() -> None:
    shares = drawn(20_000)
    found = fit_calibration(apart(shares, truth_under(TRUE.shares(shares))))
    assert found.slope == pytest.approx(TRUE.slope, abs=0.05)
    assert found.shift == pytest.approx(TRUE.shift, abs=0.05)


def test_scores_that_are_right_stay() -> None:
    shares = drawn(20_000)
    found = fit_calibration(apart(shares, truth_under(shares)))
    assert (found.slope, found.shift) == (pytest.approx(1.0, abs=0.05), pytest.approx(0.0, abs=0.05))


def test_the_best_of_several_estimates_is_lowered() -> None:
    """Overlapping spans of one name: the estimates of which is right are noisy, decoding takes the highest."""
    rng = np.random.default_rng(0)
    candidates = tuple(Candidate(Span(0, 3 + i), ("a",)) for i in range(4))
    shares, truth = [], []
    for _ in range(3000):
        odds = rng.normal(0, 0.7, 4)
        p = 1 / (1 + np.exp(-(odds - 1.0)))
        noisy = 1 / (1 + np.exp(-(odds - 1.0 + rng.normal(0, 0.7, 4))))
        shares.append(np.stack([noisy, 1 - noisy], axis=1).astype(np.float32))
        truth.append(np.where(rng.random(4) < p, 0, 1))
    decided = Decided([candidates] * 3000, shares, truth, [int((t == 0).sum()) for t in truth], "flat")

    def gap(of: Decided) -> float:
        kept = of.kept(0.05)
        scores = np.concatenate([of.shares[i][own, 0] for i, own in enumerate(kept)])
        right = np.concatenate([of.truth[i][own] == 0 for i, own in enumerate(kept)])
        return float(scores.mean() - right.mean())

    assert gap(decided) > 0.08
    found = fit_calibration(decided)
    assert abs(gap(found.decided(decided))) < 0.02


def test_few_spans_move_little_and_none_nothing() -> None:
    shares = np.array([[0.9, 0.1]], np.float32)
    found = fit_calibration(apart(shares, np.array([1])))
    assert 0 < found.shift < 1
    assert 0.3 < found.slope < 1
    assert fit_calibration(Decided([()], [np.zeros((0, 2), np.float32)], [np.zeros(0, np.int64)], [0], "flat")) == (
        Calibration()
    )
    assert fit_calibration(apart(np.array([[0.01, 0.99]], np.float32), np.array([1]))) == Calibration()


def test_the_calibrated_stack_says_what_calibrated_shares_are() -> None:
    rng = np.random.default_rng(3)
    stack = Stack(("a", "b"), rng.uniform(0, 1, (2, 3)), rng.normal(size=3), rng.normal(size=4))
    votes = [drawn(50, seed) for seed in (4, 5)]
    evidence = rng.uniform(0, 1, (50, 4)).astype(np.float32)
    direct = TRUE.stack(stack).probabilities(votes, evidence)
    np.testing.assert_allclose(direct, TRUE.shares(stack.probabilities(votes, evidence)), atol=1e-6)
    assert stack.bias is not TRUE.stack(stack).bias
    assert TRUE.shares(np.zeros((0, 3), np.float32)).shape == (0, 3)
