"""The pool as a dictionary: a string that was an entity in the pool is one again, with its most frequent label.

The classical lookup baseline (for instance Mikheev, Moens and Grover 1999, "Named entity recognition without
gazetteers"; CoNLL-2003's own baseline tags entities of the training data, longest match first: Tjong Kim Sang and De
Meulder 2003). No model is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field

from el4ner.bench.system import BaselineSettings, Found, Kind, Workbench, prediction_of, with_options
from el4ner.pool import Pool, PoolStrings
from el4ner.records import Prediction, Sentence, Span
from el4ner.text import words


class DictionarySettings(BaselineSettings):
    """least_share: a string must be an entity in at least this share of its places in the pool (0.5: more often than
    not); it keeps out common words that were a name once. folded: also strings that differ in case only."""

    least_share: float = Field(default=0.5, ge=0, le=1)
    folded: bool = False


class Dictionary:
    """Longest match of the pool's entity strings (implements `System`)."""

    name = "dictionary"
    kind: Kind = "baseline"

    def __init__(self, bench: Workbench, options: Mapping[str, Any]) -> None:
        self._own = with_options(DictionarySettings, options, self.name)
        self._overlap = bench.config.overlap
        self._labels: dict[str, tuple[str, float]] = {}
        self._strings = PoolStrings(())

    @property
    def settings(self) -> Mapping[str, Any]:
        """The options and the policy for overlaps."""
        return {**self._own.model_dump(), "overlap": self._overlap}

    def load(self) -> None:
        """No models."""

    def prepare(self, pool: Pool, progress: Callable[[str], None]) -> None:
        """Counts labels of every entity string and how often it is no entity."""
        progress("dictionary: counting the pool's strings")
        shown = [self._shown(d.text) for d in pool.sentences]
        labels: dict[str, Counter[str]] = {}
        for demonstration, text in zip(pool.sentences, shown, strict=True):
            for entity in demonstration.entities:
                labels.setdefault(text[entity.start : entity.end], Counter())[entity.label] += 1
        strings = PoolStrings(labels)
        places: Counter[str] = Counter()
        for text in shown:
            places.update(text[span.start : span.end] for span in strings.find(text, words(text)))
        self._labels = {}
        for surface, counts in labels.items():
            # an entity that does not fall on word borders is not found by `find`
            share = min(1.0, counts.total() / max(places[surface], counts.total()))
            if share >= self._own.least_share:
                label = min(counts, key=lambda name: (-counts[name], name))
                self._labels[surface] = (label, share * counts[label] / counts.total())
        self._strings = PoolStrings(self._labels)

    def _shown(self, text: str) -> str:
        """The text as it is compared: of the same length always."""
        if not self._own.folded:
            return text
        return "".join(c if len(c.lower()) != 1 else c.lower() for c in text)

    def predict(self, sentences: Sequence[Sentence]) -> list[Prediction]:
        """One prediction per sentence; where output is flat the longest string wins, of equal ones the first."""
        return [self._one(sentence) for sentence in sentences]

    def _one(self, sentence: Sentence) -> Prediction:
        text = self._shown(sentence.text)
        spans = self._strings.find(text, words(text))
        if self._overlap == "flat":
            spans = longest(spans)
        found = [Found(span, *self._labels[text[span.start : span.end]]) for span in spans]
        return prediction_of(sentence, found, self._overlap, self.name)

    def stages(self) -> None:
        """No stages."""

    def parameters(self) -> int:
        """None at all."""
        return 0

    def report(self) -> None:
        """Nothing but the counts is taken from the pool."""

    def models(self) -> dict[str, str]:
        """No models."""
        return {}


def longest(spans: Sequence[Span]) -> list[Span]:
    """Spans without overlap: longer ones first, of equal length the earlier ones."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.start - s.end, s.start)):
        if all(span.end <= other.start or other.end <= span.start for other in kept):
            kept.append(span)
    return sorted(kept)
