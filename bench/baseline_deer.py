"""Retrieval by label-aware token statistics, in the manner of DEER, and a second look at error-prone words.

Bai et al. 2025, "Label-Guided In-Context Learning for Named Entity Recognition" (arXiv:2505.23722, EMNLP 2025,
pp. 28360-28380): how often a word of the pool is part of an entity, stands beside one, or neither decides how much it
counts when sentences are compared; then words that such statistics call error-prone are asked about once more. From
its published description, our own formulas:

    w(t) = entity P(entity | t) + context P(context | t) + other P(other | t)   (of unknown words: unseen)
    v(X) = sum_t w(t) e(t) / |sum_t w(t) e(t)|,   similarity of X and c = v(X) . v(c)

e() encodes single words. Second look: runs of words that are mostly entities in the pool, or that it does not hold and
that begin with a capital, where nothing was found (missed?), and found entities whose words are hardly ever part of one
(wrong?). Each is asked about by scoring the labels and "none of these".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from el4ner.bench.baseline_one_prompt import KateSettings, OnePrompt
from el4ner.bench.baseline_prompts import word_spans
from el4ner.bench.system import Found, Workbench, with_options
from el4ner.cache import ArrayCache, cache_root, content_key
from el4ner.engines.base import Choose, FloatArray, Prompt
from el4ner.pool import Pool
from el4ner.prompts import classification_question, label_choices, prefix
from el4ner.records import Demonstration, Sentence, Span, Usage
from el4ner.stages.ranking import best


class DeerSettings(KateSettings):
    """entity, context, other, unseen: weights of a word's statistics. window: words beside an entity that are context.
    reflect: the second look. missed, wrong: shares of a word's places from which on, or below which, it is error-prone.
    """

    entity: float = Field(default=1.0, ge=0)
    context: float = Field(default=0.3, ge=0)
    other: float = Field(default=0.03, ge=0)
    unseen: float = Field(default=1.0, ge=0)
    window: int = Field(default=2, ge=0)
    reflect: bool = True
    missed: float = Field(default=0.8, ge=0, le=1)
    wrong: float = Field(default=0.05, ge=0, le=1)


class TokenStatistics:
    """How often each word of a pool, case folded, is part of an entity, stands within `window` words of one, or
    neither. A word is counted once a place; inside an entity comes before beside one."""

    def __init__(self, pool: Sequence[Demonstration], window: int) -> None:
        self._counts: dict[str, Counter[str]] = {}
        for demonstration in pool:
            units = word_spans(demonstration.text)
            inside = [any(u.start < e.end and e.start < u.end for e in demonstration.entities) for u in units]
            for i, unit in enumerate(units):
                beside = any(inside[max(0, i - window) : i + window + 1])
                kind = "entity" if inside[i] else "context" if beside else "other"
                word = demonstration.text[unit.start : unit.end].casefold()
                self._counts.setdefault(word, Counter())[kind] += 1

    def share(self, word: str, kind: str) -> float | None:
        """The share of a word's places that are of a kind; None for a word that the pool does not hold."""
        counts = self._counts.get(word.casefold())
        return None if counts is None else counts[kind] / counts.total()

    @property
    def vocabulary(self) -> list[str]:
        """All words, case folded, sorted."""
        return sorted(self._counts)


