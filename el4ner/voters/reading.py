"""The reading voter: what a frozen model's hidden states say about every span of a text.

Fitted on the pool by cross-fitting: what it says about a pool sentence comes from a read-out that did not see it.
The read-out is fitted, the models are not; where this is compared with pure prompting, that has to be said.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import Event

import numpy as np

from el4ner.cache import ArrayCache, content_key
from el4ner.config import ReadingConfig
from el4ner.engines.base import FloatArray, IntArray, without_numbers
from el4ner.kernels._threads import thread_count
from el4ner.pool import Pool
from el4ner.records import Demonstration, Sentence, Span
from el4ner.text import words
from el4ner.voters.features import FeatureReader, WordFeatures
from el4ner.voters.fitting import Corpus, FitSettings, Material, fit_readouts, one_thread_each
from el4ner.voters.projection import Projection, fit_projection
from el4ner.voters.readout import READOUT_VERSION, Readout, mean_log_probabilities
from el4ner.voters.swapping import copies_within, swapped

Progress = Callable[[str], None]

_CHUNK = 512
_REMEMBERED_BYTES = 64 << 20
"""Tables kept of the texts read last: the stages of one chunk ask for the same ones."""
_KEPT_BYTES = 4 << 30
"""Features of larger pools are not written to the cache; what was fitted on them is."""


@dataclass(frozen=True, slots=True)
class SpanTable:
    """Log-probabilities of all spans of a text up to a length.

    units (W); logp (W, N, C) f32, element [i, n] for words i to i+n, "none" last. truncated_at: as in TokenStates.
    """

    units: tuple[Span, ...]
    logp: FloatArray
    truncated_at: int | None = None

    def rows(self, spans: Sequence[Span]) -> FloatArray:
        """Log-probabilities (n_spans, C). A span the table does not hold is taken for no entity, at 99 to 1.

        One that was not read, because it ends behind `truncated_at`, is NaN.
        """
        n_columns = self.logp.shape[2]
        starts = {unit.start: index for index, unit in enumerate(self.units)}
        ends = {unit.end: index for index, unit in enumerate(self.units)}
        unknown = np.full(n_columns, np.log(0.01 / max(n_columns - 1, 1)), dtype=np.float32)
        unknown[-1] = np.log(0.99)
        rows = np.empty((len(spans), n_columns), dtype=np.float32)
        for row, span in zip(rows, spans, strict=True):
            first, last = starts.get(span.start, -1), ends.get(span.end, -1)
            known = 0 <= first <= last and last - first < self.logp.shape[1]
            if self.truncated_at is not None and span.end > self.truncated_at:
                row[:] = np.nan
            else:
                row[:] = self.logp[first, last - first] if known else unknown
        return rows

    def above(self, floor: float) -> list[Span]:
        """Spans whose probability of being an entity is at least `floor`, sorted."""
        if not len(self.units):
            return []
        hits = np.argwhere(self.logp[:, :, -1] <= np.log1p(-floor))
        inside = [(int(i), int(i + n)) for i, n in hits if i + n < len(self.units)]
        return sorted(Span(self.units[i].start, self.units[j].end) for i, j in inside)


@dataclass(frozen=True)
class Start:
    """Read-outs of another pool to begin a fit at, the directions that they read, and a key for what they are."""

    projection: Projection
    heads: tuple[Readout, ...]
    key: str


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
        self._projection: Projection | None = None
        self._heads: tuple[Readout, ...] = ()
        self._known: OrderedDict[str, SpanTable] = OrderedDict()
        self.unaligned = 0

    @property
    def layout(self) -> str:
        """A key for what a read-out of this voter reads, whatever the device and the precision, and for its layers."""
        features = [without_numbers(part) if isinstance(part, str) else part for part in self._reader.key]
        return content_key("layout", READOUT_VERSION, features, self._config.directions, self._config.hidden,
                           self._config.context)  # fmt: skip

    def fit(
        self, pool: Pool, progress: Progress, beside: Pool | None = None, start: Start | None = None
    ) -> list[SpanTable]:
        """Fits on the pool; returns a table per pool sentence from the fold that did not see it.

        beside: a pool with labels of its own, from which the hidden layers learn too what an entity looks like; or
        start: what was fitted on such a pool before. Neither may hold a text of the pool, which would give folds away.
        What was fitted is cached by content of the pool, the models and the settings.
        """
        key = content_key("reading", READOUT_VERSION, self._reader.key, pool.content, pool.n_folds, self._seed,
                          self._config.model_dump(mode="json"), beside.content if beside else "",
                          start.key if start else "")  # fmt: skip
        stored = self._cache.get(key)
        if stored is None:
            stored = self._fit(pool, progress, beside, start)
            self._cache.put(key, stored)
        self.restore(stored)
        tables = []
        for s in range(len(pool.sentences)):
            low, high = stored["starts"][s : s + 2]
            units = tuple(Span(int(a), int(b)) for a, b in stored["units"][low:high])
            tables.append(SpanTable(units, stored["out_of_fold"][low:high]))
        return tables

    def _fit(self, pool: Pool, progress: Progress, beside: Pool | None, start: Start | None) -> dict[str, np.ndarray]:
        values, read = self._read_pool([d.text for d in pool.sentences], progress)
        units = [features.units for features in read]
        projection = start.projection if start else fit_projection(values, read[0].widths, self._config.directions)
        corpus, unaligned = _corpus(pool.sentences, pool.label_names, read, projection)
        n_read = len(read)
        del read, values  # the features of a pool take more memory than anything that is made of them
        max_words = self._config.max_words or _longest(corpus)
        corpus, origins = self._with_copies(pool, corpus, projection, progress)
        other: Material | None = None
        if beside is not None and self._config.hidden:
            _, read_beside = self._read_pool([d.text for d in beside.sentences], progress)
            corpus_beside, _ = _corpus(beside.sentences, beside.label_names, read_beside, projection)
            del read_beside
            if len(origins) > n_read:
                corpus_beside, _ = self._with_copies(beside, corpus_beside, projection, progress)
            other = Material(corpus_beside, range(corpus_beside.n_sentences), len(beside.labels))
        everyone = range(corpus.n_sentences)
        folds = np.asarray(pool.folds)[origins]
        used = [f for f in range(pool.n_folds) if (folds == f).any() and not (folds == f).all()]
        progress(f"{self.name}: fitting, {len(used)} folds and the whole pool")
        without = [[s for s in everyone if folds[s] != fold] for fold in used]
        begun = start.heads if start else ()
        *crossed, final = self._fit_sets(corpus, [*without, list(everyone)], max_words, other, begun)
        starts = corpus.starts[: n_read + 1]
        out_of_fold = np.zeros((starts[-1], max_words, len(self.labels) + 1), dtype=np.float32)
        for fold, heads in zip(used, crossed, strict=True):
            for s in np.flatnonzero(folds[:n_read] == fold):
                low, high = starts[s : s + 2]
                out_of_fold[low:high] = mean_log_probabilities(heads, corpus.values[low:high].astype(np.float32))
        flat_units = np.array([tuple(unit) for own in units for unit in own], dtype=np.int64).reshape(-1, 2)
        return {
            **_pack(projection, final), "out_of_fold": out_of_fold, "units": flat_units, "starts": starts,
            "unaligned": np.array(unaligned),
        }  # fmt: skip

    def _with_copies(
        self, pool: Pool, corpus: Corpus, projection: Projection, progress: Progress
    ) -> tuple[Corpus, IntArray]:
        """The corpus, behind it copies of its sentences with mentions swapped, and of which sentence each part is."""
        itself = np.arange(corpus.n_sentences)
        copies, origins = swapped(pool, copies_within(pool, self._config.swaps), self._seed)
        if not copies:
            return corpus, itself
        _, read = self._read_pool([d.text for d in copies], progress)
        behind, _ = _corpus(copies, pool.label_names, read, projection)
        del read
        values = np.concatenate([corpus.values, behind.values])
        starts = np.concatenate([corpus.starts, corpus.starts[-1] + behind.starts[1:]])
        return Corpus(values, starts, [*corpus.targets, *behind.targets]), np.concatenate([itself, origins])

    def _fit_sets(
        self,
        corpus: Corpus,
        sets: Sequence[Sequence[int]],
        max_words: int,
        beside: Material | None,
        start: Sequence[Readout],
    ) -> list[tuple[Readout, ...]]:
        """The heads fitted on every set of sentences, as many fits at a time as there may be threads."""
        config = self._config
        settings = FitSettings(
            hidden=config.hidden, decay=config.decay, dropout=config.dropout, feature_dropout=config.feature_dropout,
            negatives=config.negatives, context=config.context,
        )  # fmt: skip

        def fit(sentences: Sequence[int]) -> tuple[Readout, ...]:
            own = Material(corpus, sentences, len(self.labels))
            return fit_readouts(own, max_words, settings, self._seed, config.heads, beside, start, stop)

        stop = Event()
        at_once = thread_count()
        with one_thread_each() as keep_to_one, ThreadPoolExecutor(at_once, initializer=keep_to_one) as workers:
            try:
                return list(workers.map(fit, sets))
            finally:
                stop.set()  # after an interrupt, or where one fit failed, nobody waits for the end of the others

    def _read_pool(self, texts: Sequence[str], progress: Progress) -> tuple[np.ndarray, list[WordFeatures]]:
        """Features of the pool's texts in half precision, which halves their memory; cached by content.

        All of them, (words of all texts, D) f16, and by text, as views of these.
        """
        key = content_key("features of", self._reader.key, list(texts))
        stored = self._cache.get(key)
        if stored is None:
            stored = self._read_anew(texts, progress)
            if stored["values"].nbytes <= _KEPT_BYTES:
                self._cache.put(key, stored)
        widths = tuple(int(width) for width in stored["widths"])
        units = [Span(int(start), int(end)) for start, end in stored["units"]]
        values = stored["values"]
        return values, [
            WordFeatures(tuple(units[low:high]), values[low:high], widths) for low, high in pairwise(stored["starts"])
        ]

    def _read_anew(self, texts: Sequence[str], progress: Progress) -> dict[str, np.ndarray]:
        """What `_read_pool` keeps. Every feature is written to its place at once: a second copy would be the peak."""
        # a text that is cut leaves the end of its place free
        places = np.cumsum([0, *(len(words(text)) for text in texts)])
        values = np.zeros((0, 0), np.float16)
        units: list[tuple[Span, ...]] = [()] * len(texts)
        widths: tuple[int, ...] = ()
        for begin in range(0, len(texts), _CHUNK):
            progress(f"{self.name}: reading the pool, {begin:,} of {len(texts):,} sentences")
            for i, own in self._reader.each(texts[begin : begin + _CHUNK]):
                if not values.size:
                    values, widths = np.empty((places[-1], own.values.shape[1]), np.float16), own.widths
                units[begin + i] = own.units
                values[places[begin + i] : places[begin + i] + len(own.units)] = _half(own.values)
        starts = np.cumsum([0, *map(len, units)])
        if starts[-1] < places[-1]:
            for at, place, size in zip(starts[:-1], places[:-1], map(len, units), strict=True):
                values[at : at + size] = values[place : place + size]
        borders = np.array([tuple(unit) for own in units for unit in own], dtype=np.int64).reshape(-1, 2)
        return {"values": values[: starts[-1]], "units": borders, "starts": starts, "widths": np.array(widths)}

    def state(self) -> dict[str, np.ndarray]:
        """What a fitted voter needs to vote, as named arrays."""
        if self._projection is None:
            raise RuntimeError("ReadingVoter.state before fit()")
        return {**_pack(self._projection, self._heads), "unaligned": np.array(self.unaligned)}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The inverse of `state`."""
        self._projection, self._heads = unpack(arrays)
        self.unaligned = int(arrays["unaligned"])

    def tables(self, sentences: Sequence[Sentence]) -> list[SpanTable]:
        """A table per sentence. A text is read once while it is among the last ones, as those of the last call are."""
        if self._projection is None:
            raise RuntimeError("ReadingVoter.tables before fit()")
        missing = list(dict.fromkeys(s.text for s in sentences if s.text not in self._known))
        for index, features in self._reader.each(missing):
            logp = mean_log_probabilities(self._heads, self._projection(features.values))
            self._known[missing[index]] = SpanTable(features.units, logp, features.truncated_at)
        for sentence in sentences:
            self._known.move_to_end(sentence.text)
        size = sum(table.logp.nbytes for table in self._known.values())
        while size > _REMEMBERED_BYTES and len(self._known) > len({s.text for s in sentences}):
            _, oldest = self._known.popitem(last=False)
            size -= oldest.logp.nbytes
        return [self._known[s.text] for s in sentences]

    def vote(self, sentences: Sequence[Sentence], spans: Sequence[Sequence[Span]]) -> list[FloatArray]:
        """Label distributions (n_spans, L + 1), "none" last."""
        return [np.exp(table.rows(own)) for table, own in zip(self.tables(sentences), spans, strict=True)]


