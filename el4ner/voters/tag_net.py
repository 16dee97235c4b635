"""A tagger (`el4ner.voters.tagging`) while it is fitted: the likelihood of the tags of some sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from el4ner.voters.tagging import LOWEST, Tagger, allowed
from el4ner.voters.word_layers import WORD_LAYERS, WordLayers, WordWeights

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from el4ner.voters.fitting import FitSettings, Words


class TagNet(WordLayers):
    """What is fitted: the word layers, and for each task an output (W, K), a bias (K,) and transitions (K, K).

    task_columns: labels and "none" of each task; the first task's tagger is kept.
    """

    def __init__(
        self, heads: int, width: int, task_columns: Sequence[int], max_words: int, settings: FitSettings,
        generator: Generator,
    ) -> None:  # fmt: skip
        import torch

        super().__init__(heads, width, settings, generator)
        self._max_words = max_words
        self._may: list[Tensor] = []
        for task, columns in enumerate(task_columns):
            n_tags = 2 * columns - 1
            units = settings.hidden
            bias = self.zeros(n_tags)
            bias[:, 0] = 2.0  # most words are of no entity
            self.weights |= {
                f"output {task}": self.draw(units, n_tags) if units else self.zeros(width, n_tags),
                f"bias {task}": bias,
                f"transitions {task}": self.zeros(n_tags, n_tags),
            }
            self._may.append(torch.from_numpy(allowed(n_tags)))
        self.ready()

    def begin_at(self, start: Sequence[WordWeights]) -> None:
        """Takes over the word layers of heads that were fitted before."""
        self.begin_words_at(start)

    def loss(self, values: Tensor, words: Words, picked: Tensor, _: Generator) -> Tensor:
        """Negative log-likelihood of the picked words' tags, summed over heads, per word; shapes as in `SpanNet.loss`.

        Draws nothing but the units that are left out.
        """
        import torch

        left, task = words.left[picked], words.task[picked]
        seen = self.words(values, left)
        ends = (left == 1).nonzero()[:, 0] + 1
        begins = torch.cat([ends.new_zeros(1), ends[:-1]])
        total = values.new_zeros(())
        for number, may in enumerate(self._may):
            own = task[begins] == number
            if not own.any():
                continue
            weights = [self.weights[f"{name} {number}"] for name in ("output", "bias", "transitions")]
            output, bias, transitions = weights
            scores = torch.baddbmm(bias[:, None], seen, output)
            sizes = (ends - begins)[own]
            total = total - log_likelihood(scores, transitions, may, begins[own], sizes, words.tags[picked]).sum()
        return total / len(picked)

    def heads(self) -> tuple[Tagger, ...]:
        """The heads as they are now."""
        kept = {name: self.weights[name] for name in WORD_LAYERS}
        kept |= {name: self.weights[f"{name} 0"] for name in ("output", "bias", "transitions")}
        longest = np.array([self._max_words], dtype=np.float32)
        return tuple(
            Tagger(**{name: tensor[e].detach().numpy().copy() for name, tensor in kept.items()}, longest=longest)
            for e in range(self.n_heads)
        )


def log_likelihood(
    scores: Tensor, transitions: Tensor, may: Tensor, begins: Tensor, sizes: Tensor, tags: Tensor
) -> Tensor:
    """Log-probability (E, B) f64 of the tags of B sentences under E chains (the formula is in `el4ner.voters.tagging`).

    scores (E, T, K), transitions (E, K, K) f32; may (K, K) bool; begins, sizes (B,) i64: first word of each sentence
    and how many it has; tags (T,) i64; B >= 1. Of the words of no
    sentence nothing is read. In the sum over all sequences scores below `LOWEST` count as that.
    """
    import torch

    steps = torch.arange(int(sizes.max()))
    inside = steps < sizes[:, None]  # (B, longest)
    places = torch.where(inside, begins[:, None] + steps, begins[:, None])
    told = torch.where(inside, tags[places], 0)
    shown = scores[:, places].double()  # (E, B, longest, K)
    step = torch.where(may, transitions.double().exp(), 0.0)
    top = shown.detach().amax(dim=3, keepdim=True)
    own = (shown - top).clamp(min=LOWEST).exp()
    forward = step[:, :1] * own[:, :, 0]  # the word before the first one is O
    size = forward.sum(dim=2, keepdim=True)
    forward = forward / size
    logs = [size.log()[:, :, 0]]
    for t in range(1, len(steps)):
        further = torch.bmm(forward, step) * own[:, :, t]
        size = further.sum(dim=2, keepdim=True)
        goes_on = inside[:, t, None]
        forward = torch.where(goes_on, further / size, forward)
        logs.append(torch.where(goes_on, size.log(), 0.0)[:, :, 0])
    whole = torch.stack(logs).sum(0) + (top[..., 0] * inside).sum(2)
    whole = whole + torch.bmm(forward, step[:, :, :1])[:, :, 0].log()
    before = torch.nn.functional.pad(told[:, :-1], (1, 0))
    said = shown.gather(3, told[None, :, :, None].expand(len(scores), -1, -1, 1))[..., 0]
    moved = transitions.double()[:, before, told]
    last = told.gather(1, sizes[:, None] - 1)[:, 0]
    return ((said + moved) * inside).sum(2) + transitions.double()[:, last, 0] - whole
