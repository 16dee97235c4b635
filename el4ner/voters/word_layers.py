"""The layers below every head while it is fitted: a word from its features, and a word among its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from el4ner.engines.base import FloatArray
from el4ner.errors import ShapeError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from el4ner.voters.fitting import FitSettings

N_DRAWS = 1 << 22
"""Random numbers that are drawn for a fit, to be used again and again."""


class Head(Protocol):
    """What is fitted over these layers, by whatever it scores."""

    def log_probabilities(self, values: FloatArray) -> FloatArray:
        """Features (T, D) of one sentence's words -> (T, N, C), all spans of up to N words, "none" last."""
        ...

    def to_arrays(self) -> dict[str, FloatArray]:
        """Named arrays for a cache."""
        ...


@dataclass(frozen=True)
class WordWeights:
    """These layers once fitted, all f32: word (D, W), word_bias (W,), mix (3 W, W), mix_bias (W,); W = 0 for none."""

    word: FloatArray
    word_bias: FloatArray
    mix: FloatArray
    mix_bias: FloatArray

    def among_neighbours(self, values: FloatArray) -> FloatArray:
        """Features (T, D) of one sentence's words -> g (T, W); the features where there are no layers."""
        if not self.word.shape[1]:
            return values
        own = np.maximum(values @ self.word + self.word_bias, 0)
        edge = np.zeros_like(own[:1])
        around = np.concatenate([np.concatenate([edge, own[:-1]]), own, np.concatenate([own[1:], edge])], axis=1)
        mixed: FloatArray = own + np.maximum(around @ self.mix + self.mix_bias, 0)
        return mixed


class Draws:
    """Random numbers (n,) drawn once, of which a random stretch is used: fresh ones cost as much as the fit."""

    def __init__(self, drawn: Tensor, generator: Generator) -> None:
        self._drawn = drawn
        self._generator = generator

    def take(self, shape: Sequence[int]) -> Tensor:
        """Numbers of this shape."""
        import torch

        size = int(np.prod(shape))
        while len(self._drawn) < 2 * size:
            self._drawn = torch.cat([self._drawn, self._drawn])
        begin = int(torch.randint(len(self._drawn) - size + 1, (), generator=self._generator))
        return self._drawn[begin : begin + size].view(*shape)


class WordLayers:
    """Tensors by name, each with an axis of E heads in front, that make g_i of x (see `el4ner.voters.readout`).

    A subclass adds its own tensors to `weights`, in the order in which they are drawn, and then calls `ready`.
    """

    def __init__(self, heads: int, width: int, settings: FitSettings, generator: Generator) -> None:
        import torch

        self.n_heads = heads
        self.settings = settings
        self._generator = generator
        self.zeros = partial(torch.zeros, heads)
        units = settings.hidden
        self.weights: dict[str, Tensor] = {
            "word": self.draw(width, units) if units else self.zeros(width, 0),
            "word_bias": self.zeros(units),
            "mix": self.draw(3 * units, units) if units else self.zeros(0, 0),
            "mix_bias": self.zeros(units),
        }
        self._masks = Draws(torch.ones(1), generator)

    def draw(self, *shape: int) -> Tensor:
        """Uniform within 1 / sqrt(rows), as linear layers usually start."""
        import torch

        drawn: Tensor = (torch.rand((self.n_heads, *shape), generator=self._generator) * 2 - 1) * shape[-2] ** -0.5
        return drawn

    def ready(self) -> None:
        """From here on the weights are fitted; draws which units a step leaves out."""
        import torch

        for tensor in self.weights.values():
            tensor.requires_grad_()
        if share := self.settings.dropout:
            kept = (torch.rand(N_DRAWS, generator=self._generator) >= share).float() / (1 - share)
            self._masks = Draws(kept, self._generator)

    def begin_words_at(self, start: Sequence[WordWeights]) -> None:
        """Takes over these layers of heads that were fitted before, in turn. Raises ShapeError for other features."""
        import torch

        for e in range(self.n_heads):
            given = start[e % len(start)]
            own = {name: self.weights[name][e] for name in WORD_LAYERS}
            if own["word"].shape != given.word.shape:
                raise ShapeError(
                    f"a fit of {tuple(own['word'].shape)} features by units cannot begin at {given.word.shape}"
                )
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(torch.from_numpy(getattr(given, name)))

    def words(self, values: Tensor, left: Tensor) -> Tensor:
        """values (T, D) f32 -> (E, T, W); left (T,) i64, the words left of each word's sentence, itself counted."""
        import torch

        spread = values.expand(self.n_heads, *values.shape)
        if not self.settings.hidden:
            return spread
        own = self.weights
        word = self.dropped(torch.relu(torch.baddbmm(own["word_bias"][:, None], spread, own["word"])))
        around = torch.cat([shifted(word, left, 1), word, shifted(word, left, -1)], dim=2)
        return word + self.dropped(torch.relu(torch.baddbmm(own["mix_bias"][:, None], around, own["mix"])))

    def dropped(self, values: Tensor) -> Tensor:
        """The same with some of the units left out, the others larger for it."""
        return values * self._masks.take(values.shape) if self.settings.dropout else values

    def clip_gradients(self, longest: float) -> None:
        """Shortens the gradient of every head whose length exceeds this; no head's gradient bears on another's."""
        gradients = [tensor.grad for tensor in self.weights.values() if tensor.grad is not None]
        squares = sum(gradient.flatten(1).square().sum(1) for gradient in gradients)
        factor = (longest / (squares**0.5 + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))


WORD_LAYERS = tuple(field.name for field in fields(WordWeights))


def shifted(rows: Tensor, left: Tensor, by: int) -> Tensor:
    """Each word gets the row of the word before it (by=1) or after it (by=-1) in its own sentence, else zeros.

    rows (E, T, W); left (T,) as in `WordLayers.words`.
    """
    import torch

    goes_on = (left[:-1] > 1)[:, None]
    edge = torch.zeros_like(rows[:, :1])
    return torch.cat([edge, rows[:, :-1] * goes_on] if by > 0 else [rows[:, 1:] * goes_on, edge], dim=1)