class Deer(OnePrompt):
    """One generation a sentence, then choices about its error-prone words (implements `System`)."""

    def __init__(self, bench: Workbench, options: Mapping[str, Any]) -> None:
        self._deer = with_options(DeerSettings, options, "deer")
        super().__init__("deer", bench, self._deer)
        self._k = bench.demonstrations(self._deer.k, "deer")
        self._pool: list[Demonstration] = []
        self._statistics = TokenStatistics((), 0)
        self._words: dict[str, FloatArray] = {}
        self._vectors: FloatArray = np.zeros((0, 1), dtype=np.float32)

    @property
    def settings(self) -> Mapping[str, Any]:
        """As of the others, with k as it is used."""
        return {**super().settings, "k": self._k}

    def prepare(self, pool: Pool, progress: Callable[[str], None]) -> None:
        """Counts the pool's words, encodes each of them (or takes them from the cache), and the sentences by them."""
        super().prepare(pool, progress)
        progress("encoding the pool's words")
        self._pool = [d for d in pool.sentences if d.entities or not self._deer.only_with_entities]
        self._statistics = TokenStatistics(pool.sentences, self._deer.window)
        vocabulary = self._statistics.vocabulary
        cache = ArrayCache(cache_root() / "pools")
        key = content_key("words", self.bench.encoder.source, vocabulary)
        stored = cache.get(key)
        if stored is None:
            stored = {"vectors": self.bench.encoder.encode(vocabulary).astype(np.float32)}
            cache.put(key, stored)
        self._words = dict(zip(vocabulary, stored["vectors"], strict=True))
        rows = [self.vector(d.text) for d in self._pool]
        self._vectors = np.stack(rows) if rows else np.zeros((0, 1), dtype=np.float32)

    def weight(self, word: str) -> float:
        """How much a word counts when sentences are compared."""
        own, shares = self._deer, self._statistics
        if shares.share(word, "entity") is None:
            return own.unseen
        weights = {"entity": own.entity, "context": own.context, "other": own.other}
        return sum(weight * (shares.share(word, kind) or 0.0) for kind, weight in weights.items())

    def vector(self, text: str) -> FloatArray:
        """A sentence as the weighted sum of its words' vectors (D,), of length one; zeros where nothing counts."""
        found = [text[u.start : u.end].casefold() for u in word_spans(text)]
        missing = sorted({word for word in found if word not in self._words})
        if missing:
            self._words.update(zip(missing, self.bench.encoder.encode(missing), strict=True))
        width = len(next(iter(self._words.values()))) if self._words else 1
        total = np.zeros(width, dtype=np.float32)
        for word in found:
            total += self.weight(word) * self._words[word]
        norm = float(np.linalg.norm(total))
        return total / norm if norm else total

    def demonstrations(self, sentences: Sequence[Sentence]) -> list[list[Demonstration]]:
        """The pool sentences nearest by weighted words."""
        if not len(self._vectors) or not self._k:
            return [[] for _ in sentences]
        ranked = [best(self._vectors @ self.vector(s.text), self._k, ()) for s in sentences]
        return [[self._pool[p] for p in positions] for positions in ranked]

    def ask(
        self, sentences: Sequence[Sentence], shown: Sequence[Sequence[Demonstration]]
    ) -> tuple[list[list[Found]], list[Usage], list[str | None]]:
        """The first answer, and what the second look makes of it."""
        found, usage, errors = super().ask(sentences, shown)
        if not self._deer.reflect:
            return found, usage, errors
        doubtful = [self._doubtful(s.text, own) for s, own in zip(sentences, found, strict=True)]
        requests: list[Choose] = []
        places: list[tuple[int, Span]] = []
        choices = label_choices(self.labels)
        for i, (sentence, spans) in enumerate(zip(sentences, doubtful, strict=True)):
            for span in spans:
                prompt = self._question(sentence.text, span, shown[i])
                if prompt is not None:
                    requests.append(Choose(prompt, choices, "choices"))
                    places.append((i, span))
        counts = self.engine.count_tokens([request.prompt for request in requests])
        for (i, span), scores, tokens in zip(places, self.engine.choose(requests), counts, strict=True):
            found[i] = [one for one in found[i] if one.span != span]
            winner = int(scores.argmax())
            if winner < len(self.labels):
                found[i].append(Found(span, self.labels[winner].name, float(np.exp(scores[winner]))))
            usage[i] += Usage(prompt_tokens=tokens)
        return found, usage, errors

    def _question(self, text: str, span: Span, shown: Sequence[Demonstration]) -> Prompt | None:
        question = classification_question(text[span.start : span.end])

        def build(demonstrations: Sequence[Demonstration]) -> Prompt:
            return *prefix(text, demonstrations, self.labels), question

        return self.fitted(build, shown, 16)

    def _doubtful(self, text: str, found: Sequence[Found]) -> list[Span]:
        """Spans to ask about again: what may have been missed, and what may be wrong."""
        units = word_spans(text)
        taken = [any(u.start < one.span.end and one.span.start < u.end for one in found) for u in units]
        likely = [not used and self._likely(text[u.start : u.end]) for u, used in zip(units, taken, strict=True)]
        missed: list[Span] = []
        for i, unit in enumerate(units):
            if likely[i] and i and likely[i - 1] and text[units[i - 1].end : unit.start].strip() == "":
                missed[-1] = Span(missed[-1].start, unit.end)
            elif likely[i]:
                missed.append(unit)
        wrong = [one.span for one in found if self._unlikely(text, one.span)]
        return list(dict.fromkeys([*missed, *wrong]))

    def _likely(self, word: str) -> bool:
        share = self._statistics.share(word, "entity")
        return word[0].isupper() and not word.isupper() if share is None else share >= self._deer.missed

    def _unlikely(self, text: str, span: Span) -> bool:
        surface = text[span.start : span.end]
        shares = [self._statistics.share(surface[u.start : u.end], "entity") for u in word_spans(surface)]
        return all(share is not None and share < self._deer.wrong for share in shares)
