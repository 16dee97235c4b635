"""The pool's entities as vectors in context, to be found again by what a sentence is likely to hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from el4ner.bench.baseline_prompts import word_spans
from el4ner.cache import ArrayCache, cache_root, content_key
from el4ner.engines.base import Encoder, FloatArray
from el4ner.pool import Pool
from el4ner.records import Sentence, Span
from el4ner.text import noun_phrases
from el4ner.voters.features import pool_tokens

_TEXTS = 64


@dataclass(frozen=True, slots=True)
class Mention:
    """An entity of the pool: position of its sentence, span and label."""

    sentence: int
    span: Span
    label: str


def span_vectors(encoder: Encoder, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[FloatArray]:
    """Unit vectors (n_spans, D) of spans in context: the mean of the encoder's last states over their tokens."""
    found: list[FloatArray] = []
    for begin in range(0, len(texts), _TEXTS):
        read = encoder.read(texts[begin : begin + _TEXTS], [encoder.n_layers])
        for states, own in zip(read, spans[begin : begin + _TEXTS], strict=True):
            vectors = pool_tokens(own, states.offsets, states.states[encoder.n_layers])
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            found.append((vectors / np.maximum(norms, 1e-9)).astype(np.float32))
    return found


class MentionIndex:
    """Nearest entities of a pool, by the cosine of span vectors in context; vectors are cached by content."""

    def __init__(self, pool: Pool, encoder: Encoder) -> None:
        self.pool = pool
        self._encoder = encoder
        self.mentions = [Mention(i, e.span, e.label) for i, d in enumerate(pool.sentences) for e in d.entities]
        self._owner = np.array([m.sentence for m in self.mentions], dtype=np.int64)
        self._of_label = {
            name: np.array([m.label == name for m in self.mentions], dtype=bool) for name in pool.label_names
        }
        cache = ArrayCache(cache_root() / "pools")
        key = content_key("mentions in context", 1, encoder.source, pool.content)
        stored = cache.get(key)
        if stored is None:
            spans = [[e.span for e in d.entities] for d in pool.sentences]
            rows = span_vectors(encoder, [d.text for d in pool.sentences], spans)
            stored = {"vectors": np.concatenate(rows) if rows else np.zeros((0, 1), np.float32)}
            cache.put(key, stored)
        self._vectors = stored["vectors"]  # (M, D)

    def likely(self, sentences: Sequence[Sentence]) -> list[FloatArray]:
        """Vectors of what may be an entity of each sentence: its noun phrases, its words where it has none."""
        spans = [noun_phrases(s.text) or word_spans(s.text) for s in sentences]
        return span_vectors(self._encoder, [s.text for s in sentences], spans)

    def vectors(self, sentences: Sequence[Sentence], spans: Sequence[Sequence[Span]]) -> list[FloatArray]:
        """Vectors (n, D) of some spans of each sentence."""
        return span_vectors(self._encoder, [s.text for s in sentences], spans)

    def cosines(self, vectors: FloatArray) -> FloatArray:
        """Of vectors (n, D) with every mention: the highest one (M,), -1 without vectors."""
        if not len(vectors) or not len(self._vectors):
            return np.full(len(self.mentions), -1.0, dtype=np.float32)
        # one product a vector, so that no cosine depends on its neighbours
        highest: FloatArray = np.stack([self._vectors @ vector for vector in vectors]).max(axis=0)
        return highest

    def sentences(self, cosines: FloatArray, k: int, label: str | None = None) -> list[int]:
        """The k pool sentences with the nearest mention (of a label), nearest first."""
        kept = np.where(self._of_label[label], cosines, -np.inf) if label is not None else cosines
        scores = np.full(len(self.pool.sentences), -np.inf)
        np.maximum.at(scores, self._owner, kept)
        order = np.argsort(-scores, kind="stable")[:k]
        return [int(i) for i in order if scores[i] > -np.inf]

    def nearest(self, cosines: FloatArray, k: int, label: str, *, having: bool) -> list[Mention]:
        """The k nearest mentions that have a label, or those that have another one."""
        allowed: NDArray[np.bool_] = self._of_label[label] if having else ~self._of_label[label]
        kept = np.where(allowed, cosines, -np.inf)
        order = np.argsort(-kept, kind="stable")[:k]
        return [self.mentions[i] for i in order if kept[i] > -np.inf]
