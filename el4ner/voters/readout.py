"""A linear read-out of word features that scores all spans up to a length, for all labels, at once.

    z[i, n] = b[n] + F x_i + mean(M x_i .. M x_j) + A x_j + L x_(i-1) + R x_(j+1),   j = i + n
    p(label | span) = softmax(z)

x are standardised word features; F, M, A, L, R read the first word, the mean, the last word and the words beside the
span. Everything is linear, so the scores of all spans follow from projected words by prefix sums
(`el4ner.kernels.span_scores`). The fit is multinomial logistic regression over all spans with an L2 penalty; no
gradient touches the models that made the features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from el4ner.engines.base import FloatArray, IntArray
from el4ner.errors import ShapeError
from el4ner.kernels import span_scores

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("first", "mean", "last", "left", "right")
READOUT_VERSION = 1


@dataclass(frozen=True)
class Readout:
    """weights (5, D, C) f32, one matrix a part of `PARTS`; bias (N, C); mean, scale (D,); "none" is the last column."""

    weights: FloatArray
    bias: FloatArray
    mean: FloatArray
    scale: FloatArray

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
        standard = (values - self.mean) / self.scale
        first, mean, last, left, right = (standard @ matrix for matrix in self.weights)
        start = first
        start[1:] += left[:-1]
        last[:-1] += right[1:]
        scores = span_scores(np.ascontiguousarray(mean), np.ascontiguousarray(last), self.max_words, backend="auto")
        scores = scores + start[:, None, :] + self.bias[None]
        top = scores.max(axis=2, keepdims=True)
        inside = np.isfinite(top)
        shifted = np.where(inside, scores - np.where(inside, top, 0), 0)
        logp = shifted - np.log(np.exp(shifted).sum(axis=2, keepdims=True))
        return np.where(inside, logp, -np.inf).astype(np.float32)

    def to_arrays(self) -> dict[str, FloatArray]:
        """Named arrays for a cache."""
        return {"weights": self.weights, "bias": self.bias, "mean": self.mean, "scale": self.scale}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, FloatArray]) -> Readout:
        """The inverse of `to_arrays`."""
        return cls(*(np.asarray(arrays[name], dtype=np.float32) for name in ("weights", "bias", "mean", "scale")))


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


def fit_readout(
    corpus: Corpus,
    sentences: Sequence[int],
    n_labels: int,
    max_words: int,
    strength: float,
    *,
    context: bool = True,
    seed: int = 0,
) -> Readout:
    """Fits a read-out on some sentences of the corpus, by AdamW with a one-cycle schedule.

    strength: decoupled weight decay, the L2 penalty of the fit. Deterministic for the same corpus, sentences and seed.
    """
    import torch

    chosen = [s for s in sentences if corpus.starts[s + 1] > corpus.starts[s]]
    mean, scale = _moments(corpus, chosen)
    n_columns = n_labels + 1
    weights = torch.zeros(len(PARTS), len(mean), n_columns, requires_grad=True)
    start_bias = torch.zeros(max_words, n_columns)
    start_bias[:, -1] = 4.0  # nearly every span is no entity
    bias = start_bias.requires_grad_()
    batch = int(np.clip(len(chosen) // 50, 8, 64))
    per_epoch = max(1, -(-len(chosen) // batch))
    epochs = int(np.clip(-(-640 // per_epoch), 12, 40))
    groups = [{"params": [weights], "weight_decay": strength}, {"params": [bias], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=per_epoch * epochs, pct_start=0.1)
    rng = np.random.default_rng(seed)
    mean_t, scale_t = torch.from_numpy(mean), torch.from_numpy(scale)
    for _ in range(epochs if chosen else 0):
        order = rng.permutation(len(chosen))
        for begin in range(0, len(order), batch):
            picked = [chosen[i] for i in order[begin : begin + batch]]
            values, owner, target = _batch(corpus, picked, n_labels, max_words)
            scores, inside = _all_spans((values - mean_t) / scale_t, owner, weights, bias, context)
            loss = torch.nn.functional.cross_entropy(scores[inside], target[inside], reduction="sum") / len(values)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return Readout(weights.detach().numpy(), bias.detach().numpy(), mean, scale)


_RATE = 3e-3


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


def _batch(corpus: Corpus, picked: Sequence[int], n_labels: int, max_words: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values (T, D), owner (T,) and target (T, N) of some sentences."""
    import torch

    starts = corpus.starts
    values = np.concatenate([corpus.values[starts[s] : starts[s + 1]] for s in picked]).astype(np.float32)
    lengths = [int(starts[s + 1] - starts[s]) for s in picked]
    owner = np.repeat(np.arange(len(picked)), lengths)
    target = np.full((len(values), max_words), n_labels, dtype=np.int64)
    offset = 0
    for s, length in zip(picked, lengths, strict=True):
        for first, last, label in corpus.targets[s]:
            if last - first < max_words:
                target[offset + first, last - first] = label
        offset += length
    return torch.from_numpy(values), torch.from_numpy(owner), torch.from_numpy(target)


def _all_spans(values: Tensor, owner: Tensor, weights: Tensor, bias: Tensor, context: bool) -> tuple[Tensor, Tensor]:
    """Scores of all spans of a batch, differentiable: (T, N, C) and which of them stay inside their sentence (T, N)."""
    import torch

    n_words, max_words, n_columns = len(values), bias.shape[0], bias.shape[1]
    first, mean, last, left, right = torch.einsum("td,pdc->ptc", values, weights)
    start = first
    if context:
        same = (owner[1:] == owner[:-1])[:, None]
        start = start + torch.cat([torch.zeros(1, n_columns), left[:-1] * same])
        last = last + torch.cat([right[1:] * same, torch.zeros(1, n_columns)])
    padding = torch.zeros(max_words, n_columns)
    last = torch.cat([last, padding])
    sums = torch.cat([torch.zeros(1, n_columns), torch.cat([mean, padding]).cumsum(0)])
    scores = [
        start + (sums[n + 1 : n + 1 + n_words] - sums[:n_words]) / (n + 1) + last[n : n + n_words] + bias[n]
        for n in range(max_words)
    ]
    owners = torch.cat([owner, torch.full((max_words,), -1)])
    inside = torch.stack([owners[n : n + n_words] == owner for n in range(max_words)], dim=1)
    return torch.stack(scores, dim=1), inside
