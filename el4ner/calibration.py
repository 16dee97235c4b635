"""Scores of what decoding keeps, fitted to how often it is right on the pool, out of fold.

The stack is fitted on all candidates. Decoding keeps the best label, and among overlapping spans those with the best
scores: the maximum of several estimates is too high on average (Smith and Winkler 2006, The Optimizer's Curse), the
more so the fewer sentences they rest on. So the kept spans decide once more, with two numbers for the whole stack:

    p(c) ~ q(c)^slope * exp(shift if c is "none")

where q is what the stack says: temperature scaling (Guo et al. 2017, arXiv:1706.04599) with a constant for "none".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from el4ner.engines.base import FloatArray
from el4ner.operating import THRESHOLDS, Decided
from el4ner.voters.stacking import Stack

_PENALTY = 1.0
"""Of the squared distance of slope and shift from 1 and 0, against the summed cross-entropy of the kept spans."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a stack's scores are multiplied with, and what is added to that of "none"."""

    slope: float = 1.0
    shift: float = 0.0

    def stack(self, stack: Stack) -> Stack:
        """The stack with calibrated scores."""
        bias = self.slope * stack.bias
        bias[-1] += self.shift
        return Stack(stack.voters, self.slope * stack.weights, bias, self.slope * stack.evidence)

    def shares(self, shares: FloatArray) -> FloatArray:
        """What the calibrated stack says where the stack said these distributions (n, C), "none" last."""
        if not len(shares):
            return shares
        with np.errstate(divide="ignore"):
            scores = self.slope * np.log(shares.astype(np.float64))
        scores[:, -1] += self.shift
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(odds / odds.sum(axis=1, keepdims=True), dtype=np.float32)

    def decided(self, decided: Decided) -> Decided:
        """The decisions with calibrated scores."""
        return replace(decided, shares=[self.shares(own) for own in decided.shares])


def fit_calibration(decided: Decided) -> Calibration:
    """The calibration under which it is most probable which kept spans are right.

    decided: out of fold, without a verifier's scores. Spans are kept as at the lowest threshold that may be chosen.
    """
    import torch

    rows, labels, right = _kept(decided)
    if not len(rows):
        return Calibration()

    logs = torch.from_numpy(np.log(np.maximum(rows.astype(np.float64), 1e-30)))  # (n, C)
    best = torch.from_numpy(labels)[:, None]
    target = torch.from_numpy(right.astype(np.float64))
    none = torch.zeros(logs.shape[1], dtype=torch.float64)
    none[-1] = 1.0
    origin = torch.tensor([1.0, 0.0], dtype=torch.float64)
    moving = origin.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([moving], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-7)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        scores = moving[0] * logs + moving[1] * none
        # log-odds of the best label against all else
        others = scores.scatter(1, best, -torch.inf).logsumexp(1)
        odds = scores.gather(1, best)[:, 0] - others
        value = torch.nn.functional.binary_cross_entropy_with_logits(odds, target, reduction="sum")
        value = value + _PENALTY * (moving - origin).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    slope, shift = (float(value) for value in moving.detach())
    return Calibration(slope, shift)


def _kept(decided: Decided) -> tuple[FloatArray, NDArray[np.int64], NDArray[np.bool_]]:
    """Of the spans that decoding keeps: distributions (n, C), best label and whether it is right (n,)."""
    rows: list[FloatArray] = []
    labels: list[NDArray[np.int64]] = []
    right: list[NDArray[np.bool_]] = []
    for i, kept in enumerate(decided.kept(min(THRESHOLDS))):
        own = decided.shares[i][kept]
        rows.append(own)
        labels.append(own[:, :-1].argmax(axis=1))
        right.append(labels[-1] == decided.truth[i][kept])
    return _joined(rows, np.float32), _joined(labels, np.int64), _joined(right, np.bool_)


def _joined(parts: Sequence[NDArray], dtype: type) -> NDArray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
