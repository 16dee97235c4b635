"""Other ways to choose demonstrations than by spans: whole sentences by meaning, by words, or at random.

They exist to be compared with: span-level retrieval is the method's own. All rank the same pool sentences, and equal
scores go to the earlier sentence of the pool, whose order depends on content alone.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from el4ner.cache import ArrayCache, content_key
from el4ner.engines.base import Encoder
from el4ner.text import words


class Ranking(Protocol):
    """Ranks the texts of a pool for an input text."""

    def top(self, texts: Sequence[str], k: int, exclude: Sequence[Collection[int]]) -> list[list[int]]:
        """The k best pool texts of each input text, best first, without those excluded for it."""
        ...


def best(scores: NDArray[np.floating], k: int, exclude: Collection[int]) -> list[int]:
    """Positions of the k highest scores (N,), best first; excluded and -inf ones are left out."""
    order = np.argsort(-scores, kind="stable")
    found: list[int] = []
    for position in order:
        if len(found) == k or scores[position] == -np.inf:
            break
        if int(position) not in exclude:
            found.append(int(position))
    return found


class SentenceRanking:
    """By the cosine of sentence embeddings, as KATE chooses demonstrations (Liu et al. 2022, arXiv:2101.06804)."""

    def __init__(self, pool: Sequence[str], encoder: Encoder, cache: ArrayCache) -> None:
        self._encoder = encoder
        key = content_key("sentence vectors", encoder.source, list(pool))
        stored = cache.get(key)
        if stored is None:
            stored = {"vectors": encoder.encode(list(pool)).astype(np.float32)}
            cache.put(key, stored)
        self._vectors = stored["vectors"]  # (N, D) unit vectors

    def top(self, texts: Sequence[str], k: int, exclude: Sequence[Collection[int]]) -> list[list[int]]:
        """The most similar pool texts."""
        if not len(self._vectors):
            return [[] for _ in texts]
        # one product a text, so that no cosine depends on the batch
        queries = self._encoder.encode(list(texts))
        return [best(self._vectors @ query, k, own) for query, own in zip(queries, exclude, strict=True)]


class Bm25Ranking:
    """By BM25 over case-folded words (Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework").

    score(X, c) = sum over distinct words w of X: idf(w) * f (k1 + 1) / (f + k1 (1 - b + b |c| / mean length)), f the
    count of w in c, idf(w) = log(1 + (N - n + 0.5) / (n + 0.5)) for n of N texts that hold w; k1 = 1.5, b = 0.75.
    """

    def __init__(self, pool: Sequence[str], k1: float = 1.5, b: float = 0.75) -> None:
        counts = [Counter(_terms(text)) for text in pool]
        lengths = np.array([own.total() for own in counts], dtype=np.float64)
        mean = float(lengths.mean()) if len(lengths) and lengths.any() else 1.0
        self._size = len(counts)
        postings: dict[str, list[tuple[int, float]]] = {}
        for position, own in enumerate(counts):
            damping = k1 * (1 - b + b * lengths[position] / mean)
            for word, f in own.items():
                postings.setdefault(word, []).append((position, f * (k1 + 1) / (f + damping)))
        self._weights: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        for word, found in postings.items():
            idf = np.log1p((self._size - len(found) + 0.5) / (len(found) + 0.5))
            self._weights[word] = (np.array([p for p, _ in found]), idf * np.array([w for _, w in found]))

    def scores(self, text: str) -> NDArray[np.float64]:
        """The score of every pool text (N,)."""
        total = np.zeros(self._size)
        for word in sorted(set(_terms(text))):
            if word in self._weights:
                positions, weights = self._weights[word]
                total[positions] += weights
        return total

    def top(self, texts: Sequence[str], k: int, exclude: Sequence[Collection[int]]) -> list[list[int]]:
        """The pool texts that share most, and the rarest, words."""
        return [best(self.scores(text), k, own) for text, own in zip(texts, exclude, strict=True)]


class RandomRanking:
    """At random, the same for the same text, pool and seed."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed

    def top(self, texts: Sequence[str], k: int, exclude: Sequence[Collection[int]]) -> list[list[int]]:
        """Any pool texts, drawn anew for each input text."""
        drawn = []
        for text, own in zip(texts, exclude, strict=True):
            digest = hashlib.sha256(f"{self._seed}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()
            left = [position for position in range(self._size) if position not in own]
            drawn.append(random.Random(digest).sample(left, min(k, len(left))))
        return drawn


def _terms(text: str) -> list[str]:
    return [text[unit.start : unit.end].casefold() for unit in words(text)]
