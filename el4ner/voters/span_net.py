"""A read-out of spans (`el4ner.voters.readout`) while it is fitted: its scores, and the loss of some sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from el4ner.errors import ShapeError
from el4ner.voters.readout import PARTS, Readout
from el4ner.voters.word_layers import WordLayers, shifted

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from el4ner.voters.fitting import FitSettings, Words

_SHARE_OF_OUTPUT = 0.3
"""What is left of the drawn columns of labels where a fit begins at hidden layers that say something already."""


class SpanNet(WordLayers):
    """What is fitted, as tensors by name (shapes as in `Readout` after an axis of E heads), and its scores.

    The parts lie side by side, (E, W, 5 K): one product makes all. task_columns: labels and "none" of each task; the
    first task's columns are kept.
    """

    def __init__(
        self, heads: int, width: int, task_columns: Sequence[int], max_words: int, settings: FitSettings,
        generator: Generator,
    ) -> None:  # fmt: skip
        import torch

        super().__init__(heads, width, settings, generator)
        units, columns = settings.hidden, sum(task_columns)
        ends = np.cumsum(task_columns)
        self._kept = int(task_columns[0])
        # added to the scores of a sentence of task t: the columns of the other tasks are out of question
        self.barred = torch.full((len(task_columns), columns), -1e9)
        for task, (size, end) in enumerate(zip(task_columns, ends, strict=True)):
            self.barred[task, end - size : end] = 0.0
        parts = len(PARTS)
        self.weights |= {
            "parts": self.draw(units, parts * units) if units else self.zeros(width, parts * columns),
            "hidden": self.zeros(max_words, units),
            "output": self.draw(units, columns) if units else self.zeros(0, columns),
            "bias": self.zeros(max_words, columns),
        }
        self.weights["bias"][:, :, ends - 1] = 4.0  # nearly every span is no entity
        self.ready()

    def begin_at(self, start: Sequence[Readout]) -> None:
        """Takes over hidden layers that were fitted before, and what they say of spans that are no entity.

        What says which label it is begins small: it has nothing to go by yet.
        """
        import torch

        self.begin_words_at(start)
        for e in range(self.n_heads):
            own, given = {name: tensor[e] for name, tensor in self.weights.items()}, start[e % len(start)]
            parts = np.concatenate(list(given.parts), axis=1)
            if own["parts"].shape != parts.shape:
                raise ShapeError(f"a fit of parts {tuple(own['parts'].shape)} cannot begin at {parts.shape}")
            # a longer span than those known before begins as the longest of them
            lengths = np.minimum(np.arange(len(own["bias"])), given.max_words - 1)
            none = self._kept - 1
            with torch.no_grad():
                own["parts"].copy_(torch.from_numpy(parts))
                own["hidden"].copy_(torch.from_numpy(given.hidden[lengths]))
                own["output"].mul_(_SHARE_OF_OUTPUT)
                own["output"][:, none].copy_(torch.from_numpy(given.output[:, -1]))
                own["bias"][:, none].copy_(torch.from_numpy(given.bias[lengths, -1]))

    def loss(self, values: Tensor, words: Words, picked: Tensor, generator: Generator) -> Tensor:
        """Cross-entropy over spans of the picked words, summed over heads, per word.

        values (n, D) f32: their features; picked (n,) i64: which words of `words` they are, sentence by sentence.
        """
        import torch

        left, entity = words.left[picked], words.entity[picked]
        negatives = self.settings.negatives
        looked = entity | (torch.rand(entity.shape, generator=generator) < negatives)
        lengths = torch.arange(entity.shape[1])
        first, length = (looked & (lengths < left[:, None])).nonzero(as_tuple=True)
        scores = self.scores(values, left, first, length) + self.barred[words.task[picked[first]]]
        target, n_columns = words.target[picked[first], length], scores.shape[2]
        losses = torch.nn.functional.cross_entropy(
            scores.reshape(-1, n_columns), target.repeat(self.n_heads), reduction="none"
        )
        weight = torch.where(entity[first, length], 1.0, 1.0 / negatives)
        return (losses.view(self.n_heads, -1) * weight).sum() / len(picked)

    def scores(self, values: Tensor, left: Tensor, first: Tensor, length: Tensor) -> Tensor:
        """Scores (E, n, C) of the spans of words first to first + length.

        values (T, D) f32; left (T,) i64, the words left of each word's
        sentence, itself counted.
        """
        import torch

        own = self.weights
        start, mean, end, before, after = torch.bmm(self.words(values, left), own["parts"]).chunk(len(PARTS), dim=2)
        if self.settings.context:
            start, end = start + shifted(before, left, 1), end + shifted(after, left, -1)
        sums = torch.nn.functional.pad(mean.cumsum(1), (0, 0, 1, 0))
        start, low = torch.cat([start, sums[:, :-1]], dim=2).index_select(1, first).chunk(2, dim=2)
        end, high = torch.cat([end, sums[:, 1:]], dim=2).index_select(1, first + length).chunk(2, dim=2)
        found = start + end + (high - low) / (length + 1)[:, None]
        bias = own["bias"].index_select(1, length)
        if not self.settings.hidden:
            return found + bias
        hidden = self.dropped(torch.relu(found + own["hidden"].index_select(1, length)))
        return torch.baddbmm(bias, hidden, own["output"])

    def heads(self) -> tuple[Readout, ...]:
        """The heads as they are now."""
        own = {name: tensor.detach() for name, tensor in self.weights.items()}
        n_heads, rows = own["parts"].shape[:2]
        own["parts"] = own["parts"].view(n_heads, rows, len(PARTS), -1).transpose(1, 2)
        if not self.settings.context:
            own["parts"] = own["parts"].clone()
            own["parts"][:, 3:] = 0.0
        for name in ("bias", "output") if self.settings.hidden else ("bias", "parts"):
            own[name] = own[name][..., : self._kept]
        heads = [{name: tensor[e].contiguous().numpy().copy() for name, tensor in own.items()} for e in range(n_heads)]
        return tuple(Readout(**head) for head in heads)
