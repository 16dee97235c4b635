"""The reading voter: what a frozen model's hidden states say about every span of a text.

Fitted on the pool by cross-fitting: what it says about a pool sentence comes from a read-out that did not see it.
The read-out is fitted, the models are not; where this is compared with pure prompting, that has to be said.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from el4ner.cache import ArrayCache, content_key
from el4ner.config import ReadingConfig
from el4ner.engines.base import FloatArray
from el4ner.pool import Pool
from el4ner.records import Sentence, Span
from el4ner.voters.features import FeatureReader, WordFeatures
from el4ner.voters.readout import READOUT_VERSION, Corpus, Readout, fit_readout

Progress = Callable[[str], None]

_CHUNK = 64
_REMEMBERED = 4096
_KEPT_BYTES = 2 << 30
"""Features of larger pools are not written to the cache; what was fitted on them is."""

_ALL_FOLDS_BELOW = 1500
"""Pools with more sentences choose the strength on one fold: the choice is stable there and the fits are dear."""


@dataclass(frozen=True, slots=True)
class SpanTable:
    """Log-probabilities of all spans of a text up to a length.

    units (W); logp (W, N, C) f32, element [i, n] for words i to i+n, "none" last. truncated_at: as in TokenStates.
    """

    units: tuple[Span, ...]
    logp: FloatArray
    truncated_at: int | None = None

    def rows(self, spans: Sequence[Span]) -> FloatArray:
        """Log-probabilities (n_spans, C). A span the table does not hold is taken for no entity, at 99 to 1."""
        n_columns = self.logp.shape[2]
        starts = {unit.start: index for index, unit in enumerate(self.units)}
        ends = {unit.end: index for index, unit in enumerate(self.units)}
        unknown = np.full(n_columns, np.log(0.01 / max(n_columns - 1, 1)), dtype=np.float32)
        unknown[-1] = np.log(0.99)
        rows = np.empty((len(spans), n_columns), dtype=np.float32)
        for row, span in zip(rows, spans, strict=True):
            first, last = starts.get(span.start, -1), ends.get(span.end, -1)
            known = 0 <= first <= last and last - first < self.logp.shape[1]
            row[:] = self.logp[first, last - first] if known else unknown
        return rows

    def above(self, floor: float) -> list[Span]:
        """Spans whose probability of being an entity is at least `floor`, sorted."""
        if not len(self.units):
            return []
        hits = np.argwhere(self.logp[:, :, -1] <= np.log1p(-floor))
        inside = [(int(i), int(i + n)) for i, n in hits if i + n < len(self.units)]
        return sorted(Span(self.units[i].start, self.units[j].end) for i, j in inside)


class ReadingVoter:
    """Votes with the hidden states of one model (implements `Voter`)."""

    def __init__(
        self,
        name: str,
        reader: FeatureReader,
        labels: Sequence[str],
        config: ReadingConfig,
        cache: ArrayCache,
        seed: int = 0,
    ) -> None:
        self.name = name
        self.labels = tuple(labels)
        self._reader = reader
        self._config = config
        self._cache = cache
        self._seed = seed
        self._readout: Readout | None = None
        self._known: OrderedDict[str, SpanTable] = OrderedDict()
        self.strength = float("nan")
        self.unaligned = 0

    def fit(self, pool: Pool, progress: Progress) -> list[SpanTable]:
        """Fits on the pool; returns a table per pool sentence from the fold that did not see it.

        What was fitted is cached by content of the pool, the models and the settings.
        """
        key = content_key("reading", READOUT_VERSION, self._reader.key, pool.content, pool.n_folds, self._seed,
                          self._config.model_dump(mode="json"))  # fmt: skip
        stored = self._cache.get(key)
        if stored is None:
            stored = self._fit(pool, progress)
            self._cache.put(key, stored)
        self._readout = Readout.from_arrays(stored)
        self.strength, self.unaligned = float(stored["strength"]), int(stored["unaligned"])
        tables = []
        for s in range(len(pool.sentences)):
            low, high = stored["starts"][s : s + 2]
            units = tuple(Span(int(a), int(b)) for a, b in stored["units"][low:high])
            tables.append(SpanTable(units, stored["out_of_fold"][low:high]))
        return tables

    def _fit(self, pool: Pool, progress: Progress) -> dict[str, np.ndarray]:
        corpus, units, unaligned = self._corpus(pool, progress)
        max_words = self._config.max_words or _longest(corpus)
        everyone = range(corpus.n_sentences)
        folds = np.asarray(pool.folds)
        used = [f for f in range(pool.n_folds) if (folds == f).any() and not (folds == f).all()]

        def readout(left_out: int, strength: float) -> Readout:
            return self._fit_one(corpus, [s for s in everyone if folds[s] != left_out], max_words, strength)

        tried = used if corpus.n_sentences < _ALL_FOLDS_BELOW else used[:1]
        fits: dict[tuple[int, float], Readout] = {}
        losses: dict[float, float] = {}
        for strength in self._config.strengths:
            for fold in tried:
                progress(f"{self.name}: fitting with strength {strength:g}, fold {fold + 1} of {pool.n_folds}")
                fits[fold, strength] = readout(fold, strength)
            losses[strength] = sum(
                _loss(fits[fold, strength], corpus, np.flatnonzero(folds == fold).tolist(), len(self.labels))
                for fold in tried
            )
        best = min(losses, key=lambda strength: (losses[strength], strength))
        out_of_fold = np.zeros((len(corpus.values), max_words, len(self.labels) + 1), dtype=np.float32)
        for fold in used:
            progress(f"{self.name}: cross-fitting fold {fold + 1} of {pool.n_folds}")
            fitted = fits.get((fold, best)) or readout(fold, best)
            for s in np.flatnonzero(folds == fold):
                low, high = corpus.starts[s], corpus.starts[s + 1]
                out_of_fold[low:high] = fitted.log_probabilities(corpus.values[low:high].astype(np.float32))
        progress(f"{self.name}: fitting on the whole pool")
        final = self._fit_one(corpus, list(everyone), max_words, best)
        flat_units = np.array([tuple(unit) for own in units for unit in own], dtype=np.int64).reshape(-1, 2)
        return {
            **final.to_arrays(), "out_of_fold": out_of_fold, "units": flat_units, "starts": corpus.starts,
            "strength": np.array(best), "unaligned": np.array(unaligned),
        }  # fmt: skip

    def _fit_one(self, corpus: Corpus, sentences: Sequence[int], max_words: int, strength: float) -> Readout:
        context = self._config.context
        return fit_readout(corpus, sentences, len(self.labels), max_words, strength, context=context, seed=self._seed)

    def _corpus(self, pool: Pool, progress: Progress) -> tuple[Corpus, list[tuple[Span, ...]], int]:
        """The pool's word features and targets, its words, and how many entities do not fall on word borders."""
        read = self._read_pool([d.text for d in pool.sentences], progress)
        starts = np.cumsum([0, *(len(features.units) for features in read)]).astype(np.int64)
        index = {label: position for position, label in enumerate(self.labels)}
        targets, unaligned = [], 0
        for demonstration, features in zip(pool.sentences, read, strict=True):
            first = {unit.start: i for i, unit in enumerate(features.units)}
            last = {unit.end: i for i, unit in enumerate(features.units)}
            own = []
            for entity in demonstration.entities:
                if entity.start in first and entity.end in last:
                    own.append((first[entity.start], last[entity.end], index[entity.label]))
                else:
                    unaligned += 1
            targets.append(own)
        values = np.concatenate([features.values for features in read])
        return Corpus(values, starts, targets), [features.units for features in read], unaligned

    def _read_pool(self, texts: Sequence[str], progress: Progress) -> list[WordFeatures]:
        """Features of the pool's texts in half precision, which halves their memory; cached by content."""
        key = content_key("features of", self._reader.key, list(texts))
        stored = self._cache.get(key)
        if stored is not None:
            borders = stored["starts"]
            return [
                WordFeatures(
                    tuple(Span(int(a), int(b)) for a, b in stored["units"][low:high]), stored["values"][low:high]
                )
                for low, high in pairwise(borders)
            ]
        read: list[WordFeatures] = []
        for begin in range(0, len(texts), _CHUNK):
            progress(f"{self.name}: reading the pool, {begin:,} of {len(texts):,} sentences")
            for features in self._reader.read(texts[begin : begin + _CHUNK]):
                read.append(WordFeatures(features.units, features.values.astype(np.float16)))
        values = np.concatenate([features.values for features in read])
        if values.nbytes <= _KEPT_BYTES:
            units = np.array([tuple(unit) for features in read for unit in features.units], dtype=np.int64)
            starts = np.cumsum([0, *(len(features.units) for features in read)])
            self._cache.put(key, {"values": values, "units": units.reshape(-1, 2), "starts": starts})
        return read

    def state(self) -> dict[str, np.ndarray]:
        """What a fitted voter needs to vote, as named arrays."""
        if self._readout is None:
            raise RuntimeError("ReadingVoter.state before fit()")
        return {**self._readout.to_arrays(), "strength": np.array(self.strength), "unaligned": np.array(self.unaligned)}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The inverse of `state`."""
        self._readout = Readout.from_arrays(arrays)
        self.strength, self.unaligned = float(arrays["strength"]), int(arrays["unaligned"])

    def tables(self, sentences: Sequence[Sentence]) -> list[SpanTable]:
        """A table per sentence. A text is read once while it stays among the last few thousand."""
        if self._readout is None:
            raise RuntimeError("ReadingVoter.tables before fit()")
        missing = list(dict.fromkeys(s.text for s in sentences if s.text not in self._known))
        for text, features in zip(missing, self._reader.read(missing), strict=True):
            logp = self._readout.log_probabilities(features.values)
            self._known[text] = SpanTable(features.units, logp, features.truncated_at)
        tables = [self._known[s.text] for s in sentences]
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return tables

    def vote(self, sentences: Sequence[Sentence], spans: Sequence[Sequence[Span]]) -> list[FloatArray]:
        """Label distributions (n_spans, L + 1), "none" last."""
        return [np.exp(table.rows(own)) for table, own in zip(self.tables(sentences), spans, strict=True)]


def _longest(corpus: Corpus) -> int:
    """Words of the longest span worth scoring: the 99.7th percentile of the pool's entities, from 3 to 12."""
    lengths = [last - first + 1 for own in corpus.targets for first, last, _ in own]
    return int(np.clip(np.ceil(np.percentile(lengths, 99.7)), 3, 12)) if lengths else 3


def _loss(readout: Readout, corpus: Corpus, sentences: Sequence[int], n_labels: int) -> float:
    """Summed negative log-probability of the truth over all spans of the sentences."""
    total = 0.0
    for s in sentences:
        low, high = corpus.starts[s], corpus.starts[s + 1]
        logp = readout.log_probabilities(corpus.values[low:high].astype(np.float32))
        truth = np.full(logp.shape[:2], n_labels)
        for first, last, label in corpus.targets[s]:
            if last - first < readout.max_words:
                truth[first, last - first] = label
        rows = np.take_along_axis(logp, truth[:, :, None], axis=2)[:, :, 0]
        total -= float(rows[np.isfinite(logp[:, :, -1])].sum(dtype=np.float64))
    return total
