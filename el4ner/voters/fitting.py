"""Fits read-outs (`el4ner.voters.readout`) and taggers (`el4ner.voters.tagging`) on the words of labelled sentences.

The fit minimises the cross-entropy of spans, or that of tags; no gradient touches the models that made the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from el4ner.engines.base import IntArray
from el4ner.voters.readout import Readout
from el4ner.voters.tagging import Tagger, tags_of
from el4ner.voters.word_layers import N_DRAWS, Draws

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
    """How read-outs and taggers are fitted.

    hidden: units of each hidden layer, 0 for a linear read-out. decay: decoupled weight decay. dropout: share of units
    left out of a step. feature_dropout: noise on the features, as large as if this share of them were left out.
    negatives: share of the spans that are no entity that a step looks at, weighted to count as all of them.
    context: read the words beside a span. The last two are of read-outs alone.
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


_Fitted = TypeVar("_Fitted", covariant=True)


class _Net(Protocol[_Fitted]):
    """What is fitted: weights of several heads by name, an axis of heads in front."""

    weights: dict[str, Tensor]

    def begin_at(self, start: Sequence[Readout]) -> None: ...

    def loss(self, values: Tensor, words: Words, picked: Tensor, generator: Generator) -> Tensor: ...

    def clip_gradients(self, longest: float) -> None: ...

    def heads(self) -> tuple[_Fitted, ...]: ...


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
    from el4ner.voters.span_net import SpanNet

    return _fit(SpanNet, material, max_words, settings, seed, heads, beside, start, stop)


def fit_taggers(
    material: Material, max_words: int, settings: FitSettings, seed: int = 0, heads: int = 1,
    beside: Material | None = None, start: Sequence[Readout] = (), stop: Event | None = None,
) -> tuple[Tagger, ...]:  # fmt: skip
    """Fits taggers, all else as `fit_readouts`: of `start` only the layers of words are taken.

    max_words: of the spans that they are asked about; what is fitted does not depend on it.
    """
    from el4ner.voters.tag_net import TagNet

    return _fit(TagNet, material, max_words, settings, seed, heads, beside, start, stop)


def _fit(
    net_of: Callable[..., _Net[_Fitted]], material: Material, max_words: int, settings: FitSettings, seed: int,
    heads: int, beside: Material | None, start: Sequence[Readout], stop: Event | None,
) -> tuple[_Fitted, ...]:  # fmt: skip
    import torch

    tasks = [Material(m.corpus, m.usable(), m.n_labels) for m in (material, beside) if m is not None]
    generator = torch.Generator().manual_seed(seed)
    columns = [task.n_labels + 1 for task in tasks]
    net = net_of(heads, material.corpus.values.shape[1], columns, max_words, settings, generator)
    if start:
        net.begin_at(start)
    if tasks[0].sentences:
        _descend(net, _gather(tasks, max_words), settings, np.random.default_rng(seed), generator, stop or Event())
    return net.heads()


def _descend(
    net: _Net[_Fitted], words: Words, settings: FitSettings, rng: np.random.Generator, generator: Generator, stop: Event
) -> None:
    """Fits the net's weights to the words."""
    import torch

    n_sentences = len(words.sentences)
    batch = int(np.clip(n_sentences // 50, 8, 32))
    per_epoch = -(-n_sentences // batch)
    epochs = int(np.clip(-(-_STEPS // per_epoch), 6, 40))
    optimiser = torch.optim.AdamW(net.weights.values(), lr=_RATE, weight_decay=settings.decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, per_epoch * epochs, pct_start=0.1)
    spread = (settings.feature_dropout / (1 - settings.feature_dropout)) ** 0.5
    noise = Draws(spread * torch.randn(N_DRAWS, generator=generator), generator)
    for _ in range(epochs):
        order = rng.permutation(n_sentences)
        for begin in range(0, n_sentences, batch):
            if stop.is_set():
                raise FitStopped
            picked = torch.cat([torch.arange(*words.sentences[i]) for i in order[begin : begin + batch]])
            values = words.values(order[begin : begin + batch])
            if spread:
                values = values + noise.take(values.shape)
            optimiser.zero_grad()
            net.loss(values, words, picked, generator).backward()
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


@dataclass(frozen=True)
class Words:
    """All words of some tasks' sentences, one run.

    blocks: corpus, first word and the one past the last of every sentence; left (T,) i64 as in `SpanNet.scores`; task
    (T,) i64; target (T, N) i64 and entity (T, N) bool of the span that begins at a word and goes on for n more; tags
    (T,) i64 as `tagging.tags_of` makes them for each task's own labels; sentences: first word and the one past the
    last.
    """

    blocks: list[tuple[Corpus, int, int]]
    left: Tensor
    task: Tensor
    target: Tensor
    entity: Tensor
    tags: Tensor
    sentences: list[tuple[int, int]]

    def values(self, chosen: Sequence[int] | IntArray) -> Tensor:
        """What the words of the chosen sentences are, in order: (T, D) f32."""
        import torch

        own = (self.blocks[i] for i in chosen)
        return torch.from_numpy(np.concatenate([c.values[low:high] for c, low, high in own]).astype(np.float32))


def _gather(tasks: Sequence[Material], max_words: int) -> Words:
    """The tasks' sentences, in order; a target counts the columns of the tasks before its own."""
    import torch

    left, task, targets, entities, tags, blocks = [], [], [], [], [], []
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
            tags.append(tags_of(n_own, own.corpus.targets[s]))
            sentences.append((n_words, n_words + n_own))
            n_words += n_own
        n_before += own.n_labels + 1
    return Words(
        blocks, torch.from_numpy(np.concatenate(left)), torch.from_numpy(np.concatenate(task)),
        torch.from_numpy(np.concatenate(targets)), torch.from_numpy(np.concatenate(entities)),
        torch.from_numpy(np.concatenate(tags)), sentences,
    )  # fmt: skip
