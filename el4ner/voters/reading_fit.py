"""Fits the voters that read hidden states on a pool, each fold by heads that did not see it.

The pool is read once for all voters of a model; its features are cached by content, and so is what is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import Event

import numpy as np

from el4ner.cache import ArrayCache, content_key
from el4ner.engines.base import FloatArray, IntArray
from el4ner.kernels._threads import thread_count
from el4ner.pool import Pool
from el4ner.records import Demonstration, Span
from el4ner.text import words
from el4ner.voters.features import FeatureReader, WordFeatures
from el4ner.voters.fitting import Corpus, FitSettings, Material, fit_readouts, fit_taggers, one_thread_each
from el4ner.voters.projection import Projection, fit_projection
from el4ner.voters.reading import Kind, Progress, ReadingVoter, SpanTable, Start, pack
from el4ner.voters.readout import Readout, mean_log_probabilities
from el4ner.voters.swapping import copies_within, swapped
from el4ner.voters.word_layers import Head

_CHUNK = 512
_KEPT_BYTES = 4 << 30
"""Features of larger pools are not written to the cache; what was fitted on them is."""


def fit_on(
    voters: Sequence[ReadingVoter], pool: Pool, progress: Progress, beside: Pool | None = None,
    start: Start | None = None,
) -> dict[str, list[SpanTable]]:  # fmt: skip
    """Fits voters of one model on the pool; by voter a table per pool sentence from the fold that did not see it.

    voters: of one reader, with the same settings, labels, cache and seed.
    beside: a pool with labels of its own, from which the hidden layers learn too what an entity looks like; or
    start: what was fitted on such a pool before. Neither may hold a text of the pool, which would give folds away.
    What was fitted is cached by content of the pool, the models and the settings.
    """
    keys = {voter.name: voter.key(pool, beside, start) for voter in voters}
    work: PoolFit | None = None
    tables: dict[str, list[SpanTable]] = {}
    for voter in voters:
        arrays = voter.cache.get(keys[voter.name])
        if arrays is None:
            work = work or PoolFit(voter, pool, progress, beside, start)
            arrays = work.fitted(voter.name, voter.kind)
            voter.cache.put(keys[voter.name], arrays)
        voter.restore(arrays)
        tables[voter.name] = []
        for low, high in pairwise(arrays["starts"]):
            units = tuple(Span(int(a), int(b)) for a, b in arrays["units"][low:high])
            tables[voter.name].append(SpanTable(units, arrays["out_of_fold"][low:high]))
    return tables


Fitted = tuple[Head, ...]


@dataclass(frozen=True)
class Begin:
    """What every fit of a pool begins with: seed, number of heads, what is fitted beside, read-outs to begin at."""

    seed: int
    heads: int
    beside: Material | None
    start: tuple[Readout, ...]


class PoolFit:
    """A pool read by one voter's features, on which heads of any kind are fitted."""

    def __init__(
        self, voter: ReadingVoter, pool: Pool, progress: Progress, beside: Pool | None, start: Start | None
    ) -> None:
        config = voter.config
        self._voter = voter
        self._pool = pool
        self._progress = progress
        self._settings = FitSettings(
            hidden=config.hidden, decay=config.decay, dropout=config.dropout, feature_dropout=config.feature_dropout,
            negatives=config.negatives, context=config.context,
        )  # fmt: skip
        values, read = self._read([d.text for d in pool.sentences])
        flat_units = [tuple(unit) for features in read for unit in features.units]
        self._units = np.array(flat_units, dtype=np.int64).reshape(-1, 2)
        self._n_read = len(read)
        self._projection = start.projection if start else fit_projection(values, read[0].widths, config.directions)
        corpus, self._unaligned = _corpus(pool.sentences, pool.label_names, read, self._projection)
        del read, values  # the features of a pool take more memory than anything that is made of them
        self._max_words = config.max_words or _longest(corpus)
        self._corpus, self._origins = self._with_copies(pool, corpus)
        material: Material | None = None
        if beside is not None and config.hidden:
            _, read_beside = self._read([d.text for d in beside.sentences])
            other, _ = _corpus(beside.sentences, beside.label_names, read_beside, self._projection)
            del read_beside
            if len(self._origins) > self._n_read:
                other, _ = self._with_copies(beside, other)
            material = Material(other, range(other.n_sentences), len(beside.labels))
        self._how = Begin(voter.seed, config.heads, material, start.heads if start else ())

    def fitted(self, name: str, kind: Kind) -> dict[str, np.ndarray]:
        """What a voter of this kind keeps: its state, and what it says of the pool out of fold."""
        corpus, pool, n_read = self._corpus, self._pool, self._n_read
        everyone = range(corpus.n_sentences)
        folds = np.asarray(pool.folds)[self._origins]
        used = [f for f in range(pool.n_folds) if (folds == f).any() and not (folds == f).all()]
        self._progress(f"{name}: fitting, {len(used)} folds and the whole pool")
        without = [[s for s in everyone if folds[s] != fold] for fold in used]
        sets = [Material(corpus, chosen, len(pool.labels)) for chosen in (*without, everyone)]
        *crossed, final = fit_sets(kind, sets, self._max_words, self._settings, self._how)
        starts = corpus.starts[: n_read + 1]
        out_of_fold = np.zeros((starts[-1], self._max_words, len(pool.labels) + 1), dtype=np.float32)
        for fold, heads in zip(used, crossed, strict=True):
            for s in np.flatnonzero(folds[:n_read] == fold):
                low, high = starts[s : s + 2]
                out_of_fold[low:high] = mean_log_probabilities(heads, corpus.values[low:high].astype(np.float32))
        return {
            **pack(self._projection, final), "out_of_fold": out_of_fold, "units": self._units, "starts": starts,
            "unaligned": np.array(self._unaligned),
        }  # fmt: skip

    def _read(self, texts: Sequence[str]) -> tuple[np.ndarray, list[WordFeatures]]:
        voter = self._voter
        return read_pool(voter.reader, voter.cache, texts, lambda what: self._progress(f"{voter.name}: {what}"))

    def _with_copies(self, pool: Pool, corpus: Corpus) -> tuple[Corpus, IntArray]:
        """The corpus, behind it copies of its sentences with mentions swapped, and of which sentence each part is."""
        itself = np.arange(corpus.n_sentences)
        copies, origins = swapped(pool, copies_within(pool, self._voter.config.swaps), self._voter.seed)
        if not copies:
            return corpus, itself
        _, read = self._read([d.text for d in copies])
        behind, _ = _corpus(copies, pool.label_names, read, self._projection)
        del read
        values = np.concatenate([corpus.values, behind.values])
        starts = np.concatenate([corpus.starts, corpus.starts[-1] + behind.starts[1:]])
        return Corpus(values, starts, [*corpus.targets, *behind.targets]), np.concatenate([itself, origins])


