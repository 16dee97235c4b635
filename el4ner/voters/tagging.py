"""Word by word: a chain of tags B, I and O over a sentence, and how probable it makes each span.

    p(y | x) = exp(sum_t e_t[y_t] + sum_t A[y_(t-1), y_t] + A[y_T, O]) / Z,    y_0 = O,    e_t = W g_t + b

a linear-chain conditional random field (Lafferty, McCallum and Pereira, 2001) over the words g of
`el4ner.voters.readout`, with the tags O, B-l and I-l of every label l; I-l follows B-l and I-l only. A span of words i
to j is an entity of label l where y_i = B-l, y_(i+1) .. y_j = I-l and y_(j+1) is not I-l; summed over everything else,
with forward and backward sums a and c (Rabiner, 1989):

    p(l | i to j) = a_i[B-l] (prod_(t=i+1..j) exp(A[., I-l] + e_t[I-l])) (c_j - what goes on with I-l)

Where the read-out of spans judges every span by itself, the tags of a sentence must agree with one another.
`el4ner.voters.tag_net` fits it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from el4ner.engines.base import FloatArray
from el4ner.errors import ShapeError
from el4ner.voters.word_layers import WordWeights

TAGGER_VERSION = 1
"""Part of every cache key; raised whenever the same words would be fitted or scored otherwise."""
LOWEST = -600.0
"""Scores below the best of their word by more than this count as this much: a forward sum in float64 cannot vanish."""
_LEAST = 1e-9
"""Least probability of a span or of none: a logarithm of 0 says more than a fit can know."""


def tags_of(n_words: int, entities: Sequence[tuple[int, int, int]]) -> NDArray[np.int64]:
    """Tags (n_words,): 0 for O, 1 + 2 l for the first word of label l, 2 + 2 l for its others.

    entities: (first word, last word, label). Of entities that share words the longest is tagged, then the earliest.
    """
    tags = np.zeros(n_words, dtype=np.int64)
    for first, last, label in sorted(entities, key=lambda own: (own[0] - own[1], own)):
        if not tags[first : last + 1].any():
            tags[first : last + 1] = 2 + 2 * label
            tags[first] = 1 + 2 * label
    return tags


def allowed(n_tags: int) -> NDArray[np.bool_]:
    """(K, K): whether a tag (column) may follow another one (row)."""
    may = np.ones((n_tags, n_tags), dtype=np.bool_)
    for inside in range(2, n_tags, 2):
        may[:, inside] = False
        may[inside - 1 : inside + 1, inside] = True
    return may


@dataclass(frozen=True)
class Tagger(WordWeights):
    """Fitted weights, all f32; D features, W word units, K = 2 labels + 1 tags.

    word (D, W), word_bias (W,), mix (3 W, W), mix_bias (W,) as in `Readout`; output (W, K), bias (K,), transitions
    (K, K) from row to column; longest (1,): words of the longest span that is scored, N. Without hidden layers W = 0
    columns of `word`, and output (D, K).
    """

    output: FloatArray
    bias: FloatArray
    transitions: FloatArray
    longest: FloatArray

    @property
    def max_words(self) -> int:
        """Longest span, in words."""
        return int(self.longest[0])

    def log_probabilities(self, values: FloatArray) -> FloatArray:
        """values (T, D) f32, the words of one sentence -> (T, N, L + 1) f32: element [i, n] is the span of words i to
        i+n, "none" last.

        Spans that leave the sentence hold -inf. Raises ShapeError if D differs.
        """
        if values.ndim != 2 or values.shape[1] != len(self.word):
            raise ShapeError(f"values {values.shape}; the tagger was fitted on (words, {len(self.word)})")
        seen = self.among_neighbours(values)
        shares = span_shares(seen @ self.output + self.bias, self.transitions, self.max_words)
        none = 1 - shares.sum(axis=2, keepdims=True)
        logp = np.log(np.maximum(np.concatenate([shares, none], axis=2), _LEAST))
        first, more = np.indices(logp.shape[:2])
        logp[first + more >= len(values)] = -np.inf
        found: FloatArray = logp.astype(np.float32)
        return found

    def to_arrays(self) -> dict[str, FloatArray]:
        """Named arrays for a cache."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, FloatArray]) -> Tagger:
        """The inverse of `to_arrays`."""
        return cls(*(np.asarray(arrays[name], dtype=np.float32) for name in _FIELDS))


_FIELDS = ("word", "word_bias", "mix", "mix_bias", "output", "bias", "transitions", "longest")


def span_shares(scores: FloatArray, transitions: FloatArray, max_words: int) -> NDArray[np.float64]:
    """Probability (T, N, L) f64 of every span of up to N words and every label; 0 for spans that leave the sentence.

    scores (T, K) of the tags of one sentence's words, transitions (K, K): f32, logarithms.
    """
    n_words, n_tags = scores.shape
    shares = np.zeros((n_words, max_words, n_tags // 2))
    if not n_words:
        return shares
    step = np.where(allowed(n_tags), np.exp(transitions.astype(np.float64)), 0.0)
    top = scores.max(axis=1, keepdims=True).astype(np.float64)
    own = np.exp(np.maximum(scores - top, LOWEST))
    forward, backward, sizes = _sums(own, step)
    begin, inside = np.arange(1, n_tags, 2), np.arange(2, n_tags, 2)
    # what a word adds to a span that goes on there, and how much of a word's backward sum goes on
    on = own[:, inside] / sizes[:, None]
    ahead = np.zeros((n_words, n_tags // 2))
    ahead[:-1] = on[1:] * backward[1:, inside]
    path = forward[:, begin]  # of the spans that begin at each word, up to where they have come
    before = begin
    for more in range(min(max_words, n_words)):
        if more:
            path = path[:-1] * step[before, inside] * on[more:]
            before = inside
        ends = backward[more:, before] - step[before, inside] * ahead[more:]
        shares[: n_words - more, more] = np.maximum(path * ends, 0.0)
    return shares


def _sums(
    own: NDArray[np.float64], step: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """own (T, K), exponentials of scores, T >= 1; step (K, K), those of transitions.

    Returns forward sums (T, K), each word's adding to 1; backward sums (T, K), so that both multiply to the tags'
    probabilities; and by what each word was divided, (T,).
    """
    forward, backward, sizes = np.empty_like(own), np.empty_like(own), np.empty(len(own))
    before = np.zeros(own.shape[1])
    before[0] = 1.0
    for t, word in enumerate(own):
        before = (before @ step) * word
        sizes[t] = before.sum()
        before = forward[t] = before / sizes[t]
    after = step[:, 0] / (forward[-1] @ step[:, 0])
    backward[-1] = after
    for t in range(len(own) - 1, 0, -1):
        after = backward[t - 1] = step @ (own[t] * after) / sizes[t]
    return forward, backward, sizes
