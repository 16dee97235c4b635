"""A small read-out of word features that scores all spans up to a length, for all labels, at once.

    h_i = relu(E x_i + e)                                  a word, from its features x along principal directions
    g_i = h_i + relu(G [h_(i-1); h_i; h_(i+1)] + d)        a word among its neighbours
    u[i, n] = F g_i + mean(M g_i .. M g_j) + A g_j + L g_(i-1) + R g_(j+1),   j = i + n
    p(label | span of words i to j) = softmax(V relu(u[i, n] + c[n]) + b[n])

F, M, A, L, R read the first word, the mean, the last word and the words beside the span. u is linear in g, so that of
all spans follows from projected words by prefix sums (`el4ner.kernels.span_scores`). Without hidden layers
(`hidden=0`) it is multinomial logistic regression: g = x and p = softmax(u + b[n]).
`el4ner.voters.fitting` fits it; `el4ner.voters.projection` makes x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from el4ner.engines.base import FloatArray
from el4ner.errors import ShapeError
from el4ner.kernels import span_scores
from el4ner.voters.word_layers import Head, WordWeights

PARTS = ("first", "mean", "last", "left", "right")
READOUT_VERSION = 8


@dataclass(frozen=True)
class Readout(WordWeights):
    """Fitted weights, all f32; D features, W word units, K hidden units, N words at most, C labels with "none" last.

    word (D, W) and word_bias (W,); mix (3 W, W) and mix_bias (W,); parts (5, W, K), one matrix a
    part of `PARTS`; hidden (N, K); output (K, C); bias (N, C). A linear read-out has W = 0 columns of `word`, no
    output, and parts (5, D, C).
    """

    parts: FloatArray
    hidden: FloatArray
    output: FloatArray
    bias: FloatArray

    @property
    def width(self) -> int:
        """Numbers a word has, D."""
        return int(self.word.shape[0])

    @property
    def max_words(self) -> int:
        """Longest span, in words."""
        return int(self.bias.shape[0])

    def log_probabilities(self, values: FloatArray) -> FloatArray:
        """values (W, D) f32, the words of one sentence -> (W, N, C) f32: element [i, n] is the span of words i to i+n.

        Spans that leave the sentence hold -inf. Raises ShapeError if D differs.
        """
        if values.ndim != 2 or values.shape[1] != self.width:
            raise ShapeError(f"values {values.shape}; the read-out was fitted on (words, {self.width})")
        n_words, n_columns = len(values), self.bias.shape[1]
        if not n_words:
            return np.zeros((0, self.max_words, n_columns), dtype=np.float32)
        seen = self.among_neighbours(values)
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

    def to_arrays(self) -> dict[str, FloatArray]:
        """Named arrays for a cache."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, FloatArray]) -> Readout:
        """The inverse of `to_arrays`."""
        return cls(*(np.asarray(arrays[name], dtype=np.float32) for name in _FIELDS))


def mean_log_probabilities(heads: Sequence[Head], values: FloatArray) -> FloatArray:
    """Log of the heads' mean probability, shaped as by `Readout.log_probabilities`."""
    if len(heads) == 1:
        return heads[0].log_probabilities(values)
    with np.errstate(divide="ignore"):
        total = sum(np.exp(head.log_probabilities(values)) for head in heads) / np.float32(len(heads))
        return np.asarray(np.log(total), dtype=np.float32)


_FIELDS = ("word", "word_bias", "mix", "mix_bias", "parts", "hidden", "output", "bias")
