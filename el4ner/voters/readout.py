"""A small read-out of word features that scores all spans up to a length, for all labels, at once.

    h_i = relu(E x_i + e)                                  a word, from its standardised features x
    g_i = h_i + relu(G [h_(i-1); h_i; h_(i+1)] + d)        a word among its neighbours
    u[i, n] = F g_i + mean(M g_i .. M g_j) + A g_j + L g_(i-1) + R g_(j+1),   j = i + n
    p(label | span of words i to j) = softmax(V relu(u[i, n] + c[n]) + b[n])

F, M, A, L, R read the first word, the mean, the last word and the words beside the span. u is linear in g, so that of
all spans follows from projected words by prefix sums (`el4ner.kernels.span_scores`). Without hidden layers
(`hidden=0`) it is multinomial logistic regression: g = x and p = softmax(u + b[n]).
The fit minimises cross-entropy over spans; no gradient touches the models that made the features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from el4ner.engines.base import FloatArray, IntArray
from el4ner.errors import ShapeError
from el4ner.kernels import span_scores

if TYPE_CHECKING:
    from torch import Generator, Tensor

PARTS = ("first", "mean", "last", "left", "right")
READOUT_VERSION = 5


@dataclass(frozen=True)
class Readout:
    """Fitted weights, all f32; D features, W word units, K hidden units, N words at most, C labels with "none" last.

    mean, scale (D,); word (D, W) and word_bias (W,); mix (3 W, W) and mix_bias (W,); parts (5, W, K), one matrix a
    part of `PARTS`; hidden (N, K); output (K, C); bias (N, C). A linear read-out has W = 0 columns of `word`, no
    output, and parts (5, D, C).
    """

    mean: FloatArray
    scale: FloatArray
    word: FloatArray
    word_bias: FloatArray
    mix: FloatArray
    mix_bias: FloatArray
    parts: FloatArray
    hidden: FloatArray
    output: FloatArray
    bias: FloatArray

    @property
    def max_words(self) -> int:
        """Longest span, in words."""
        return int(self.bias.shape[0])

    def log_probabilities(self, values: FloatArray) -> FloatArray:
        """values (W, D) f32, the words of one sentence -> (W, N, C) f32: element [i, n] is the span of words i to i+n.

        Spans that leave the sentence hold -inf. Raises ShapeError if D differs.
        """
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            raise ShapeError(f"values {values.shape}; the read-out was fitted on (words, {len(self.mean)})")
        n_words, n_columns = len(values), self.bias.shape[1]
        if not n_words:
            return np.zeros((0, self.max_words, n_columns), dtype=np.float32)
        seen = self._words((values - self.mean) / self.scale)
        first, mean, last, left, right = (seen @ matrix for matrix in self.parts)
        first[1:] += left[:-1]
        last[:-1] += right[1:]
        scores = span_scores(np.ascontiguousarray(mean), np.ascontiguousarray(last), self.max_words, backend="auto")
        scores = scores + first[:, None, :]
        inside = np.isfinite(scores[:, :, :1])
        if len(self.output):
            # spans that leave the sentence hold -inf, which relu turns to 0
            scores = np.maximum(scores + self.hidden[None], 0) @ self.output
        scores = scores + self.bias[None]
        top = scores.max(axis=2, keepdims=True)
        shifted = np.where(inside, scores - np.where(inside, top, 0), 0)
        logp = shifted - np.log(np.exp(shifted).sum(axis=2, keepdims=True))
        return np.where(inside, logp, -np.inf).astype(np.float32)

    def _words(self, standard: FloatArray) -> FloatArray:
        """Standardised features (T, D) of one sentence's words -> (T, W), each among its neighbours."""
        if not self.word.shape[1]:
            return standard
        own = np.maximum(standard @ self.word + self.word_bias, 0)
        edge = np.zeros_like(own[:1])
        around = np.concatenate([np.concatenate([edge, own[:-1]]), own, np.concatenate([own[1:], edge])], axis=1)
        mixed: FloatArray = own + np.maximum(around @ self.mix + self.mix_bias, 0)
        return mixed

    def to_arrays(self) -> dict[str, FloatArray]:
        """Named arrays for a cache."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, FloatArray]) -> Readout:
        """The inverse of `to_arrays`."""
        return cls(*(np.asarray(arrays[name], dtype=np.float32) for name in _FIELDS))


def mean_log_probabilities(heads: Sequence[Readout], values: FloatArray) -> FloatArray:
    """Log of the heads' mean probability, shaped as by `Readout.log_probabilities`."""
    if len(heads) == 1:
        return heads[0].log_probabilities(values)
    with np.errstate(divide="ignore"):
        total = sum(np.exp(head.log_probabilities(values)) for head in heads) / np.float32(len(heads))
        return np.asarray(np.log(total), dtype=np.float32)


