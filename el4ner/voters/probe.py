"""A probe: from the state of a model behind a question about a span to a distribution over the labels and "none".

    h = relu(x W + b),   p(label | span) = softmax(h V + c)

One hidden layer over states that no gradient touches, fitted by cross-entropy. Several are fitted from different
starts; their log-probabilities are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from el4ner.engines.base import FloatArray


@dataclass(frozen=True)
class Probe:
    """hidden (D, K), hidden_bias (K,), output (K, C), bias (C,), all f32; C = labels + "none"."""

    hidden: FloatArray
    hidden_bias: FloatArray
    output: FloatArray
    bias: FloatArray

    def scores(self, row: FloatArray) -> FloatArray:
        """Unnormalised log-probabilities (C,) of one span's features (D,)."""
        found: FloatArray = np.maximum(row @ self.hidden + self.hidden_bias, 0) @ self.output + self.bias
        return found

    def to_arrays(self) -> dict[str, FloatArray]:
        """Named arrays for a cache."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.floating]]) -> Probe:
        """The inverse of `to_arrays`."""
        return cls(**{field.name: np.asarray(arrays[field.name], np.float32) for field in fields(cls)})


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are fitted: hidden units, decoupled weight decay, share of units and features left out of a step."""

    hidden: int = 128
    decay: float = 0.1
    dropout: float = 0.3


def mean_distribution(probes: Sequence[Probe], row: FloatArray) -> FloatArray:
    """Distribution (C,) of one span's features (D,): the geometric mean of the probes', normalised.

    Span by span, since a matrix product may depend on how many rows it is given.
    """
    total = np.zeros(len(probes[0].bias))
    for probe in probes:
        scores = probe.scores(row).astype(np.float64)
        top = scores.max()
        total += scores - top - np.log(np.exp(scores - top).sum())
    odds = np.exp(total / len(probes) - (total / len(probes)).max())
    return np.asarray(odds / odds.sum(), dtype=np.float32)


_RATE = 2e-3
_BATCH = 64
_PASSES = 40
_STEPS = (400, 4000)
"""Least and most steps of a fit; between them 40 passes over the spans."""


def fit_probes(
    values: FloatArray, truth: NDArray[np.int64], n_columns: int, settings: ProbeSettings, seed: int = 0, heads: int = 1
) -> tuple[Probe, ...]:
    """Probes fitted from different starts on spans with features (n, D) and label indices (n,), "none" last.

    By AdamW with a one-cycle schedule; the heads see the same batches, each with dropout of its own. Deterministic for
    the same arguments and machine.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    given, target = torch.from_numpy(np.ascontiguousarray(values, np.float32)), torch.from_numpy(truth)
    width, units = values.shape[1], settings.hidden

    def draw(*shape: int) -> torch.Tensor:
        drawn: torch.Tensor = (torch.rand((heads, *shape), generator=generator) * 2 - 1) * shape[0] ** -0.5
        return drawn.requires_grad_()

    zeros = (torch.zeros(heads, 1, n).requires_grad_() for n in (units, n_columns))
    hidden, output = draw(width, units), draw(units, n_columns)
    hidden_bias, bias = zeros
    own = (hidden, hidden_bias, output, bias)
    if len(truth):
        steps = int(np.clip(_PASSES * len(truth) // _BATCH, *_STEPS))
        optimiser = torch.optim.AdamW(own, lr=_RATE, weight_decay=settings.decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, steps, pct_start=0.1)

        def dropped(rows: torch.Tensor) -> torch.Tensor:
            kept = torch.rand(rows.shape, generator=generator) >= settings.dropout
            return rows * kept / (1 - settings.dropout)

        for _ in range(steps):
            picked = torch.randint(len(target), (_BATCH,), generator=generator)
            rows = dropped(given[picked].expand(heads, -1, -1))
            scores = torch.baddbmm(bias, dropped(torch.relu(torch.baddbmm(hidden_bias, rows, hidden))), output)
            wanted = target[picked].repeat(heads)
            # summed over heads, none of which bears on another's gradient
            loss = torch.nn.functional.cross_entropy(scores.reshape(-1, n_columns), wanted, reduction="sum") / _BATCH
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    arrays = [tensor.detach().numpy() for tensor in own]
    return tuple(
        Probe(arrays[0][e].copy(), arrays[1][e, 0].copy(), arrays[2][e].copy(), arrays[3][e, 0].copy())
        for e in range(heads)
    )
