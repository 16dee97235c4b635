"""The reading and the tagging voter: what a frozen model's hidden states say about every span of a text.

The one scores spans (`voters.readout`), the other tags words (`voters.tagging`); both read the same features.
Fitted on the pool by cross-fitting: what they say about a pool sentence comes from heads that did not see it.
The heads are fitted, the models are not; where this is compared with pure prompting, that has to be said.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from el4ner.cache import ArrayCache, content_key
from el4ner.config import ReadingConfig
from el4ner.engines.base import FloatArray, without_numbers
from el4ner.pool import Pool
from el4ner.records import Sentence, Span
from el4ner.voters.features import FeatureReader, WordFeatures
from el4ner.voters.projection import Projection
from el4ner.voters.readout import READOUT_VERSION, Readout, mean_log_probabilities
from el4ner.voters.tagging import TAGGER_VERSION, Tagger
from el4ner.voters.word_layers import Head

Progress = Callable[[str], None]
Kind = Literal["spans", "tags"]
"""What the heads of a voter score."""
_Own = TypeVar("_Own", Readout, Tagger)

_REMEMBERED_BYTES = 64 << 20
"""Tables kept of the texts read last, for each voter: the stages of one chunk ask for the same ones."""


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
    """Votes with the hidden states of one model (implements `Voter`).

    kind: what its heads score. reads_with: another voter of the same features; a text is then read for both at once.
    """

    def __init__(
        self, name: str, reader: FeatureReader, labels: Sequence[str], config: ReadingConfig, cache: ArrayCache,
        seed: int = 0, kind: Kind = "spans", reads_with: ReadingVoter | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.labels = tuple(labels)
        self.kind: Kind = kind
        self.reader = reader
        self.config = config
        self.cache = cache
        self.seed = seed
        self._projection: Projection | None = None
        self._heads: tuple[Head, ...] = ()
        self._known: OrderedDict[str, SpanTable] = OrderedDict()
        self._readers: list[ReadingVoter] = [] if reads_with is None else reads_with._readers
        self._readers.append(self)
        self.unaligned = 0

    @property
    def layout(self) -> str:
        """A key for what a read-out of this voter reads, whatever the device and the precision, and for its layers."""
        features = [without_numbers(part) if isinstance(part, str) else part for part in self.reader.key]
        return content_key("layout", READOUT_VERSION, features, self.config.directions, self.config.hidden,
                           self.config.context)  # fmt: skip

    def key(self, pool: Pool, beside: Pool | None, start: Start | None) -> str:
        """The cache key of what is fitted on a pool."""
        version = (READOUT_VERSION,) if self.kind == "spans" else (READOUT_VERSION, "tags", TAGGER_VERSION)
        return content_key("reading", *version, self.reader.key, pool.content, pool.n_folds, self.seed,
                           self.config.model_dump(mode="json"), beside.content if beside else "",
                           start.key if start else "")  # fmt: skip

    def fit(
        self, pool: Pool, progress: Progress, beside: Pool | None = None, start: Start | None = None
    ) -> list[SpanTable]:
        """`reading_fit.fit_on` for this voter alone."""
        from el4ner.voters.reading_fit import fit_on

        return fit_on([self], pool, progress, beside, start)[self.name]

    def state(self) -> dict[str, np.ndarray]:
        """What a fitted voter needs to vote, as named arrays. Raises RuntimeError before `fit`.

        Without the directions, where a voter that it reads with, and that came before it, has the same.
        """
        if self._projection is None:
            raise RuntimeError("ReadingVoter.state before fit()")
        arrays = {**pack(self._projection, self._heads), "unaligned": np.array(self.unaligned)}
        before = self._readers[: self._readers.index(self)]
        if any(other._projection is self._projection for other in before):
            arrays = {name: array for name, array in arrays.items() if name not in self._projection.to_arrays()}
        return arrays

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The inverse of `state`: voters that read together come back in the order in which they were made."""
        others = [other._projection for other in self._readers if other is not self]
        known = next((projection for projection in others if projection is not None), None)
        if known is not None and "mean" not in arrays:
            arrays = {**known.to_arrays(), **arrays}
        own, self._heads = unpack(arrays, Tagger) if self.kind == "tags" else unpack(arrays, Readout)
        # what turns features the same way need not do it twice
        self._projection = known if known is not None and own.equals(known) else own
        self.unaligned = int(arrays["unaligned"])
        self._known.clear()

    def forget(self) -> None:
        """Drops what was fitted: a voter that is not asked need not read what the others read."""
        self._projection, self._heads = None, ()
        self._known.clear()

    def tables(self, sentences: Sequence[Sentence]) -> list[SpanTable]:
        """A table per sentence. A text is read once while it is among the last ones, as those of the last call are.

        Raises RuntimeError before `fit`.
        """
        if self._projection is None:
            raise RuntimeError("ReadingVoter.tables before fit()")
        missing = list(dict.fromkeys(s.text for s in sentences if s.text not in self._known))
        fitted = [voter for voter in self._readers if voter._projection is not None]
        for index, features in self.reader.each(missing):
            turned: list[tuple[Projection, FloatArray]] = []
            for voter in fitted:
                voter._read(missing[index], features, turned)
        for voter in fitted:
            voter._keep_to([s.text for s in sentences])
        return [self._known[s.text] for s in sentences]

    def _read(self, text: str, features: WordFeatures, turned: list[tuple[Projection, FloatArray]]) -> None:
        """Remembers what the heads say of a text. turned: the features along directions that others read before."""
        projection = self._projection
        assert projection is not None
        values = next((values for known, values in turned if known is projection), None)
        if values is None:
            values = projection(features.values)
            turned.append((projection, values))
        logp = mean_log_probabilities(self._heads, values)
        self._known[text] = SpanTable(features.units, logp, features.truncated_at)

    def _keep_to(self, texts: Sequence[str]) -> None:
        """Forgets the oldest tables beyond the room there is, but none of these texts'."""
        for text in texts:
            if text in self._known:
                self._known.move_to_end(text)
        size = sum(table.logp.nbytes for table in self._known.values())
        while size > _REMEMBERED_BYTES and len(self._known) > len({*texts}):
            _, oldest = self._known.popitem(last=False)
            size -= oldest.logp.nbytes

    def vote(self, sentences: Sequence[Sentence], spans: Sequence[Sequence[Span]]) -> list[FloatArray]:
        """Label distributions (n_spans, L + 1), "none" last."""
        return [np.exp(table.rows(own)) for table, own in zip(self.tables(sentences), spans, strict=True)]


def pack(projection: Projection, heads: Sequence[Head]) -> dict[str, np.ndarray]:
    """What is fitted, as named arrays."""
    numbered = {f"{i} {name}": array for i, head in enumerate(heads) for name, array in head.to_arrays().items()}
    return {**projection.to_arrays(), **numbered}


def unpack(arrays: Mapping[str, np.ndarray], head: type[_Own]) -> tuple[Projection, tuple[_Own, ...]]:
    """The inverse of `pack`; other arrays are passed over."""
    n_heads = 1 + max(int(name.split()[0]) for name in arrays if name.partition(" ")[0].isdigit())
    own = [{k.removeprefix(f"{i} "): v for k, v in arrays.items() if k.startswith(f"{i} ")} for i in range(n_heads)]
    return Projection.from_arrays(arrays), tuple(head.from_arrays(named) for named in own)