_WEIGHTS = ("word", "word_bias", "mix", "mix_bias", "parts", "hidden", "output", "bias")
_FIELDS = ("mean", "scale", *_WEIGHTS)


@dataclass(frozen=True)
class Corpus:
    """The pool as one long run of words.

    values (T, D) f16 or f32; starts (S+1,) i64: sentence s is words starts[s] to starts[s+1].
    targets: per sentence (first word, last word, label index) of the entities that fall on word borders.
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
    """How a read-out is fitted.

    hidden: units of each hidden layer, 0 for a linear read-out. decay: decoupled weight decay. dropout: share of
    units left out of a step; feature_dropout: share of feature values left out. negatives: share of the spans that
    are no entity that a step looks at, weighted to count as all of them. context: read the words beside a span.
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


def fit_readout(
    material: Material, max_words: int, settings: FitSettings, seed: int = 0, beside: Material | None = None
) -> Readout:
    """Fits a read-out on some sentences of a corpus, by AdamW with a one-cycle schedule.

    beside: sentences with other labels, which share the hidden layers and have an output of their own; that output is
    not kept. Deterministic for the same material, settings and seed, and for the same machine.
    """
    import torch

    tasks = [Material(m.corpus, m.usable(), m.n_labels) for m in (material, beside) if m is not None]
    mean, scale = _moments(tasks[0].corpus, tasks[0].sentences)
    chosen = [(task, s) for task, own in enumerate(tasks) for s in own.sentences]
    generator = torch.Generator().manual_seed(seed)
    net = _Net(len(mean), [task.n_labels + 1 for task in tasks], max_words, settings, generator)
    batch = int(np.clip(len(chosen) // 50, 8, 32))
    per_epoch = max(1, -(-len(chosen) // batch))
    epochs = int(np.clip(-(-_STEPS // per_epoch), 6, 40)) if tasks[0].sentences else 0
    optimiser = torch.optim.AdamW(net.weights.values(), lr=_RATE, weight_decay=settings.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, max(1, per_epoch * epochs), pct_start=0.1)
    rng = np.random.default_rng(seed)
    mean_t, scale_t = torch.from_numpy(mean), torch.from_numpy(scale)
    for _ in range(epochs):
        order = rng.permutation(len(chosen))
        for begin in range(0, len(order), batch):
            words = _batch(tasks, [chosen[i] for i in order[begin : begin + batch]], max_words)
            looked = words.entity | (torch.rand(words.target.shape, generator=generator) < settings.negatives)
            first, length = (looked & _inside(words.owner, max_words)).nonzero(as_tuple=True)
            scores = net.scores((words.values - mean_t) / scale_t, words.owner, first, length)
            losses = torch.nn.functional.cross_entropy(
                scores + net.barred[words.task[first]], words.target[first, length], reduction="none"
            )
            weight = torch.where(words.entity[first, length], 1.0, 1.0 / settings.negatives)
            optimiser.zero_grad()
            ((losses * weight).sum() / len(words.values)).backward()
            torch.nn.utils.clip_grad_norm_(list(net.weights.values()), 1.0)
            optimiser.step()
            schedule.step()
    return net.readout(mean, scale)


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


class _Net:
    """What is fitted, as tensors by name (shapes as in `Readout`), and its differentiable scores."""

    def __init__(
        self, width: int, task_columns: Sequence[int], max_words: int, settings: FitSettings, generator: Generator
    ) -> None:
        import torch

        def draw(*shape: int) -> Tensor:
            """Uniform within 1 / sqrt(rows), as linear layers usually start."""
            drawn: Tensor = (torch.rand(shape, generator=generator) * 2 - 1) * shape[-2] ** -0.5
            return drawn

        units, columns = settings.hidden, sum(task_columns)
        ends = np.cumsum(task_columns)
        self._settings = settings
        self._kept = int(task_columns[0])
        # added to the scores of a sentence of task t: the columns of the other tasks are out of question
        self.barred = torch.full((len(task_columns), columns), -1e9)
        for task, (size, end) in enumerate(zip(task_columns, ends, strict=True)):
            self.barred[task, end - size : end] = 0.0
        self._generator = generator
        self._mask: Tensor | None = None
        self.weights: dict[str, Tensor] = {
            "word": draw(width, units) if units else torch.zeros(width, 0),
            "word_bias": torch.zeros(units),
            "mix": draw(3 * units, units) if units else torch.zeros(0, 0),
            "mix_bias": torch.zeros(units),
            "parts": draw(len(PARTS), units, units) if units else torch.zeros(len(PARTS), width, columns),
            "hidden": torch.zeros(max_words, units),
            "output": draw(units, columns) if units else torch.zeros(0, columns),
            "bias": torch.zeros(max_words, columns),
        }
        self.weights["bias"][:, ends - 1] = 4.0  # nearly every span is no entity
        for tensor in self.weights.values():
            tensor.requires_grad_()

    def scores(self, values: Tensor, owner: Tensor, first: Tensor, length: Tensor) -> Tensor:
        """Scores (n, C) of the spans of words first to first + length. values (T, D) standardised, owner (T,)."""
        import torch

        own = self.weights
        seen = self._words(self._masked(values), owner)
        n_columns = own["parts"].shape[2]
        columns = seen @ own["parts"].permute(1, 0, 2).reshape(seen.shape[1], -1)
        start, mean, end, left, right = columns.split(n_columns, dim=1)
        if self._settings.context:
            start, end = start + _shifted(left, owner, 1), end + _shifted(right, owner, -1)
        sums = torch.cat([torch.zeros(1, n_columns), mean.cumsum(0)])
        last = first + length
        found = start[first] + (sums[last + 1] - sums[first]) / (length + 1)[:, None] + end[last]
        if self._settings.hidden:
            found = self._dropped(torch.relu(found + own["hidden"][length]), self._settings.dropout) @ own["output"]
        scores: Tensor = found + own["bias"][length]
        return scores

    def _words(self, values: Tensor, owner: Tensor) -> Tensor:
        import torch

        if not self._settings.hidden:
            return values
        own = self.weights
        word = self._dropped(torch.relu(values @ own["word"] + own["word_bias"]), self._settings.dropout)
        around = torch.cat([_shifted(word, owner, 1), word, _shifted(word, owner, -1)], dim=1)
        mixed: Tensor = word + self._dropped(torch.relu(around @ own["mix"] + own["mix_bias"]), self._settings.dropout)
        return mixed

    def _masked(self, values: Tensor) -> Tensor:
        """Feature dropout. Masks are cut from one long mask: fresh numbers for every value cost as much as the fit."""
        import torch

        share = self._settings.feature_dropout
        if not share:
            return values
        size = values.numel()
        if self._mask is None or len(self._mask) < 2 * size:
            drawn = torch.rand(max(1 << 22, 4 * size), generator=self._generator)
            self._mask = (drawn >= share).float() / (1 - share)
        begin = int(torch.randint(len(self._mask) - size + 1, (), generator=self._generator))
        return values * self._mask[begin : begin + size].view_as(values)

    def _dropped(self, values: Tensor, share: float) -> Tensor:
        """Dropout with a generator of its own, so that a fit depends on nothing else in the process."""
        import torch

        if not share:
            return values
        kept: Tensor = values * (torch.rand(values.shape, generator=self._generator) >= share) / (1 - share)
        return kept

    def readout(self, mean: FloatArray, scale: FloatArray) -> Readout:
        arrays = {name: tensor.detach().numpy().copy() for name, tensor in self.weights.items()}
        for name in ("bias", "output") if self._settings.hidden else ("bias", "parts"):
            arrays[name] = np.ascontiguousarray(arrays[name][..., : self._kept])
        if not self._settings.context:
            arrays["parts"][3:] = 0.0
        return Readout(mean=mean, scale=scale, **arrays)


def _shifted(rows: Tensor, owner: Tensor, by: int) -> Tensor:
    """Each word gets the row of the word before it (by=1) or after it (by=-1) in its own sentence, else zeros."""
    import torch

    same = (owner[1:] == owner[:-1])[:, None]
    edge = torch.zeros(1, rows.shape[1])
    return torch.cat([edge, rows[:-1] * same]) if by > 0 else torch.cat([rows[1:] * same, edge])


def _inside(owner: Tensor, max_words: int) -> Tensor:
    """Which spans stay inside their sentence: (T, N) bool."""
    import torch

    owners = torch.cat([owner, torch.full((max_words,), -1)])
    return torch.stack([owners[n : n + len(owner)] == owner for n in range(max_words)], dim=1)


def _moments(corpus: Corpus, chosen: Sequence[int]) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation of every feature over the chosen sentences' words, in float64 sums."""
    width = corpus.values.shape[1]
    total, squares, count = np.zeros(width), np.zeros(width), 0
    for s in chosen:
        block = corpus.values[corpus.starts[s] : corpus.starts[s + 1]].astype(np.float64)
        total += block.sum(axis=0)
        squares += np.square(block).sum(axis=0)
        count += len(block)
    mean = total / max(count, 1)
    variance = np.maximum(squares / max(count, 1) - mean**2, 0)
    return mean.astype(np.float32), (np.sqrt(variance) + 1e-3).astype(np.float32)


@dataclass(frozen=True)
class _Words:
    """The words of a batch: values (T, D), owner and task (T,), target and entity (T, N)."""

    values: Tensor
    owner: Tensor
    task: Tensor
    target: Tensor
    entity: Tensor


def _batch(tasks: Sequence[Material], picked: Sequence[tuple[int, int]], max_words: int) -> _Words:
    """(task, sentence) pairs as words; targets count the columns of the tasks before."""
    import torch

    blocks, owner, task, targets, entities = [], [], [], [], []
    before = np.cumsum([0, *(own.n_labels + 1 for own in tasks)])
    for position, (number, s) in enumerate(picked):
        own = tasks[number]
        block = own.corpus.values[own.corpus.starts[s] : own.corpus.starts[s + 1]]
        target = np.full((len(block), max_words), before[number] + own.n_labels, dtype=np.int64)
        entity = np.zeros(target.shape, dtype=bool)
        for first, last, label in own.corpus.targets[s]:
            if last - first < max_words:
                target[first, last - first] = before[number] + label
                entity[first, last - first] = True
        blocks.append(block)
        targets.append(target)
        entities.append(entity)
        owner += [position] * len(block)
        task += [number] * len(block)
    return _Words(
        torch.from_numpy(np.concatenate(blocks)).float(), torch.tensor(owner), torch.tensor(task),
        torch.from_numpy(np.concatenate(targets)), torch.from_numpy(np.concatenate(entities)),
    )  # fmt: skip
