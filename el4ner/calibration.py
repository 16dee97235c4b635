"""Scores of what decoding keeps, fitted to how often it is right on the pool, out of fold.

The stack is fitted on all candidates. Decoding keeps the best label, and among overlapping spans those with the best
scores: the maximum of several estimates is too high on average (Smith and Winkler 2006, The Optimizer's Curse), the
more so the fewer sentences they rest on. So the spans that are kept set the scores once more,

    log-odds of the score = slope * log-odds of the best label's probability + shift

by logistic regression (Platt 1999, Probabilistic Outputs for Support Vector Machines).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from el4ner.decoding import log_odds


@dataclass(frozen=True, slots=True)
class Calibration:
    """From the probability that a stack gives to the best label of a span to the score. As it is made, none."""

    slope: float = 1.0
    shift: float = 0.0

    def __call__(self, p: NDArray[np.floating]) -> NDArray[np.float64]:
        """The scores (n,) of probabilities (n,)."""
        given = np.asarray(p, dtype=np.float64)
        if self == Calibration():
            return given
        odds = self.slope * log_odds(given) + self.shift
        return np.asarray(1.0 / (1.0 + np.exp(-odds)), dtype=np.float64)


def fit_calibration(p: NDArray[np.floating], right: NDArray[np.bool_]) -> Calibration:
    """The calibration under which it is most probable which of the kept spans are right.

    p (n,): what stacks say of spans of sentences they were not fitted on; right (n,). A slope that is not positive
    would turn the order of the scores around: nothing is changed then.
    """
    design = np.stack([log_odds(p), np.ones(len(p))], axis=1)
    slope, shift = logistic(design, right, (1.0, 0.0))
    return Calibration(float(slope), float(shift)) if slope > 0 else Calibration()


def logistic(design: NDArray[np.float64], right: NDArray[np.bool_], origin: Sequence[float]) -> NDArray[np.float64]:
    """Weights (d,) of a logistic regression of right (n,) on the columns of design (n, d), by Newton's method.

    Minimises the summed cross-entropy plus the squared distance of the weights from `origin`.
    """
    start = np.array(origin)
    weights = start.copy()
    for _ in range(100):
        p = 1.0 / (1.0 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (p - right) + 2 * (weights - start)
        curvature = design.T @ (design * (p * (1 - p))[:, None]) + 2 * np.eye(len(start))
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step
        if float(np.abs(step).max()) < 1e-9:
            break
    return weights
