"""Stage 4: a verifier judges every (span, label); what it rejects is dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from el4ner.decoding import log_odds
from el4ner.records import Entity, Sentence, Span, Usage
from el4ner.stages.classify import Classified, Scored
from el4ner.stages.retrieve import Retrieved
from el4ner.stages.team import Team
from el4ner.voters.conversations import together


@dataclass(frozen=True)
class Verified:
    """Per sentence: its entities, what the four stages cost, and whether a question was too long for the verifier.

    close: the spans that rounding might decide otherwise, here or in classification.
    """

    entities: tuple[tuple[Entity, ...], ...]
    usage: tuple[Usage, ...]
    unread: tuple[bool, ...]
    close: tuple[tuple[Span, ...], ...]


def verified_score(score: float, p: float, weights: tuple[float, float, float]) -> float:
    """The score after the verifier: logistic in the log-odds of score and verdict, with fitted weights."""
    a, b, c = weights
    odds = a * float(log_odds(np.asarray(score))) + b * float(log_odds(np.asarray(p))) + c
    return 1.0 / (1.0 + math.exp(-odds))


def verify(sentences: Sequence[Sentence], retrieved: Retrieved, classified: Classified, team: Team) -> Verified:
    """Entities of every sentence: what classification kept, less what the verifier rejects."""
    usage = list(classified.usage)
    verifier = team.verifier
    if verifier is None:
        unjudged = tuple(
            tuple(_entity(sentence, scored, None) for scored in own)
            for sentence, own in zip(sentences, classified.kept, strict=True)
        )
        return Verified(unjudged, classified.usage, (False,) * len(sentences), classified.close)
    claims = [[(scored.candidate.span, scored.label) for scored in own] for own in classified.kept]
    entities, close = [], []
    computed: list[int] = []
    (judged,) = together([verifier.verification(sentences, retrieved.demonstrations, claims)], computed)
    team.spend("verify", verifier.name, (found.usage for found in judged), computed[0])
    for i, (sentence, own, found) in enumerate(zip(sentences, classified.kept, judged, strict=True)):
        usage[i] = usage[i] + found.usage
        team.counts[f"{verifier.name}: malformed verdicts"] += found.malformed
        kept = []
        turning = list(classified.close[i])
        for scored, p in zip(own, found.probabilities, strict=True):
            if _is_close(scored, p, team):
                turning.append(scored.candidate.span)
            entity = _judge(sentence, scored, p, team)
            if entity is not None:
                kept.append(entity)
        entities.append(tuple(kept))
        close.append(tuple(dict.fromkeys(turning)))
    return Verified(tuple(entities), tuple(usage), tuple(found.too_long for found in judged), tuple(close))


def _judge(sentence: Sentence, scored: Scored, p: float, team: Team) -> Entity | None:
    """The entity if the verifier lets it pass. No usable verdict: rejected where verdicts are written, else kept, or
    weighed as even odds, which is how verdicts were weighed on the pool."""
    unusable = math.isnan(p)
    if unusable and team.config.verify.by == "generation":
        return None
    said = None if unusable else p
    if team.verifier_weights is None:
        return _entity(sentence, scored, said) if unusable or p >= 0.5 else None
    score = verified_score(scored.score, 0.5 if unusable else p, team.verifier_weights)
    return _entity(sentence, replace(scored, score=score), said) if score >= team.threshold else None


def _is_close(scored: Scored, p: float, team: Team) -> bool:
    """Whether rounding might turn the verdict."""
    if not team.tie_tolerance or math.isnan(p):
        return False
    if team.verifier_weights is None:
        return abs(p - 0.5) <= team.tie_tolerance
    return abs(verified_score(scored.score, p, team.verifier_weights) - team.threshold) <= team.tie_tolerance


def _entity(sentence: Sentence, scored: Scored, p: float | None) -> Entity:
    start, end = scored.candidate.span
    return Entity(
        start, end, sentence.text[start:end], scored.label, scored.score, scored.votes, scored.candidate.proposed_by, p
    )