def fit_sets(kind: Kind, sets: Sequence[Material], max_words: int, settings: FitSettings, how: Begin) -> list[Fitted]:
    """Heads of a kind fitted on every set of sentences, as many fits at a time as there may be threads."""

    def fit(own: Material) -> Fitted:
        fit_heads = fit_taggers if kind == "tags" else fit_readouts
        return fit_heads(own, max_words, settings, how.seed, how.heads, how.beside, how.start, stop)

    stop = Event()
    at_once = thread_count()
    with one_thread_each() as keep_to_one, ThreadPoolExecutor(at_once, initializer=keep_to_one) as workers:
        try:
            return list(workers.map(fit, sets))
        finally:
            stop.set()  # after an interrupt, or where one fit failed, nobody waits for the end of the others


def read_pool(
    reader: FeatureReader, cache: ArrayCache, texts: Sequence[str], say: Progress
) -> tuple[np.ndarray, list[WordFeatures]]:
    """Features of texts in half precision, which halves their memory; cached by content.

    All of them, (words of all texts, D) f16, and by text, as views of these.
    """
    key = content_key("features of", reader.key, list(texts))
    stored = cache.get(key)
    if stored is None:
        stored = _read_anew(reader, texts, say)
        if stored["values"].nbytes <= _KEPT_BYTES:
            cache.put(key, stored)
    widths = tuple(int(width) for width in stored["widths"])
    units = [Span(int(start), int(end)) for start, end in stored["units"]]
    values = stored["values"]
    return values, [
        WordFeatures(tuple(units[low:high]), values[low:high], widths) for low, high in pairwise(stored["starts"])
    ]


def _read_anew(reader: FeatureReader, texts: Sequence[str], say: Progress) -> dict[str, np.ndarray]:
    """What `read_pool` keeps. Every feature is written to its place at once: a second copy would be the peak."""
    # a text that is cut leaves the end of its place free
    places = np.cumsum([0, *(len(words(text)) for text in texts)])
    values = np.zeros((0, 0), np.float16)
    units: list[tuple[Span, ...]] = [()] * len(texts)
    widths: tuple[int, ...] = ()
    for begin in range(0, len(texts), _CHUNK):
        say(f"reading the pool, {begin:,} of {len(texts):,} sentences")
        for i, own in reader.each(texts[begin : begin + _CHUNK]):
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
