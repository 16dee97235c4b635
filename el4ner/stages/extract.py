"""Stage 2: candidate spans, the union of everybody's proposals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from el4ner.records import Candidate, Sentence, Span, Usage
from el4ner.stages.retrieve import Retrieved
from el4ner.stages.team import Team
from el4ner.text import noun_phrases, words
from el4ner.voters.conversations import together
from el4ner.voters.reading import SpanTable

NOUN_PHRASES = "noun-phrases"
POOL_STRINGS = "pool-strings"


@dataclass(frozen=True)
class Extracted:
    """Per sentence: candidates by span, what they cost, and who did not read the whole text.

    read_up_to: reading and tagging voters that were cut with the code point where, members that the text is too long
    for with 0; None where everybody read all of it.
    """

    candidates: tuple[tuple[Candidate, ...], ...]
    usage: tuple[Usage, ...]
    read_up_to: tuple[Mapping[str, int] | None, ...]


def unite(proposals: Sequence[tuple[str, Sequence[Span]]]) -> tuple[Candidate, ...]:
    """(proposer, spans) pairs of one sentence -> its candidates, sorted by span."""
    proposers: dict[Span, set[str]] = {}
    for name, spans in proposals:
        for span in spans:
            proposers.setdefault(span, set()).add(name)
    return tuple(Candidate(span, tuple(sorted(proposers[span]))) for span in sorted(proposers))


def free_proposals(sentence: Sentence, team: Team, left_out: int | None = None) -> list[tuple[str, Sequence[Span]]]:
    """What noun phrases and pool strings propose; `left_out` is a fold whose strings are not known."""
    config = team.config.extract
    proposals: list[tuple[str, Sequence[Span]]] = []
    if config.noun_phrases:
        proposals.append((NOUN_PHRASES, noun_phrases(sentence.text)))
    if config.pool_strings:
        strings = team.pool.strings if left_out is None else team.pool.strings_without(left_out)
        proposals.append((POOL_STRINGS, strings.find(sentence.text, words(sentence.text))))
    return proposals


def pursued(
    proposals: Sequence[tuple[str, Sequence[Span]]], tables: Sequence[SpanTable], team: Team
) -> list[tuple[str, Sequence[Span]]]:
    """The proposals of one sentence without phrases and strings that all who read the text all but rule out.

    Behind what they read, phrases are not pursued (nearly all are no entity), known strings are.
    """
    config = team.config.extract
    floors = {NOUN_PHRASES: config.phrase_floor, POOL_STRINGS: config.string_floor}
    kept: list[tuple[str, Sequence[Span]]] = []
    for name, spans in proposals:
        if tables and spans and floors.get(name):
            entity = np.fmax.reduce([1 - np.exp(table.rows(spans)[:, -1]) for table in tables])
            entity[np.isnan(entity)] = 1.0 if name == POOL_STRINGS else 0.0
            spans = [span for span, p in zip(spans, entity, strict=True) if p >= floors[name]]
        kept.append((name, spans))
    return kept


def extract(sentences: Sequence[Sentence], retrieved: Retrieved, team: Team) -> Extracted:
    """Candidates of every sentence from the free proposers, and from the readers and members that are asked."""
    config = team.config.extract
    tables = {voter.name: voter.tables(sentences) for voter in team.asked_readers}
    proposals: list[list[tuple[str, Sequence[Span]]]] = []
    read_up_to: list[dict[str, int]] = []
    for i, sentence in enumerate(sentences):
        own = {name: found[i] for name, found in tables.items()}
        proposed = pursued(free_proposals(sentence, team), list(own.values()), team)
        if config.reading:
            proposed += [(name, table.above(config.reading_floor)) for name, table in own.items()]
        proposals.append(proposed)
        read_up_to.append({name: t.truncated_at for name, t in own.items() if t.truncated_at is not None})
    usage = list(retrieved.usage)
    members = team.asked_members if config.members else ()
    computed: list[int] = []
    lists = together([member.extraction(sentences, retrieved.demonstrations) for member in members], computed)
    for member, own_lists, tokens in zip(members, lists, computed, strict=True):
        team.spend("extract", member.name, (listed.usage for listed in own_lists), tokens)
        for i, listed in enumerate(own_lists):
            proposals[i].append((member.name, listed.spans))
            usage[i] = usage[i] + listed.usage
            team.count(member.name, listed)
            if listed.too_long:
                read_up_to[i][member.name] = 0
    return Extracted(tuple(unite(own) for own in proposals), tuple(usage), tuple(ends or None for ends in read_up_to))
