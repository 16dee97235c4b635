"""The pool as the voters that write nothing see it: each of them fitted, and what it says of sentences it did not see.

reading and tagging voters (cross-fitted) -> candidates -> probing voters (cross-fitted on candidates), retrieval voter
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from el4ner.crossfit import Examined
from el4ner.engines.base import FloatArray
from el4ner.pool import Pool
from el4ner.records import Candidate, Span
from el4ner.stages.classify import evidence_of
from el4ner.stages.extract import free_proposals, pursued, unite
from el4ner.stages.team import Team
from el4ner.voters.reading import SpanTable
from el4ner.voters.reading_fit import fit_on

if TYPE_CHECKING:
    from el4ner.preparation import Preparation


def examine(preparation: Preparation, team: Team) -> Examined:
    """Fits the voters that write nothing, and gives what they say about the candidates of the pool out of fold."""
    pool = team.pool
    sentences = pool.as_sentences(range(len(pool.sentences)))
    tables = _read(preparation, team)
    candidates = _candidates(team, tables)
    spans = [[c.span for c in own] for own in candidates]
    votes = {
        name: [np.exp(table.rows(own)) for table, own in zip(found, spans, strict=True)]
        for name, found in tables.items()
    }
    stacked: tuple[int, ...] | None = None
    if preparation.wants_probing(pool):
        stacked = _sampled(pool, spans, preparation.config.probing.sample, preparation.config.seed)
        votes |= _probe(preparation, team, spans, stacked)
    if preparation.wants("retrieval"):
        preparation.progress("retrieval: encoding the pool's strings")
        team.retrieval = preparation.retrieval_voter(pool)
        team.retrieval.fit(pool, spans)
        votes["retrieval"] = team.retrieval.vote(sentences, spans, exclude_folds=pool.folds)
    truth = [pool.truth(i, own) for i, own in enumerate(spans)]
    gold = tuple(len(d.entities) for d in pool.sentences)
    preparation.facts["candidate recall on the pool"] = _recall(truth, gold, len(pool.labels))
    evidence = tuple(evidence_of(s, own, ()) for s, own in zip(sentences, candidates, strict=True))
    return Examined(tuple(candidates), tuple(truth), votes, evidence, gold, tables, stacked)


def narrowed(preparation: Preparation, team: Team, examined: Examined, asked: Sequence[str]) -> Examined:
    """The same without the candidates that only readers proposed, or pursued, who are not asked: a run has none.

    The same object where all readers are asked, or none is, whose tables then rule nothing out.
    """
    tables = {name: found for name, found in examined.tables.items() if name in asked}
    if not tables or len(tables) == len(examined.tables):
        return examined
    candidates = _candidates(team, tables)
    kept = []
    for own, former in zip(candidates, examined.candidates, strict=True):
        places = {candidate.span: i for i, candidate in enumerate(former)}
        kept.append([places[candidate.span] for candidate in own])

    def of_kept(rows: Sequence[FloatArray]) -> list[FloatArray]:
        # a voter that did not vote on a sentence has no rows there
        return [own[chosen] if len(own) else own for own, chosen in zip(rows, kept, strict=True)]

    truth = tuple(own[chosen] for own, chosen in zip(examined.truth, kept, strict=True))
    preparation.facts["candidate recall on the pool"] = _recall(truth, examined.gold, len(team.labels))
    sentences = team.pool.as_sentences(range(len(candidates)))
    return replace(
        examined, candidates=tuple(candidates), truth=truth, tables=tables,
        votes={name: of_kept(rows) for name, rows in examined.votes.items()},
        evidence=tuple(evidence_of(s, own, ()) for s, own in zip(sentences, candidates, strict=True)),
    )  # fmt: skip


def _recall(truth: Sequence[NDArray[np.int64]], gold: Sequence[int], n_labels: int) -> float:
    """The share of the pool's entities that are candidates."""
    return round(sum(int((own < n_labels).sum()) for own in truth) / max(1, sum(gold)), 4)


def _read(preparation: Preparation, team: Team) -> dict[str, list[SpanTable]]:
    """The voters that read hidden states fitted, and what each says of every span of every pool sentence."""
    pool = team.pool
    team.readers = preparation.readers(pool)
    if not team.readers:
        return {}
    beside = preparation.beside(pool)
    apart = f"{len(beside.sentences)} sentences fitted beside" if beside else "not used"
    used: dict[str, str] = {}
    preparation.facts["built-in pool"] = used
    tables: dict[str, list[SpanTable]] = {}
    models = list(dict.fromkeys(id(voter.reader) for voter in team.readers))
    for model in models:
        own = [voter for voter in team.readers if id(voter.reader) == model]
        start = preparation.start(pool, own[0])
        tables |= fit_on(own, pool, preparation.progress, None if start else beside, start)
        for voter in own:
            used[voter.name] = "begun at its read-outs" if start else apart
        if own[0].unaligned:
            preparation.notes.append(
                f"{own[0].unaligned} pool entities do not fall on word borders, or stand where a long text is not "
                f"read; {' and '.join(voter.name for voter in own)} skip{'s' * (len(own) == 1)} them"
            )
    return {voter.name: tables[voter.name] for voter in team.readers}


def _candidates(team: Team, tables: Mapping[str, Sequence[SpanTable]]) -> list[tuple[Candidate, ...]]:
    """Candidates of the pool's sentences, each without what its own fold knows."""
    pool, config = team.pool, team.config.extract
    found = []
    for i, (sentence, fold) in enumerate(zip(pool.as_sentences(range(len(pool.sentences))), pool.folds, strict=True)):
        proposals = pursued(free_proposals(sentence, team, fold), [own[i] for own in tables.values()], team)
        if config.reading:
            proposals += [(name, own[i].above(config.reading_floor)) for name, own in tables.items()]
        found.append(unite(proposals))
    return found


def _sampled(pool: Pool, spans: Sequence[Sequence[Span]], most: int, seed: int) -> tuple[int, ...] | None:
    """Drawn sentences with about `most` spans together; None for all, where there are no more."""
    size, total = len(pool.sentences), sum(map(len, spans))
    if total <= most:
        return None
    return tuple(pool.sample(max(2, size * most // total), seed))


def _probe(
    preparation: Preparation, team: Team, spans: Sequence[Sequence[Span]], stacked: tuple[int, ...] | None
) -> dict[str, list[FloatArray]]:
    """The probing voters fitted on the candidates of `stacked` (all for None), and their votes on these."""
    pool = team.pool
    chosen = tuple(range(len(pool.sentences))) if stacked is None else stacked
    silent = np.zeros((0, len(pool.labels) + 1), np.float32)
    votes: dict[str, list[FloatArray]] = {}
    for voter in preparation.probers(pool):
        if not any(spans[s] for s in chosen):
            note = f"{voter.name}: nobody proposes a span on the pool, so there is nothing to fit on"
            preparation.notes.append(note)
            continue
        found = voter.fit(pool, chosen, [spans[s] for s in chosen], preparation.progress)
        rows = dict(zip(chosen, found, strict=True))
        votes[voter.name] = [rows.get(s, silent) for s in range(len(pool.sentences))]
        team.probers = (*team.probers, voter)
    return votes
