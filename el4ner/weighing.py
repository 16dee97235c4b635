"""What the members' words and the verifier's verdicts are worth, weighed on a sample of the pool, out of fold.

The cheap voters were fitted on the whole pool and keep their weights; the sample is small, so how far the members'
weights may move, and whether the verifier may move a score at all, is chosen by cross-validation on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from el4ner.calibration import logistic
from el4ner.decoding import log_odds
from el4ner.engines.base import FloatArray
from el4ner.stages.classify import EVIDENCE
from el4ner.stages.verify import verified_score
from el4ner.voters.stacking import Stack, fit_stack, log_loss, start_stack

if TYPE_CHECKING:
    from el4ner.audition import Asked
    from el4ner.operating import Decided
    from el4ner.stages.team import Team

PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
"""Among which the strength that holds the members' weights at their start is chosen; the last leaves them there."""

NEUTRAL = (1.0, 0.0, 0.0)
"""Weights of score, verdict and constant with which a verdict changes nothing."""


@dataclass(frozen=True)
class Weighed:
    """The stack of everybody asked, and what it is worth.

    penalty: its strength. shares: per sentence (n, L + 1), what stacks of the other folds make of the candidates.
    gain, error: log-probability a sentence that the members' votes add out of fold, and its standard error; infinite
    error for a single sentence.
    """

    stack: Stack
    penalty: float
    shares: list[FloatArray]
    gain: float
    error: float


def weigh_members(team: Team, asked: Asked, folds: Sequence[int]) -> Weighed:
    """Stacks everybody asked, the cheap voters' weights held, with a penalty chosen by cross-validation.

    The gain is over the same stack with members that say of every candidate what they say on average: a change of bias
    that the sample asks for would else pass for theirs.
    """
    start = start_stack(team.asked, len(team.labels) + 1, len(EVIDENCE), team.base)
    held = team.base.voters if team.base is not None else ()
    penalty, shares, said = _chosen(start, asked, folds, held)
    _, _, without = _chosen(start, asked.averaged([member.name for member in team.asked_members]), folds, held)
    stack = fit_stack(start, *asked.rows(start.voters), penalty, held)
    return Weighed(stack, penalty, shares, *_mean_and_error(said - without))


def gains_of(team: Team, members: Sequence[str], asked: Asked, folds: Sequence[int]) -> dict[str, float]:
    """By member, the log-probability a sentence that its votes add out of fold to those of all the others.

    Measured as the gain of `weigh_members`, with one member at a time that says what it says on average.
    """
    held = team.base.voters if team.base is not None else ()
    start = start_stack((*held, *members), len(team.labels) + 1, len(EVIDENCE), team.base)
    _, _, said = _chosen(start, asked, folds, held)
    gains = {}
    for name in members:
        _, _, without = _chosen(start, asked.averaged([name]), folds, held)
        gains[name] = float((said - without).mean())
    return gains


def _chosen(
    start: Stack, asked: Asked, folds: Sequence[int], held: Sequence[str]
) -> tuple[float, list[FloatArray], NDArray[np.float64]]:
    """The penalty, what stacks fitted with it make of sentences they did not see, and how probable the truth then is.

    The strongest penalty within one standard error of the best (Breiman et al., 1984), the error that of the paired
    difference over sentences: weights that move must show what they are good for.
    """
    shares = {penalty: _left_out(start, asked, folds, penalty, held) for penalty in PENALTIES}
    said = {penalty: _log_probabilities(shares[penalty], asked.truth) for penalty in PENALTIES}
    best = max(PENALTIES, key=lambda penalty: float(said[penalty].sum()))
    penalty = max(p for p in PENALTIES if np.subtract(*_mean_and_error(said[best] - said[p])) <= 0)
    return penalty, shares[penalty], said[penalty]


def _left_out(
    start: Stack, asked: Asked, folds: Sequence[int], penalty: float, held: Sequence[str]
) -> list[FloatArray]:
    """What stacks of the other folds make of every sentence's candidates: (n, L + 1) each."""
    shares: list[FloatArray] = [np.zeros((0, start.weights.shape[1]), np.float32) for _ in folds]
    for fold in sorted(set(folds)):
        inside = [i for i, own in enumerate(folds) if own != fold]
        stack = fit_stack(start, *asked.rows(start.voters, inside), penalty, held) if inside else start
        for i in (i for i, own in enumerate(folds) if own == fold):
            votes, evidence, _ = asked.rows(start.voters, [i])
            shares[i] = stack.probabilities(votes, evidence)
    return shares