def _longest(corpus: Corpus) -> int:
    """Words of the longest span worth scoring: the 99.7th percentile of the pool's entities, from 3 to 12."""
    lengths = [last - first + 1 for own in corpus.targets for first, last, _ in own]
    return int(np.clip(np.ceil(np.percentile(lengths, 99.7)), 3, 12)) if lengths else 3


def _half(values: FloatArray) -> np.ndarray:
    """Half precision; the rare state beyond its range is kept at its end."""
    return np.clip(values, -65504, 65504).astype(np.float16)


def _corpus(
    sentences: Sequence[Demonstration], labels: Sequence[str], read: Sequence[WordFeatures], projection: Projection
) -> tuple[Corpus, int]:
    """The sentences' words along the directions, in half precision, targets, and how many entities fit no words."""
    starts = np.cumsum([0, *(len(features.units) for features in read)]).astype(np.int64)
    index = {label: position for position, label in enumerate(labels)}
    targets, unaligned = [], 0
    for demonstration, features in zip(sentences, read, strict=True):
        first = {unit.start: i for i, unit in enumerate(features.units)}
        last = {unit.end: i for i, unit in enumerate(features.units)}
        own = []
        for entity in demonstration.entities:
            if entity.start in first and entity.end in last:
                own.append((first[entity.start], last[entity.end], index[entity.label]))
            else:
                unaligned += 1
        targets.append(own)
    values = np.concatenate([_half(projection(features.values)) for features in read])
    return Corpus(values, starts, targets), unaligned


def _pack(projection: Projection, heads: Sequence[Readout]) -> dict[str, np.ndarray]:
    """What is fitted, as named arrays."""
    numbered = {f"{i} {name}": array for i, head in enumerate(heads) for name, array in head.to_arrays().items()}
    return {**projection.to_arrays(), **numbered}


def unpack(arrays: Mapping[str, np.ndarray]) -> tuple[Projection, tuple[Readout, ...]]:
    """The inverse of `_pack`; other arrays are passed over."""
    n_heads = 1 + max(int(name.split()[0]) for name in arrays if name.partition(" ")[0].isdigit())
    heads = (
        Readout.from_arrays({k.removeprefix(f"{i} "): v for k, v in arrays.items() if k.startswith(f"{i} ")})
        for i in range(n_heads)
    )
    return Projection.from_arrays(arrays), tuple(heads)
