"""The retrieval voter: the labels of the pool strings that are most like a span.

    p(label) ~ sum over the nearest pool strings u of exp(sharpness * (cos(e(span), e(u)) - 1)) * share(label | u)

`share` is how often the string carries the label in the pool, "none" among them: strings that somebody proposed but the
pool does not mark. A string with no near neighbour falls back to the pool's overall shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from el4ner.cache import ArrayCache, content_key
from el4ner.config import RetrievalConfig
from el4ner.engines.base import Encoder, FloatArray
from el4ner.pool import Pool
from el4ner.records import Sentence, Span

_BACKGROUND = 0.3
"""Cosine at which a neighbour weighs as much as the pool's overall shares: what unrelated strings reach. At 0.55 the
shares drowned what a new name's neighbours say: their cosines lie between 0.4 and 0.5."""
_ROWS = 32
_RARE = 0.5


class RetrievalVoter:
    """Votes with the labels of the nearest pool strings (implements `Voter`)."""

    name = "retrieval"

    def __init__(self, encoder: Encoder, labels: Sequence[str], config: RetrievalConfig, cache: ArrayCache) -> None:
        self.labels = tuple(labels)
        self._encoder = encoder
        self._config = config
        self._cache = cache
        self._vectors = np.zeros((0, 1), dtype=np.float32)
        self._counts = np.zeros((0, 1, len(labels) + 1), dtype=np.float32)
        self._row: dict[str, int] = {}

    def fit(self, pool: Pool, proposed: Sequence[Sequence[Span]]) -> None:
        """Counts labels and "none" of every string of the pool, per fold; encodes the strings.

        proposed: the spans somebody proposed in each pool sentence; those that are not marked count as "none".
        """
        index = {label: position for position, label in enumerate(self.labels)}
        none = len(self.labels)
        seen: dict[str, np.ndarray] = {}
        for demonstration, spans, fold in zip(pool.sentences, proposed, pool.folds, strict=True):
            gold = {entity.span: index[entity.label] for entity in demonstration.entities}
            for span in {*spans, *gold}:
                surface = demonstration.text[span.start : span.end]
                counts = seen.setdefault(surface, np.zeros((pool.n_folds, none + 1), dtype=np.float32))
                counts[fold, gold.get(span, none)] += 1
        surfaces = sorted(seen)
        self._row = {surface: position for position, surface in enumerate(surfaces)}
        self._counts = (
            np.stack([seen[s] for s in surfaces]) if surfaces else np.zeros((0, pool.n_folds, none + 1), np.float32)
        )
        key = content_key("strings", self._encoder.source, surfaces)
        stored = self._cache.get(key)
        if stored is None:
            stored = {"vectors": self._encoder.encode(surfaces).astype(np.float32)}
            self._cache.put(key, stored)
        self._vectors = stored["vectors"]

    def state(self) -> tuple[list[str], FloatArray, FloatArray]:
        """What a fitted voter needs to vote on new texts: strings (U), counts (U, L + 1), vectors (U, D)."""
        return list(self._row), self._counts.sum(axis=1), self._vectors

    def restore(self, surfaces: Sequence[str], counts: FloatArray, vectors: FloatArray) -> None:
        """The inverse of `state`, of arrays in half precision too. Folds can no longer be left out."""
        self._row = {surface: position for position, surface in enumerate(surfaces)}
        self._counts = counts[:, None, :].astype(np.float32)
        self._vectors = vectors.astype(np.float32)

    def vote(
        self,
        sentences: Sequence[Sentence],
        spans: Sequence[Sequence[Span]],
        exclude_folds: Sequence[int] | None = None,
    ) -> list[FloatArray]:
        """Label distributions (n_spans, L + 1), "none" last.

        exclude_folds (N): the fold of each sentence, whose counts are left out; for sentences of the pool itself.
        """
        surfaces = [s.text[a:b] for s, own in zip(sentences, spans, strict=True) for a, b in own]
        folds = [-1] * len(surfaces)
        if exclude_folds is not None:
            folds = [fold for fold, own in zip(exclude_folds, spans, strict=True) for _ in own]
        rows = np.zeros((len(surfaces), len(self.labels) + 1), dtype=np.float32)
        vectors = self._lookup(surfaces)
        for fold in sorted(set(folds)):
            chosen = [position for position, own in enumerate(folds) if own == fold]
            rows[chosen] = self._distributions(vectors[chosen], fold)
        borders = np.cumsum([0, *(len(own) for own in spans)])
        return [rows[low:high] for low, high in pairwise(borders)]

    def _lookup(self, surfaces: Sequence[str]) -> FloatArray:
        """Vectors (n, D) of the surfaces; those of the pool's own strings are at hand."""
        unknown = sorted({surface for surface in surfaces if surface not in self._row})
        fresh = dict(zip(unknown, self._encoder.encode(unknown), strict=True)) if unknown else {}
        rows = [self._vectors[self._row[s]] if s in self._row else fresh[s] for s in surfaces]
        return np.stack(rows) if rows else np.zeros((0, self._vectors.shape[1]), dtype=np.float32)

    def _distributions(self, queries: FloatArray, left_out: int) -> FloatArray:
        """queries (n, D) unit vectors -> (n, L + 1) distributions, without the counts of fold `left_out`."""
        import torch

        counts = self._counts.sum(axis=1)
        if left_out >= 0:
            counts = counts - self._counts[:, left_out]
        total = counts.sum(axis=1)
        kept = np.flatnonzero(total > 0)
        overall = counts.sum(axis=0) + _RARE
        overall = (overall / overall.sum()).astype(np.float32)
        result = np.tile(overall, (len(queries), 1))
        if not len(kept):
            return result
        shares = torch.from_numpy((counts[kept] + _RARE * overall) / (total[kept, None] + _RARE))
        # no copy where every string counts, as in a prediction
        pool = torch.from_numpy(self._vectors if len(kept) == len(total) else self._vectors[kept])
        k = min(self._config.neighbours, len(kept))
        background = float(np.exp(self._config.sharpness * (_BACKGROUND - 1)))
        for begin in range(0, len(queries), _ROWS):
            block = queries[begin : begin + _ROWS]
            # always the same number of rows, so that a query's cosines do not depend on its neighbours
            padded = np.zeros((_ROWS, queries.shape[1]), dtype=np.float32)
            padded[: len(block)] = block
            cosines = torch.from_numpy(padded) @ pool.T  # (rows, kept)
            top, where = cosines.topk(k, dim=1)
            weights = torch.exp(self._config.sharpness * (top - 1))  # (rows, k)
            votes = torch.einsum("rk,rkc->rc", weights, shares[where]) + background * torch.from_numpy(overall)
            result[begin : begin + len(block)] = (votes / votes.sum(dim=1, keepdim=True))[: len(block)].numpy()
        return result
