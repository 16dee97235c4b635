"""Thresholds and operating points: what they count, which one is chosen, what is promised."""

from __future__ import annotations

import numpy as np
import pytest

from el4ner.errors import ConfigError
from el4ner.operating import Decided, best_threshold, fewest, threshold_for
from el4ner.records import Candidate, Span


def decided(
    scores: list[list[float]],
    truth: list[list[int]],
    gold: list[int] | None = None,
    overlap: str = "flat",
    step: int = 5,
) -> Decided:
    """One label; candidates of four letters, one every `step` letters: they overlap below four."""
    return Decided(
        [[Candidate(Span(step * j, step * j + 4), ("x",)) for j in range(len(own))] for own in scores],
        [np.array([(p, 1 - p) for p in own], np.float32).reshape(-1, 2) for own in scores],
        [np.array(own, dtype=np.int64) for own in truth],
        gold if gold is not None else [own.count(0) for own in truth],
        overlap,
    )  # fmt: skip


def alone(scores: np.ndarray, right: np.ndarray) -> Decided:
    """Every candidate in a sentence of its own."""
    return decided([[float(score)] for score in scores], [[0 if found else 1] for found in right])


def test_counts_keep_what_reaches_the_threshold_without_overlaps() -> None:
    case = [[0.9, 0.5, 0.2], [], [0.7]], [[0, 1, 0], [], [1]]
    guesses, hits = decided(*case).counts(0.4)
    assert guesses.tolist() == [2, 0, 1]
    assert hits.tolist() == [1, 0, 0]
    guesses, _ = decided(*case, step=2).counts(0.4)
    assert guesses.tolist() == [1, 0, 1]
    guesses, _ = decided(*case, step=2, overlap="nested").counts(0.4)
    assert guesses.tolist() == [2, 0, 1]


def test_f1_counts_entities_that_nobody_proposed() -> None:
    f1, error = decided([[0.9], [0.8]], [[0], [1]], gold=[2, 0]).f1(0.5)
    assert f1 == 2 * 1 / (2 + 2)
    assert error > 0
    assert decided([[0.1]], [[0]]).f1(0.5) == (0.0, 0.0)


def test_the_lowest_threshold_as_good_as_the_best_is_chosen() -> None:
    # right from 0.5 on, wrong below: 0.2 and 0.3 let all the wrong ones in
    scores = [[0.55, 0.21] for _ in range(200)]
    f1, threshold = best_threshold(decided(scores, [[0, 1] for _ in scores]))
    assert (f1, threshold) == (1.0, 0.22)


def test_a_voter_more_must_lead_by_more_than_chance() -> None:
    truth = [[0]] * 400
    good = decided([[0.9] if i % 10 else [0.1] for i in range(400)], truth)  # finds nine of ten
    same = decided([[0.9] if i % 10 != 1 else [0.1] for i in range(400)], truth)  # nine of ten, other ones
    wins = {i: i in (0, 10, 20) for i in (0, 1, 2, 10, 20)}
    little = decided([[0.9] if wins.get(i, i % 10) else [0.1] for i in range(400)], truth)  # three more, two less
    better = decided([[0.9] if i % 20 else [0.1] for i in range(400)], truth)
    poor = decided([[0.9] if i % 2 else [0.1] for i in range(400)], truth)
    assert good.lead(0.5, poor, 0.5)[0] == pytest.approx(good.f1(0.5)[0] - poor.f1(0.5)[0])
    lead, error = better.lead(0.5, good, 0.5)
    assert lead > 4 * error > 0
    options = {("a",): (good, 0.5), ("b",): (poor, 0.5)}
    assert fewest({("a", "b"): (same, 0.5), **options})[0] == ("a",)
    assert fewest({("a", "b"): (little, 0.5), **options})[0] == ("a",)
    assert fewest({("a", "b"): (better, 0.5), **options}) == (("a", "b"), 0.0, 0.0)
    assert fewest({("b",): (poor, 0.5)})[0] == ("b",)
    # who reads what the other reads costs nothing more: of the sets that count alike the best is taken
    reads = {"a": "x", "b": "x"}
    assert fewest({("a", "b"): (little, 0.5), **options}, reads)[0] == ("a", "b")
    assert fewest({("a", "b"): (same, 0.5), **options}, reads)[0] == ("a",)
    assert fewest({("a", "b"): (little, 0.5), **options}, {"a": "x", "b": "y"})[0] == ("a",)


def test_points_are_precision_with_a_margin_and_recall() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 1, 4000)
    right = rng.uniform(size=4000) < p
    points = alone(p, right).points()
    assert (np.diff(points[:, 0]) > 0).all()
    assert (np.diff(points[:, 2]) <= 0).all()
    for threshold, lower, recall in points:
        precision = right[p >= threshold].mean()
        assert precision - 0.08 < lower < precision
        assert recall == (right & (p >= threshold)).sum() / right.sum()


def test_points_count_what_the_verifier_lets_pass() -> None:
    """The set without overlaps is chosen by the voters, then the verifier judges, as in `stages.verify`."""
    case = decided([[0.9, 0.8, 0.3]] * 40, [[0, 1, 0]] * 40)
    judged = [np.array([0.6, 0.2, -np.inf]) for _ in range(40)]
    both = Decided(case.candidates, case.shares, case.truth, case.gold, "flat", judged)
    assert [counts.sum() for counts in case.counts(0.25)] == [120, 80]
    assert [counts.sum() for counts in both.counts(0.25)] == [40, 40]
    assert [counts.sum() for counts in both.counts(0.7)] == [0, 0]
    recalls = dict(zip(both.points()[:, 0].round(2), both.points()[:, 2], strict=True))
    assert recalls[0.3] == 0.5


def test_a_target_gives_the_lowest_threshold_that_reaches_it() -> None:
    points = np.array([(0.1, 0.5, 0.9), (0.5, 0.8, 0.7), (0.9, 0.93, 0.4), (0.95, 0.96, 0.2)])
    threshold, promise = threshold_for(points, 0.9)
    assert threshold == 0.9
    assert promise["expected on texts like the pool"] == {"precision, a standard error below": 0.93, "recall": 0.4}
    assert threshold_for(points, 0.3)[0] == 0.1


@pytest.mark.parametrize(("points", "said"), [(None, "the paper preset"), (np.zeros((0, 3)), "too small")])
def test_a_pool_that_says_nothing_promises_nothing(points: np.ndarray | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        threshold_for(points, 0.9)


def test_a_target_out_of_reach_says_what_is_within() -> None:
    with pytest.raises(ConfigError, match=r"the most is 0\.80, at a score of 0\.5 and a recall of 0\.30"):
        threshold_for(np.array([(0.5, 0.8, 0.3), (0.9, 0.75, 0.1)]), 0.9)


def test_few_entities_make_no_point() -> None:
    assert len(alone(np.full(19, 0.9), np.ones(19, bool)).points()) == 0
    points = alone(np.full(20, 0.9), np.ones(20, bool)).points()
    assert len(points)
    assert (points[:, 1] < 1).all()  # twenty of twenty are no proof of perfection