def _log_probabilities(shares: Sequence[FloatArray], truth: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Per sentence the log-probability of the truth about all its candidates."""
    return np.array([-log_loss(own, right) * len(right) for own, right in zip(shares, truth, strict=True)])


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("inf")
    return float(values.mean()), error


@dataclass(frozen=True)
class Verdicts:
    """What the verifier says on the sample.

    judged: per sentence the rows of the candidates it was asked about. scores, said, right: of those, the score before,
    its probability that the claim is true (NaN where it gave no usable verdict), and whether it is.
    """

    judged: list[NDArray[np.int64]]
    scores: list[NDArray[np.float64]]
    said: list[NDArray[np.float64]]
    right: list[NDArray[np.bool_]]

    def undecided(self) -> Verdicts:
        """The same with even odds where there is no usable verdict."""
        return replace(self, said=[np.nan_to_num(own, nan=0.5) for own in self.said])

    def rows(self, chosen: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """Scores, verdicts and truth of some sentences, one row a claim."""
        return (
            np.concatenate([np.zeros(0), *(self.scores[i] for i in chosen)]),
            np.concatenate([np.zeros(0), *(self.said[i] for i in chosen)]),
            np.concatenate([np.zeros(0, dtype=np.bool_), *(self.right[i] for i in chosen)]),
        )


def ask_verifier(team: Team, asked: Asked, decided: Decided) -> Verdicts:
    """The verifier's verdicts on the candidates that may reach the threshold."""
    assert team.verifier is not None
    best = [found[:, :-1].argmax(axis=1) for found in decided.shares]
    scores = [decided.scores(i) for i in range(len(best))]
    judged = [np.flatnonzero(own >= team.threshold / 2) for own in scores]
    claims = [
        [(candidates[k].span, team.labels[int(labels[k])]) for k in own.tolist()]
        for candidates, labels, own in zip(asked.candidates, best, judged, strict=True)
    ]
    found = team.verifier.judge(asked.sentences, asked.retrieved.demonstrations, claims)
    return Verdicts(
        judged,
        [own[k] for own, k in zip(scores, judged, strict=True)],
        [np.array(own.probabilities, dtype=np.float64) for own in found],
        [labels[k] == truth[k] for labels, truth, k in zip(best, asked.truth, judged, strict=True)],
    )


def weigh_verifier(verdicts: Verdicts, folds: Sequence[int]) -> tuple[tuple[float, float, float], float, float]:
    """Weights of score, verdict and constant, the gain in log-probability a sentence out of fold, and its error.

    By logistic regression, the penalty pulling towards a verifier that changes nothing; that is what it stays unless
    the gain over the same fit without verdicts exceeds one standard error.
    """
    everyone = range(len(folds))
    blank = replace(verdicts, said=[np.full(len(own), 0.5) for own in verdicts.said])
    gains = np.zeros(len(folds))
    for fold in sorted(set(folds)):
        inside = [i for i in everyone if folds[i] != fold]
        for sign, own in ((1.0, verdicts), (-1.0, blank)):
            weights = _logistic(*own.rows(inside))
            for i in (i for i in everyone if folds[i] == fold):
                gains[i] += sign * _log_probability(own, i, weights)
    gain, error = _mean_and_error(gains)
    return (_logistic(*verdicts.rows(everyone)) if gain > error else NEUTRAL), gain, error


def verified_scores(
    verdicts: Verdicts, weights: tuple[float, float, float], sizes: Sequence[int]
) -> list[NDArray[np.float64]]:
    """Per sentence (n,) the scores after the verifier, -inf for candidates too unlikely to be judged."""
    rows = [np.full(size, -np.inf) for size in sizes]
    for row, judged, scores, said in zip(rows, verdicts.judged, verdicts.scores, verdicts.said, strict=True):
        row[judged] = [verified_score(float(s), float(p), weights) for s, p in zip(scores, said, strict=True)]
    return rows


def passed_scores(verdicts: Verdicts, sizes: Sequence[int]) -> list[NDArray[np.float64]]:
    """Per sentence (n,) the scores of candidates that written verdicts let pass, -inf for the others."""
    rows = [np.full(size, -np.inf) for size in sizes]
    for row, judged, scores, said in zip(rows, verdicts.judged, verdicts.scores, verdicts.said, strict=True):
        row[judged] = np.where(said >= 0.5, scores, -np.inf)
    return rows


def _log_probability(verdicts: Verdicts, i: int, weights: tuple[float, float, float]) -> float:
    """Log-probability of what is right about the claims of a sentence."""
    pairs = zip(verdicts.scores[i].tolist(), verdicts.said[i].tolist(), strict=True)
    p = np.array([verified_score(score, verdict, weights) for score, verdict in pairs])
    right = verdicts.right[i]
    return float(np.log(np.clip(np.where(right, p, 1 - p), 1e-9, 1.0)).sum()) if len(p) else 0.0


def _logistic(
    scores: NDArray[np.float64], verdicts: NDArray[np.float64], right: NDArray[np.bool_]
) -> tuple[float, float, float]:
    """The three weights, held to `NEUTRAL`."""
    design = np.stack([log_odds(scores), log_odds(verdicts), np.ones(len(scores))], axis=1)
    weights = logistic(design, right, NEUTRAL)
    return float(weights[0]), float(weights[1]), float(weights[2])
