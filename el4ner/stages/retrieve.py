"""Stage 1: demonstrations, the pool sentences whose spans are most like those of the input.

    SpanSim(X, c) = sum_s w(s) * max_{t in spans(c)} cos(e(s), e(t)) / sum_s w(s)        (EL4NER, arXiv:2505.23038)

w(s) is the weight of the span's part of speech. Only prompted members need demonstrations: where none is asked, none
are fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from el4ner.cache import ArrayCache, content_key
from el4ner.config import RetrieveConfig
from el4ner.engines.base import Encoder
from el4ner.kernels import LARGE, SpanIndex, SpanPool, span_topk
from el4ner.pool import Pool
from el4ner.records import Demonstration, Sentence, Span, Usage
from el4ner.stages.ranking import Bm25Ranking, RandomRanking, Ranking, SentenceRanking
from el4ner.stages.team import Team
from el4ner.text import noun_phrases, pos_tags, span_weight, words
from el4ner.voters.conversations import together


@dataclass(frozen=True)
class Retrieved:
    """Per sentence: demonstrations, most similar first, and what finding them cost."""

    demonstrations: tuple[tuple[Demonstration, ...], ...]
    usage: tuple[Usage, ...]


class Retriever:
    """Finds demonstrations in one pool; the pool side is its gold spans. seed: for those drawn at random."""

    def __init__(self, pool: Pool, encoder: Encoder, config: RetrieveConfig, cache: ArrayCache, seed: int = 0) -> None:
        self.pool = pool
        self._encoder = encoder
        self._config = config
        # only sentences with entities are demonstrations, however they are ranked
        self._shown = [position for position, d in enumerate(pool.sentences) if d.entities]
        self._ranking = _ranking([pool.sentences[s].text for s in self._shown], encoder, config, cache, seed)
        owners = [(s, d.text[e.start : e.end]) for s, d in enumerate(pool.sentences) for e in d.entities]
        surfaces = sorted({surface for _, surface in owners})
        key = content_key("demonstration spans", encoder.source, surfaces)
        stored = cache.get(key)
        if stored is None:
            stored = {"vectors": encoder.encode(surfaces).astype(np.float32)}
            cache.put(key, stored)
        row = {surface: position for position, surface in enumerate(surfaces)}
        counts = np.bincount([s for s, _ in owners], minlength=len(pool.sentences))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        vectors = stored["vectors"][[row[surface] for _, surface in owners]] if owners else stored["vectors"]
        self._spans = SpanPool.pack(np.ascontiguousarray(vectors), offsets)
        large = config.approximate and len(vectors) >= LARGE
        self._index = SpanIndex.build(self._spans, seed=seed) if large else None
        self._same_text: dict[str, set[int]] = {}
        self._in_fold: dict[int, set[int]] = {}
        for position, (demonstration, fold) in enumerate(zip(pool.sentences, pool.folds, strict=True)):
            self._same_text.setdefault(demonstration.text, set()).add(position)
            self._in_fold.setdefault(fold, set()).add(position)
        # where no span of the input weighs anything, every input gets the same few sentences
        self._fallback = [s for s, demonstration in enumerate(pool.sentences) if demonstration.entities]

    def find(
        self,
        sentences: Sequence[Sentence],
        spans: Sequence[Sequence[Span]],
        exclude_folds: Sequence[int] | None = None,
    ) -> list[tuple[Demonstration, ...]]:
        """The k most similar pool sentences of each sentence.

        exclude_folds (N): pool sentences of that fold are no demonstrations; for sentences of the pool itself. A pool
        sentence with the input's own text is never one.
        """
        k = self._config.k
        if not k or not self.pool.sentences:
            return [()] * len(sentences)
        folds: Sequence[int | None] = [None] * len(sentences) if exclude_folds is None else exclude_folds
        exclude = [self._own(sentence, fold) for sentence, fold in zip(sentences, folds, strict=True)]
        if self._ranking is not None:
            own_places = [{p for p, s in enumerate(self._shown) if s in own} for own in exclude]
            ranked = self._ranking.top([sentence.text for sentence in sentences], k, own_places)
            return [tuple(self.pool.sentences[self._shown[p]] for p in own) for own in ranked]
        surfaces, weights, offsets = [], [], [0]
        for sentence, own in zip(sentences, spans, strict=True):
            units = words(sentence.text)
            tags = pos_tags(sentence.text, units)
            surfaces += [sentence.text[span.start : span.end] for span in own]
            weights += [span_weight(span, units, tags, self._config.pos_of) for span in own]
            offsets.append(len(surfaces))
        ids, _ = span_topk(
            self._encoder.encode(surfaces), np.array(offsets), np.array(weights, dtype=np.float32),
            self._spans, k, exclude=exclude, backend="auto", candidates=self._index,
        )  # fmt: skip
        found = []
        for row, left_out in zip(ids, exclude, strict=True):
            chosen = [int(s) for s in row if s >= 0]
            chosen += [s for s in self._fallback if s not in left_out][:k] if not chosen else []
            found.append(tuple(self.pool.sentences[s] for s in chosen))
        return found

    def _own(self, sentence: Sentence, fold: int | None) -> set[int]:
        """Pool sentences that must not be shown to this sentence."""
        same = self._same_text.get(sentence.text, set())
        return same if fold is None else same | self._in_fold[fold]


def _ranking(
    texts: Sequence[str], encoder: Encoder, config: RetrieveConfig, cache: ArrayCache, seed: int
) -> Ranking | None:
    """How pool sentences are ranked where that is not by spans."""
    if config.by == "sentence":
        return SentenceRanking(texts, encoder, cache)
    if config.by == "bm25":
        return Bm25Ranking(texts)
    return RandomRanking(len(texts), seed) if config.by == "random" else None


def input_spans(
    sentences: Sequence[Sentence], team: Team, folds: Sequence[int] | None = None
) -> tuple[list[list[Span]], list[Usage]]:
    """The spans of the input that retrieval compares: the members' zero-shot lists united, or the free proposers'.

    None where it does not compare spans. folds: of pool sentences as input, whose own strings propose nothing.
    """
    if team.config.retrieve.by != "spans":
        return [[] for _ in sentences], [Usage()] * len(sentences)
    if team.config.retrieve.spans == "members":
        spans: list[set[Span]] = [set() for _ in sentences]
        usage = [Usage()] * len(sentences)
        computed: list[int] = []
        talks = [member.extraction(sentences) for member in team.asked_members]
        for member, lists, tokens in zip(team.asked_members, together(talks, computed), computed, strict=True):
            team.spend("retrieve", member.name, (listed.usage for listed in lists), tokens)
            for i, listed in enumerate(lists):
                spans[i].update(listed.spans)
                usage[i] = usage[i] + listed.usage
        return [sorted(own) for own in spans], usage
    found = []
    for i, sentence in enumerate(sentences):
        strings = team.pool.strings if folds is None else team.pool.strings_without(folds[i])
        found.append(sorted({*noun_phrases(sentence.text), *strings.find(sentence.text, words(sentence.text))}))
    return found, [Usage()] * len(sentences)


def retrieve(sentences: Sequence[Sentence], team: Team) -> Retrieved:
    """Demonstrations for every sentence; none where no prompted member is asked or the pool is empty."""
    if not team.asked_members or team.retriever is None:
        return Retrieved(((),) * len(sentences), (Usage(),) * len(sentences))
    spans, usage = input_spans(sentences, team)
    return Retrieved(tuple(team.retriever.find(sentences, spans)), tuple(usage))
