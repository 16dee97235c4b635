"""Stage 3: every voter gives every candidate a distribution over the labels and "none"; the votes are combined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from el4ner.decoding import keep
from el4ner.engines.base import FloatArray
from el4ner.kernels import vote as count_votes
from el4ner.records import NONE_LABEL, Candidate, Sentence, Span, Usage
from el4ner.stages.extract import NOUN_PHRASES, POOL_STRINGS, Extracted
from el4ner.stages.retrieve import Retrieved
from el4ner.stages.team import Team
from el4ner.voters import Voter
from el4ner.voters.conversations import together

EVIDENCE = ("noun phrase", "pool string", "words beyond the first", "share of members that listed it")
"""What the stack weighs beside the votes."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate with its best label, the probability that span and label are right, and who voted what."""

    candidate: Candidate
    label: str
    score: float
    votes: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Classified:
    """Per sentence: the spans that are kept, by span, what it cost, and members whose question was too long to ask.

    close: the spans that rounding might decide otherwise.
    """

    kept: tuple[tuple[Scored, ...], ...]
    usage: tuple[Usage, ...]
    unread: tuple[tuple[str, ...], ...]
    close: tuple[tuple[Span, ...], ...]


def evidence_of(sentence: Sentence, candidates: Sequence[Candidate], members: Sequence[str]) -> FloatArray:
    """(n, len(EVIDENCE)) f32 for the candidates of one sentence."""
    rows = np.zeros((len(candidates), len(EVIDENCE)), dtype=np.float32)
    for row, candidate in zip(rows, candidates, strict=True):
        surface = sentence.text[candidate.span.start : candidate.span.end]
        listed = sum(name in candidate.proposed_by for name in members)
        row[:] = (
            NOUN_PHRASES in candidate.proposed_by,
            POOL_STRINGS in candidate.proposed_by,
            len(surface.split()) - 1,
            listed / len(members) if members else 0.0,
        )
    return rows


def cheap_votes(
    sentences: Sequence[Sentence], spans: Sequence[Sequence[Span]], team: Team
) -> dict[str, list[FloatArray]]:
    """Votes of the voters that are asked and write nothing: voter -> per sentence (n_spans, L + 1)."""
    voters: list[Voter] = [*team.asked_readers, *team.asked_probers]
    if team.asks_retrieval and team.retrieval is not None:
        voters.append(team.retrieval)
    return {voter.name: voter.vote(sentences, spans) for voter in voters}


def member_votes(
    sentences: Sequence[Sentence],
    retrieved: Retrieved,
    extracted: Extracted,
    worth: Sequence[Sequence[bool]],
    team: Team,
) -> tuple[dict[str, list[FloatArray]], list[Usage], list[tuple[str, ...]]]:
    """Votes of the prompted members on the candidates that are worth a question; NaN on the others.

    Beside them what each sentence cost, and the members whose question about it was too long to ask.
    """
    votes: dict[str, list[FloatArray]] = {}
    usage = [Usage()] * len(sentences)
    unread: list[tuple[str, ...]] = [()] * len(sentences)
    asked = [
        [c.span for c, ask in zip(own, flags, strict=True) if ask]
        for own, flags in zip(extracted.candidates, worth, strict=True)
    ]
    members = team.asked_members
    computed: list[int] = []
    talks = [member.classification(sentences, retrieved.demonstrations, asked) for member in members]
    answers = together(talks, computed)
    for member, own_answers, tokens in zip(members, answers, computed, strict=True):
        team.spend("classify", member.name, (found.usage for found in own_answers), tokens)
        rows = []
        for i, found in enumerate(own_answers):
            full = np.full((len(worth[i]), len(team.labels) + 1), np.nan, dtype=np.float32)
            full[np.array(worth[i], dtype=bool)] = found.votes
            rows.append(full)
            usage[i] = usage[i] + found.usage
            team.counts[f"{member.name}: malformed labels"] += found.malformed
            unread[i] += (member.name,) if found.too_long else ()
        votes[member.name] = rows
    return votes, usage, unread


def combine(votes: Sequence[FloatArray], evidence: FloatArray, team: Team) -> FloatArray:
    """Votes of one sentence, voters in the order of `team.asked` -> distributions (n, L + 1).

    By the fitted stack; or the mean of those that voted; or by majority: only the winner's column is filled, with its
    share of the first choices, so that a tie stays decided for the earlier voter. Nobody voted: "none" has all.
    """
    stacked = np.stack(votes)  # (V, n, C)
    silent = np.asarray(np.isnan(stacked).all(axis=2))
    result = np.zeros(stacked.shape[1:], dtype=np.float32)
    if team.stack is not None:
        result[:] = team.stack.probabilities(votes, evidence)
        unheard = silent.all(axis=0)
        result[unheard] = 0.0
        result[unheard, -1] = 1.0
        return result
    if team.config.classify.combine == "majority":
        with np.errstate(divide="ignore"):
            winners, _, _ = count_votes(np.log(stacked), np.ones(len(votes), dtype=np.float32), hard=True)
        for i, winner in enumerate(winners):
            if winner >= 0:
                cast = stacked[~silent[:, i], i].argmax(axis=1)
                result[i, winner] = np.mean(cast == winner)
            else:
                result[i, -1] = 1.0
        return result
    counted = np.where(silent[:, :, None], 0.0, stacked).sum(axis=0)
    spoke = (~silent).sum(axis=0)
    result[:, -1] = 1.0
    result[spoke > 0] = counted[spoke > 0] / spoke[spoke > 0, None]
    return result


