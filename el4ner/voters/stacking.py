"""Stacking: how much each voter's word counts, per label, fitted on the pool's out-of-fold votes.

    z[c] = b[c] + sum over voters v of w[v, c] * log p_v(c),     z[none] += u . evidence
    p = softmax(z)

Wolpert's stacked generalisation (1992) with a multinomial logistic model. The penalty pulls every weight towards a
given start (equal weights at first; for prompted voters 0 beside what is already fitted), so few sentences change
little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from el4ner.engines.base import FloatArray

_FLOOR = np.log(1e-4)
"""Votes are read as at least 1e-4: below, a log-probability says more about the voter's tails than about the span."""


def log_votes(votes: FloatArray) -> FloatArray:
    """Distributions -> log-probabilities, floored; a row of NaN (an abstention) says nothing: zeros."""
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log(votes), _FLOOR)
    return np.asarray(np.where(np.isnan(votes), 0.0, logs), dtype=np.float32)


@dataclass(frozen=True)
class Stack:
    """voters (V); weights (V, C), bias (C,), evidence weights (E,), all f64; C = labels + "none"."""

    voters: tuple[str, ...]
    weights: NDArray[np.float64]
    bias: NDArray[np.float64]
    evidence: NDArray[np.float64]

    def probabilities(self, votes: Sequence[FloatArray], evidence: FloatArray) -> FloatArray:
        """votes: V arrays (n, C) in the order of `voters`; evidence (n, E) -> calibrated distributions (n, C)."""
        scores = np.tile(self.bias, (len(evidence), 1))
        for weight, vote in zip(self.weights, votes, strict=True):
            scores += weight * log_votes(vote)
        # summed term by term: a matrix product may depend on how many rows it is given
        scores[:, -1] += (evidence * self.evidence).sum(axis=1)
        scores -= scores.max(axis=1, keepdims=True)
        odds = np.exp(scores)
        return np.asarray(odds / odds.sum(axis=1, keepdims=True), dtype=np.float32)


def start_stack(voters: Sequence[str], n_columns: int, n_evidence: int, base: Stack | None = None) -> Stack:
    """The stack that fitting starts from: `base` with weight 0 for new voters, or equal weights summing to one."""
    weights = np.full((len(voters), n_columns), 1.0 / max(len(voters), 1))
    if base is None:
        return Stack(tuple(voters), weights, np.zeros(n_columns), np.zeros(n_evidence))
    for row, voter in zip(weights, voters, strict=True):
        row[:] = base.weights[base.voters.index(voter)] if voter in base.voters else 0.0
    return Stack(tuple(voters), weights, base.bias.copy(), base.evidence.copy())


def fit_stack(
    start: Stack, votes: Sequence[FloatArray], evidence: FloatArray, truth: NDArray[np.int64], penalty: float = 1.0,
    held: Sequence[str] = (),
) -> Stack:  # fmt: skip
    """Minimises the summed cross-entropy of `truth` (n,) plus `penalty` times the squared distance from `start`.

    held: voters whose weights stay as they are, because they were fitted on more than these rows.
    """
    import torch

    if not len(truth):
        return start
    logs = torch.from_numpy(np.stack([log_votes(vote) for vote in votes]).astype(np.float64))  # (V, n, C)
    given = torch.from_numpy(evidence.astype(np.float64))
    target = torch.from_numpy(truth)
    origin = [torch.from_numpy(array) for array in (start.weights, start.bias, start.evidence)]
    free = torch.tensor([[voter not in held] for voter in start.voters], dtype=torch.float64)
    moving = [array.clone().requires_grad_() for array in origin]
    optimiser = torch.optim.LBFGS(moving, max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-5)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        weights, bias, own = moving
        weights = origin[0] + free * (weights - origin[0])
        scores = bias + (weights[:, None, :] * logs).sum(0)
        scores = torch.cat([scores[:, :-1], scores[:, -1:] + (given @ own)[:, None]], dim=1)
        value = torch.nn.functional.cross_entropy(scores, target, reduction="sum")
        for array, begin in zip(moving, origin, strict=True):
            value = value + penalty * (array - begin).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return Stack(start.voters, *(array.detach().numpy() for array in moving))


def log_loss(probabilities: FloatArray, truth: NDArray[np.int64]) -> float:
    """Mean negative log-probability of the truth."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(truth)), truth], 1e-9)).mean()) if len(truth) else 0.0
