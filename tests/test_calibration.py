"""Scores fitted to how often what decoding keeps is right."""

from __future__ import annotations

import numpy as np
import pytest

from el4ner.calibration import Calibration, fit_calibration
from el4ner.operating import Decided
from el4ner.records import Candidate, Span

TRUE = Calibration(slope=0.7, shift=-0.5)


def test_the_slope_and_shift_behind_the_truth_are_found() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0.02, 0.98, 20_000)
    found = fit_calibration(p, rng.random(len(p)) < TRUE(p))
    assert (found.slope, found.shift) == (pytest.approx(0.7, abs=0.05), pytest.approx(-0.5, abs=0.05))
    found = fit_calibration(p, rng.random(len(p)) < p)
    assert (found.slope, found.shift) == (pytest.approx(1.0, abs=0.05), pytest.approx(0.0, abs=0.05))


def test_scores_keep_their_order_and_none_changes_nothing() -> None:
    p = np.linspace(0, 1, 11)
    assert (np.diff(TRUE(p)) > 0).all()
    assert ((TRUE(p) > 0) & (TRUE(p) < 1)).all()
    np.testing.assert_array_equal(Calibration()(p), p)
    assert TRUE(np.zeros(0)).shape == (0,)


def test_few_spans_move_little_none_nothing_and_none_turns_around() -> None:
    found = fit_calibration(np.array([0.9]), np.array([False]))
    assert 0.3 < found.slope < 1
    assert -1 < found.shift < 0
    assert fit_calibration(np.zeros(0), np.zeros(0, dtype=bool)) == Calibration()
    p = np.repeat([0.1, 0.9], 500)
    assert fit_calibration(p, p < 0.5) == Calibration()  # the less likely, the more often right


def test_the_best_of_several_estimates_is_lowered() -> None:
    """Overlapping spans of one name: the estimates of which is right are noisy, decoding takes the highest."""
    rng = np.random.default_rng(0)
    candidates = tuple(Candidate(Span(0, 3 + i), ("a",)) for i in range(4))
    shares, truth = [], []
    for _ in range(3000):
        odds = rng.normal(0, 0.7, 4) - 1.0
        p = 1 / (1 + np.exp(-(odds + rng.normal(0, 0.7, 4))))
        shares.append(np.stack([p, 1 - p], axis=1).astype(np.float32))
        truth.append(np.where(rng.random(4) < 1 / (1 + np.exp(-odds)), 0, 1))
    decided = Decided([candidates] * 3000, shares, truth, [int((t == 0).sum()) for t in truth], "flat")

    def gap(of: Decided) -> float:
        kept = of.kept(0.05)
        scores = np.concatenate([of.scores(i)[own] for i, own in enumerate(kept)])
        right = np.concatenate([of.truth[i][own] == 0 for i, own in enumerate(kept)])
        return float(scores.mean() - right.mean())

    assert gap(decided) > 0.08
    assert abs(gap(decided.calibrated())) < 0.02


def test_what_is_decided_is_calibrated_by_what_is_kept() -> None:
    """The span that no decoding keeps does not count; the score of the verifier's candidates is the calibrated one."""
    candidates = (Candidate(Span(0, 9), ("a",)), Candidate(Span(0, 4), ("a",)))
    shares = np.array([[0.8, 0.2], [0.3, 0.7]], np.float32)
    decided = Decided([candidates] * 500, [shares] * 500, [np.array([0, 1])] * 400 + [np.array([1, 0])] * 100,
                      [1] * 500, "flat")  # fmt: skip
    changed = decided.calibrated()
    assert changed.kept(0.05) == [[0]] * 500
    assert changed.scores(0)[0] == pytest.approx(0.8, abs=0.01)
    assert (changed.counts(0.7)[0].sum(), changed.counts(0.9)[0].sum()) == (500, 0)
    empty = Decided([()], [np.zeros((0, 2), np.float32)], [np.zeros(0, np.int64)], [0], "flat").calibrated()
    assert (empty.calibration, empty.scores(0).shape) == (Calibration(), (0,))