def classify(sentences: Sequence[Sentence], retrieved: Retrieved, extracted: Extracted, team: Team) -> Classified:
    """The candidates whose best label reaches the threshold, without overlaps unless nesting is asked for."""
    spans = [[c.span for c in own] for own in extracted.candidates]
    votes = cheap_votes(sentences, spans, team)
    members = [member.name for member in team.asked_members]
    evidence = [evidence_of(s, own, members) for s, own in zip(sentences, extracted.candidates, strict=True)]
    usage = list(extracted.usage)
    unread: list[tuple[str, ...]] = [()] * len(sentences)
    if members:
        worth = [worth_asking(i, extracted.candidates[i], votes, evidence[i], team) for i in range(len(sentences))]
        prompted, cost, unread = member_votes(sentences, retrieved, extracted, worth, team)
        votes |= prompted
        usage = [a + b for a, b in zip(usage, cost, strict=True)]
    kept, close = [], []
    for i, own in enumerate(extracted.candidates):
        cast = {name: votes[name][i] for name in team.asked}
        found = combine(list(cast.values()), evidence[i], team) if own else np.zeros((0, 1), np.float32)
        kept.append(_keep(own, found, cast, team))
        spans_kept = [scored.candidate.span for scored in kept[-1]]
        close.append(tuple(close_calls(spans[i], found, spans_kept, team)) if team.tie_tolerance and own else ())
    return Classified(tuple(kept), tuple(usage), tuple(unread), tuple(close))


def close_calls(spans: Sequence[Span], found: FloatArray, kept: Sequence[Span], team: Team) -> list[Span]:
    """The spans of one sentence that rounding might decide otherwise; found (n, L + 1) are their distributions.

    Their score is near the threshold, or near that of "none" where they must beat it; or they are kept and another
    label, or an overlapping span, comes near.
    """
    near = team.tie_tolerance
    ordered = np.sort(found[:, :-1].astype(np.float64), axis=1)
    scores = ordered[:, -1]
    low, high = (team.calibration(np.clip(scores + by, 0.0, 1.0)) for by in (-near, near))
    second = ordered[:, -2] if ordered.shape[1] > 1 else np.full(len(scores), -np.inf)
    close = []
    for i, span in enumerate(spans):
        at_threshold = low[i] <= team.threshold <= high[i]
        if team.stack is None:
            at_threshold |= high[i] >= team.threshold and abs(scores[i] - found[i, -1]) <= near
        contested = span in kept and (
            scores[i] - second[i] <= near
            or any(
                j != i and other.start < span.end and span.start < other.end and scores[j] >= scores[i] - near
                for j, other in enumerate(spans)
            )
        )
        if at_threshold or contested:
            close.append(span)
    return close


def worth_asking(
    i: int, candidates: Sequence[Candidate], votes: dict[str, list[FloatArray]], evidence: FloatArray, team: Team
) -> list[bool]:
    """Which candidates the members are asked about: those they listed, and those the other voters do not rule out.

    Without other voters there is nothing to rule out by: all.
    """
    if team.base is None or not candidates:
        return [True] * len(candidates)
    cheap = team.base.probabilities([votes[name][i] for name in team.base.voters], evidence)
    return [bool(1 - row[-1] >= team.ask_floor or flags[-1] > 0) for row, flags in zip(cheap, evidence, strict=True)]


def _keep(
    candidates: Sequence[Candidate], found: FloatArray, cast: dict[str, FloatArray], team: Team
) -> tuple[Scored, ...]:
    if not candidates:
        return ()
    best = found[:, :-1].argmax(axis=1)
    scores = team.calibration(found[np.arange(len(found)), best])
    # without a stack the label must also beat "none"; a stack's threshold has been fitted for that
    beaten = found[:, -1] >= scores if team.stack is None else np.zeros(len(found), dtype=bool)
    scores = np.where(beaten, 0.0, scores)
    chosen = keep([c.span for c in candidates], list(scores), team.threshold, team.config.overlap, team.reference)
    names = (*team.labels, NONE_LABEL)
    return tuple(
        Scored(
            candidates[i],
            team.labels[int(best[i])],
            float(scores[i]),
            {
                voter: {name: float(p) for name, p in zip(names, rows[i], strict=True)}
                for voter, rows in cast.items()
                if not np.isnan(rows[i]).any()
            },
        )
        for i in chosen
    )
