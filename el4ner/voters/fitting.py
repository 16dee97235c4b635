"""Fits read-outs (`el4ner.voters.readout`) on the words of labelled sentences.

The fit minimises cross-entropy over spans; no gradient touches the models that made the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from el4ner.engines.base import IntArray
from el4ner.errors import ShapeError
from el4ner.voters.readout import PARTS, Readout

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class Corpus:
    """The pool as one long run of words.

    values (T, D) f16 or f32, what a `Projection` makes of the features. starts (S+1,) i64: the words of sentence s are
    starts[s] to starts[s+1]. targets: per sentence (first word, last word, label index) of the entities that fall on
    word borders.
    """

    values: NDArray[np.floating]
    starts: IntArray
    targets: Sequence[Sequence[tuple[int, int, int]]]

    @property
    def n_sentences(self) -> int:
        """Number of sentences."""
        return len(self.starts) - 1


@dataclass(frozen=True)
class FitSettings:
    """How read-outs are fitted.

    hidden: units of each hidden layer, 0 for a linear read-out. decay: decoupled weight decay. dropout: share of units
    left out of a step. feature_dropout: noise on the features, as large as if this share of them were left out.
    negatives: share of the spans that are no entity that a step looks at, weighted to count as all of them.
    context: read the words beside a span.
    """

    hidden: int = 128
    decay: float = 0.05
    dropout: float = 0.2
    feature_dropout: float = 0.3
    negatives: float = 0.3
    context: bool = True


@dataclass(frozen=True)
class Material:
    """Some sentences of a corpus to fit on, and how many labels its targets have."""

    corpus: Corpus
    sentences: Sequence[int]
    n_labels: int

    def usable(self) -> list[int]:
        """The sentences that have words."""
        return [s for s in self.sentences if self.corpus.starts[s + 1] > self.corpus.starts[s]]


class FitStopped(Exception):  # noqa: N818 - nothing went wrong
    """A fit was told to stop before its end."""


def fit_readouts(
    material: Material, max_words: int, settings: FitSettings, seed: int = 0, heads: int = 1,
    beside: Material | None = None, start: Sequence[Readout] = (), stop: Event | None = None,
) -> tuple[Readout, ...]:  # fmt: skip
    """Fits read-outs on some sentences of a corpus from different starts, by AdamW with a one-cycle schedule.

    The heads see the same batches, each with dropout of its own. beside: sentences with other labels, which share the
    hidden layers and have an output of their own; that output is not kept. start: read-outs of the same features that
    were fitted before, for whatever labels; the hidden layers begin there, head by head in turn. Deterministic for
    the same material, settings, seed and number of heads, and for the same machine. Raises ShapeError where a read-out
    of `start` has other features or hidden layers, FitStopped soon after `stop` was set.
    """
    import torch

    tasks = [Material(m.corpus, m.usable(), m.n_labels) for m in (material, beside) if m is not None]
    generator = torch.Generator().manual_seed(seed)
    columns = [task.n_labels + 1 for task in tasks]
    net = _Net(heads, material.corpus.values.shape[1], columns, max_words, settings, generator)
    if start:
        net.begin_at(start)
    if tasks[0].sentences:
        _descend(net, _gather(tasks, max_words), settings, np.random.default_rng(seed), generator, stop or Event())
    return net.readouts()


def _descend(
    net: _Net, words: _Words, settings: FitSettings, rng: np.random.Generator, generator: Generator, stop: Event
) -> None:
    """Fits the net's weights to the words."""
    import torch

    n_sentences, max_words = len(words.sentences), words.target.shape[1]
    batch = int(np.clip(n_sentences // 50, 8, 32))
    per_epoch = -(-n_sentences // batch)
    epochs = int(np.clip(-(-_STEPS // per_epoch), 6, 40))
    optimiser = torch.optim.AdamW(net.weights.values(), lr=_RATE, weight_decay=settings.decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, per_epoch * epochs, pct_start=0.1)
    spread = (settings.feature_dropout / (1 - settings.feature_dropout)) ** 0.5
    noise = _Draws(spread * torch.randn(_N_DRAWS, generator=generator), generator)
    lengths = torch.arange(max_words)
    for _ in range(epochs):
        order = rng.permutation(n_sentences)
        for begin in range(0, n_sentences, batch):
            if stop.is_set():
                raise FitStopped
            picked = torch.cat([torch.arange(*words.sentences[i]) for i in order[begin : begin + batch]])
            values = words.values(order[begin : begin + batch])
            left, entity = words.left[picked], words.entity[picked]
            if spread:
                values = values + noise.take(values.shape)
            looked = entity | (torch.rand(entity.shape, generator=generator) < settings.negatives)
            first, length = (looked & (lengths < left[:, None])).nonzero(as_tuple=True)
            scores = net.scores(values, left, first, length) + net.barred[words.task[picked[first]]]
            target, n_columns = words.target[picked[first], length], scores.shape[2]
            losses = torch.nn.functional.cross_entropy(
                scores.reshape(-1, n_columns), target.repeat(net.n_heads), reduction="none"
            )
            weight = torch.where(entity[first, length], 1.0, 1.0 / settings.negatives)
            optimiser.zero_grad()
            ((losses.view(net.n_heads, -1) * weight).sum() / len(picked)).backward()
            net.clip_gradients(1.0)
            optimiser.step()
            schedule.step()


@contextmanager
def one_thread_each() -> Iterator[Callable[[], None]]:
    """For fits that run beside one another: torch keeps to one thread in every thread that calls what is yielded.

    The products of a fit are small. Several threads gain little on them, lose much on a busy machine, where they wait
    for one another, and would make a fit depend on their number.
    """
    import torch

    before = torch.get_num_threads()
    try:
        yield lambda: torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)


_RATE = 2e-3
_STEPS = 800
"""Steps of a fit, within 6 to 40 passes over the sentences: on WNUT17 twice as many changed nothing on dev."""
_N_DRAWS = 1 << 22
_SHARE_OF_OUTPUT = 0.3
"""What is left of the drawn columns of labels where a fit begins at hidden layers that say something already."""


class _Draws:
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


class _Net:
    """What is fitted, as tensors by name (shapes as in `Readout` after an axis of E heads), and its scores.

    The parts lie side by side, (E, W, 5 K): one product makes all.
    """

    def __init__(
        self, heads: int, width: int, task_columns: Sequence[int], max_words: int, settings: FitSettings,
        generator: Generator,
    ) -> None:  # fmt: skip
        import torch

        def draw(*shape: int) -> Tensor:
            """Uniform within 1 / sqrt(rows), as linear layers usually start."""
            drawn: Tensor = (torch.rand((heads, *shape), generator=generator) * 2 - 1) * shape[-2] ** -0.5
            return drawn

        zeros = partial(torch.zeros, heads)
        units, columns = settings.hidden, sum(task_columns)
        ends = np.cumsum(task_columns)
        self.n_heads = heads
        self._settings = settings
        self._kept = int(task_columns[0])
        # added to the scores of a sentence of task t: the columns of the other tasks are out of question
        self.barred = torch.full((len(task_columns), columns), -1e9)
        for task, (size, end) in enumerate(zip(task_columns, ends, strict=True)):
            self.barred[task, end - size : end] = 0.0
        self.weights: dict[str, Tensor] = {
            "word": draw(width, units) if units else zeros(width, 0),
            "word_bias": zeros(units),
            "mix": draw(3 * units, units) if units else zeros(0, 0),
            "mix_bias": zeros(units),
            "parts": draw(units, len(PARTS) * units) if units else zeros(width, len(PARTS) * columns),
            "hidden": zeros(max_words, units),
            "output": draw(units, columns) if units else zeros(0, columns),
            "bias": zeros(max_words, columns),
        }
        self.weights["bias"][:, :, ends - 1] = 4.0  # nearly every span is no entity
        for tensor in self.weights.values():
            tensor.requires_grad_()
        share = settings.dropout
        kept = (torch.rand(_N_DRAWS, generator=generator) >= share).float() / (1 - share) if share else torch.ones(1)
        self._masks = _Draws(kept, generator)

    def begin_at(self, start: Sequence[Readout]) -> None:
        """Takes over hidden layers that were fitted before, and what they say of spans that are no entity.

        What says which label it is begins small: it has nothing to go by yet.
        """
        import torch

        for e in range(self.n_heads):
            own, given = {name: tensor[e] for name, tensor in self.weights.items()}, start[e % len(start)]
            parts = np.concatenate(list(given.parts), axis=1)
            if own["word"].shape != given.word.shape or own["parts"].shape != parts.shape:
                raise ShapeError(
                    f"a fit of {tuple(own['word'].shape)} features by units cannot begin at {given.word.shape}"
                )
            # a longer span than those known before begins as the longest of them
            lengths = np.minimum(np.arange(len(own["bias"])), given.max_words - 1)
            none = self._kept - 1
            with torch.no_grad():
                for name in ("word", "word_bias", "mix", "mix_bias"):
                    own[name].copy_(torch.from_numpy(getattr(given, name)))
                own["parts"].copy_(torch.from_numpy(parts))
                own["hidden"].copy_(torch.from_numpy(given.hidden[lengths]))
                own["output"].mul_(_SHARE_OF_OUTPUT)
                own["output"][:, none].copy_(torch.from_numpy(given.output[:, -1]))
                own["bias"][:, none].copy_(torch.from_numpy(given.bias[lengths, -1]))

    def scores(self, values: Tensor, left: Tensor, first: Tensor, length: Tensor) -> Tensor:
        """Scores (E, n, C) of the spans of words first to first + length.

        values (T, D) f32; left (T,) i64, the words left of each word's
        sentence, itself counted.
        """
        import torch

        own = self.weights
        seen = self._words(values.expand(self.n_heads, *values.shape), left)
        start, mean, end, before, after = torch.bmm(seen, own["parts"]).chunk(len(PARTS), dim=2)
        if self._settings.context:
            start, end = start + _shifted(before, left, 1), end + _shifted(after, left, -1)
        sums = torch.nn.functional.pad(mean.cumsum(1), (0, 0, 1, 0))
        start, low = torch.cat([start, sums[:, :-1]], dim=2).index_select(1, first).chunk(2, dim=2)
        end, high = torch.cat([end, sums[:, 1:]], dim=2).index_select(1, first + length).chunk(2, dim=2)
        found = start + end + (high - low) / (length + 1)[:, None]
        bias = own["bias"].index_select(1, length)
        if not self._settings.hidden:
            return found + bias
        hidden = self._dropped(torch.relu(found + own["hidden"].index_select(1, length)))
        return torch.baddbmm(bias, hidden, own["output"])

    def _words(self, values: Tensor, left: Tensor) -> Tensor:
        import torch

        if not self._settings.hidden:
            return values
        own = self.weights
        word = self._dropped(torch.relu(torch.baddbmm(own["word_bias"][:, None], values, own["word"])))
        around = torch.cat([_shifted(word, left, 1), word, _shifted(word, left, -1)], dim=2)
        return word + self._dropped(torch.relu(torch.baddbmm(own["mix_bias"][:, None], around, own["mix"])))

    def _dropped(self, values: Tensor) -> Tensor:
        return values * self._masks.take(values.shape) if self._settings.dropout else values

    def clip_gradients(self, longest: float) -> None:
        """Shortens the gradient of every head whose length exceeds this; no head's gradient bears on another's."""
        gradients = [tensor.grad for tensor in self.weights.values() if tensor.grad is not None]
        squares = sum(gradient.flatten(1).square().sum(1) for gradient in gradients)
        factor = (longest / (squares**0.5 + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))

    def readouts(self) -> tuple[Readout, ...]:
        """The heads."""
        own = {name: tensor.detach() for name, tensor in self.weights.items()}
        n_heads, rows = own["parts"].shape[:2]
        own["parts"] = own["parts"].view(n_heads, rows, len(PARTS), -1).transpose(1, 2)
        if not self._settings.context:
            own["parts"] = own["parts"].clone()
            own["parts"][:, 3:] = 0.0
        for name in ("bias", "output") if self._settings.hidden else ("bias", "parts"):
            own[name] = own[name][..., : self._kept]
        heads = [{name: tensor[e].contiguous().numpy().copy() for name, tensor in own.items()} for e in range(n_heads)]
        return tuple(Readout(**head) for head in heads)


def _shifted(rows: Tensor, left: Tensor, by: int) -> Tensor:
    """Each word gets the row of the word before it (by=1) or after it (by=-1) in its own sentence, else zeros.

    rows (E, T, W); left (T,) as in `_Net.scores`.
    """
    import torch

    goes_on = (left[:-1] > 1)[:, None]
    edge = torch.zeros_like(rows[:, :1])
    return torch.cat([edge, rows[:, :-1] * goes_on] if by > 0 else [rows[:, 1:] * goes_on, edge], dim=1)


@dataclass(frozen=True)
class _Words:
    """All words of some tasks' sentences, one run.

    blocks: corpus, first word and the one past the last of every sentence; left (T,) i64 as in `_Net.scores`; task (T,)
    i64; target (T, N) i64 and entity (T, N) bool of the span that begins at a word and goes on for n more; sentences:
    first word and the one past the last.
    """

    blocks: list[tuple[Corpus, int, int]]
    left: Tensor
    task: Tensor
    target: Tensor
    entity: Tensor
    sentences: list[tuple[int, int]]

    def values(self, chosen: Sequence[int] | IntArray) -> Tensor:
        """What the words of the chosen sentences are, in order: (T, D) f32."""
        import torch

        own = (self.blocks[i] for i in chosen)
        return torch.from_numpy(np.concatenate([c.values[low:high] for c, low, high in own]).astype(np.float32))


def _gather(tasks: Sequence[Material], max_words: int) -> _Words:
    """The tasks' sentences, in order; a target counts the columns of the tasks before its own."""
    import torch

    left, task, targets, entities, blocks = [], [], [], [], []
    sentences, n_before, n_words = [], 0, 0
    for number, own in enumerate(tasks):
        for s in own.sentences:
            low, high = int(own.corpus.starts[s]), int(own.corpus.starts[s + 1])
            n_own = high - low
            target = np.full((n_own, max_words), n_before + own.n_labels, dtype=np.int64)
            entity = np.zeros(target.shape, dtype=bool)
            for first, last, label in own.corpus.targets[s]:
                if last - first < max_words:
                    target[first, last - first] = n_before + label
                    entity[first, last - first] = True
            blocks.append((own.corpus, low, high))
            left.append(np.arange(n_own, 0, -1))
            task.append(np.full(n_own, number))
            targets.append(target)
            entities.append(entity)
            sentences.append((n_words, n_words + n_own))
            n_words += n_own
        n_before += own.n_labels + 1
    return _Words(
        blocks, torch.from_numpy(np.concatenate(left)), torch.from_numpy(np.concatenate(task)),
        torch.from_numpy(np.concatenate(targets)), torch.from_numpy(np.concatenate(entities)), sentences,
    )  # fmt: skip
