"""The pool as the cheap voters see it out of fold, and the stack that is cross-fitted on what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from el4ner.engines.base import FloatArray
from el4ner.operating import Decided
from el4ner.records import Candidate
from el4ner.stages.classify import EVIDENCE
from el4ner.stages.team import Team
from el4ner.voters.reading import SpanTable
from el4ner.voters.stacking import Stack, fit_stack, start_stack


@dataclass(frozen=True)
class Examined:
    """The pool's sentences as the voters see them: candidates, truth, votes of the cheap voters, evidence.

    truth: per sentence (n,) i64, label index or the number of labels for "none". votes: voter -> per sentence (n, C).
    gold: entities per sentence, those nobody proposed included. tables: reading or tagging voter -> per sentence what
    it says of every span. stacked: the sentences on which voters are stacked, where a voter votes on a part of the pool
    only, else None for all; on others such a voter has no votes.
    """

    candidates: tuple[tuple[Candidate, ...], ...]
    truth: tuple[NDArray[np.int64], ...]
    votes: dict[str, list[FloatArray]]
    evidence: tuple[FloatArray, ...]
    gold: tuple[int, ...]
    tables: Mapping[str, Sequence[SpanTable]] = field(default_factory=dict)
    stacked: tuple[int, ...] | None = None

    @property
    def sentences(self) -> tuple[int, ...]:
        """The sentences on which voters are stacked."""
        return tuple(range(len(self.candidates))) if self.stacked is None else self.stacked

    def decided(self, shares: Sequence[FloatArray], overlap: str) -> Decided:
        """What is decided where the stacked sentences' candidates have these distributions."""
        chosen = self.sentences
        return Decided(
            [self.candidates[s] for s in chosen], shares, [self.truth[s] for s in chosen],
            [self.gold[s] for s in chosen], overlap,
        )  # fmt: skip


def pooled(
    examined: Examined, voters: Sequence[str], chosen: Sequence[int]
) -> tuple[list[FloatArray], FloatArray, NDArray[np.int64]]:
    """Votes, evidence and truth of some sentences' candidates, one row a candidate."""
    votes = [np.concatenate([examined.votes[name][i] for i in chosen]) for name in voters]
    evidence = np.concatenate([examined.evidence[i] for i in chosen])
    return votes, evidence, np.concatenate([examined.truth[i] for i in chosen])


def cross_fit(team: Team, examined: Examined, voters: Sequence[str]) -> tuple[Stack, list[FloatArray]]:
    """The stack fitted on `examined.sentences`, and for each of these what stacks of the other folds make of it."""
    start = start_stack(voters, len(team.labels) + 1, len(EVIDENCE))
    everyone = examined.sentences
    folds = team.pool.folds
    shares: dict[int, FloatArray] = {i: np.zeros((0, len(team.labels) + 1), np.float32) for i in everyone}
    for fold in sorted({folds[i] for i in everyone}):
        inside = [i for i in everyone if folds[i] != fold]
        if not inside:
            continue
        stack = fit_stack(start, *pooled(examined, voters, inside))
        for i in everyone:
            if folds[i] == fold:
                shares[i] = stack.probabilities([examined.votes[name][i] for name in voters], examined.evidence[i])
    return fit_stack(start, *pooled(examined, voters, everyone)), [shares[i] for i in everyone]
