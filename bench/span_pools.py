"""Inputs for timing span_topk: synthetic pools, and real ones whose spans the embedded encoder has read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from el4ner.bench.evaluation_data import sample_sentences, split_file
from el4ner.cache import ArrayCache, cache_root, content_key
from el4ner.engines import load_encoder
from el4ner.errors import InputError
from el4ner.kernels import SpanPool
from el4ner.records import Sentence
from el4ner.text import noun_phrases, pos_tags, span_weight, words

SYNTHETIC = ("clustered", "random")
REAL: dict[str, dict[str, int | None]] = {"full": {"wnut17": None, "genia": 4000}, "large": {"genia": 10_000}}
"""Size -> name -> how many sentences of `train` are the pool. 10,000 of GENIA's 15,000 hold enough spans for FAISS to
propose; the encoder reads 100,000 distinct ones once, in minutes."""

_CENTRES = 200
# Length of the noise beside a centre of length 1: two spans of a cluster then have a cosine of about 0.7.
_NOISE = 0.65


@dataclass(frozen=True, slots=True)
class SpanInput:
    """One input: queries (Q, D) f32 with offsets (B+1,) and weights (Q,) f64 > 0, and a pool."""

    name: str
    queries: NDArray[np.float32]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float64]
    pool: SpanPool

    @property
    def shape(self) -> dict[str, int]:
        """Sizes, for the row of a measurement. The real pools repeat many spans, hence the numbers of distinct ones."""
        return {
            "queries": len(self.offsets) - 1,
            "query_spans": len(self.queries),
            "distinct_query_spans": len(np.unique(self.queries, axis=0)),
            "sentences": self.pool.sentences,
            "pool_spans": len(self.pool.vectors),
            "distinct_pool_spans": len(np.unique(self.pool.vectors, axis=0)),
            "width": self.pool.width,
        }

    def only(self, picks: NDArray[np.int64]) -> SpanInput:
        """The same pool, asked by some of the queries: picks (P,), ascending."""
        lengths = np.diff(self.offsets)[picks]
        spans = np.concatenate([np.arange(self.offsets[b], self.offsets[b + 1]) for b in picks.tolist()])
        return SpanInput(self.name, self.queries[spans], _offsets(lengths), self.weights[spans], self.pool)

    @property
    def products(self) -> int:
        """Multiply-adds of the plain definition, two operations each."""
        return len(self.queries) * self.pool.vectors.size


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def synthetic(name: str, *, queries: int, sentences: int, width: int, seed: int) -> SpanInput:
    """Queries of 1 to 11 spans, sentences of 1 to 9, weights 1, 2 and 4.

    "clustered": spans around 200 random centres, as texts come back to the same things. "random": no structure at all,
    the worst case for an error bound, as the best sentences then differ little from the others.
    """
    random = np.random.default_rng(seed)
    query_offsets, offsets = _offsets(random.integers(1, 12, queries)), _offsets(random.integers(1, 10, sentences))
    centres = _unit(random.normal(size=(_CENTRES, width)))

    def vectors(count: int) -> NDArray[np.float32]:
        noise = random.normal(size=(count, width))
        if name == "random":
            return _unit(noise)
        return _unit(centres[random.integers(0, _CENTRES, count)] + noise * (_NOISE / np.sqrt(width)))

    weights = random.choice([1.0, 2.0, 4.0], int(query_offsets[-1]))
    pool = SpanPool.pack(vectors(int(offsets[-1])), offsets)
    return SpanInput(name, vectors(len(weights)), query_offsets, weights, pool)


def _spans(sentence: Sentence, gold: bool) -> list[tuple[str, int]]:
    """Surface and weight of a sentence's noun phrases, gold entities too where they are asked for."""
    units = words(sentence.text)
    tags = pos_tags(sentence.text, units)
    own = {(span.start, span.end): span_weight(span, units, tags) for span in noun_phrases(sentence.text)}
    if gold:
        own |= {(e["start"], e["end"]): 1 for e in sentence.extra.get("entities", [])}
    return [(sentence.text[start:end], weight) for (start, end), weight in sorted(own.items())]


def real(name: str, *, queries: int, sentences: int | None, seed: int) -> SpanInput:
    """Noun phrases and entities of `train` as the pool, noun phrases of `test` as queries, weighted by part of speech.

    The benchmarks lie in the folder EL4NER_DATA; embeddings are kept in the cache. Raises InputError without it.
    """
    folder = os.environ.get("EL4NER_DATA")
    if not folder:
        raise InputError("EL4NER_DATA is not set; point it to the folder of benchmarks for real pools")
    root = Path(folder) / name
    train = [_spans(s, gold=True) for s in sample_sentences(split_file(root, "train"), sentences, seed)]
    test = [_spans(s, gold=False) for s in sample_sentences(split_file(root, "test"), queries, seed)]
    kept = [[(surface, weight) for surface, weight in own if weight > 0] for own in test]
    surfaces = sorted({surface for own in (*train, *kept) for surface, _ in own})
    encoder = load_encoder("embedded:minilm", device="cpu", dtype="float32")
    cache = ArrayCache(cache_root() / "bench")
    key = content_key("span pools", encoder.source, surfaces)
    stored = cache.get(key)
    if stored is None:
        stored = {"vectors": encoder.encode(surfaces).astype(np.float32)}
        cache.put(key, stored)
    row = {surface: n for n, surface in enumerate(surfaces)}

    def rows(lists: list[list[tuple[str, int]]]) -> NDArray[np.float32]:
        return np.ascontiguousarray(stored["vectors"][[row[surface] for own in lists for surface, _ in own]])

    def offsets(lists: list[list[tuple[str, int]]]) -> NDArray[np.int64]:
        return _offsets(np.array([len(own) for own in lists], dtype=np.int64))

    weights = np.array([weight for own in kept for _, weight in own], dtype=np.float64)
    return SpanInput(name, rows(kept), offsets(kept), weights, SpanPool.pack(rows(train), offsets(train)))
