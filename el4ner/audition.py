"""The audition: are prompted members worth asking? Tried on pool sentences that their demonstrations leave out.

First on a few sentences, where they vote on what the others propose: writing lists is the dearest thing that members
do, and who labels no better than chance finds no spans that are worth it. Members whose votes do not make those
sentences more probable are not asked (unless all are asked for): none of them, or not those that add nothing to the
others. Those that pass list spans too and are stacked on a larger sample, beside what the cheap voters already have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from el4ner.cache import content_key
from el4ner.engines.base import FloatArray
from el4ner.fitted import fitted_key
from el4ner.operating import Decided
from el4ner.records import Candidate, Sentence, Span, Usage
from el4ner.stages.classify import evidence_of, member_votes, worth_asking
from el4ner.stages.extract import Extracted, unite
from el4ner.stages.retrieve import Retrieved, input_spans
from el4ner.stages.team import Team
from el4ner.voters.conversations import together
from el4ner.weighing import (
    NEUTRAL,
    ask_verifier,
    gains_of,
    passed_scores,
    verified_scores,
    weigh_members,
    weigh_verifier,
)

if TYPE_CHECKING:
    from el4ner.crossfit import Examined
    from el4ner.preparation import Preparation

_LEAST_GAIN = 0.02
"""Gain in log-probability a sentence below which asking is not worth its prompts, however certain it is."""

_STANDARD_ERRORS = 1.0
"""Gain in log-probability that a member must show, in standard errors over sentences."""


def audition(preparation: Preparation, team: Team, examined: Examined) -> None:
    """Stacks the prompted members on a sample of the pool, or decides not to ask them."""
    config = preparation.config
    wanted = preparation.wanted_members()
    cheap = team.asked
    team.members = preparation.members(team.pool, wanted)
    team.retriever = preparation.retriever(team.pool)
    team.asked = (*cheap, *(member.name for member in team.members))
    if config.voters == "auto" and cheap:
        passed = _passing(preparation, team, examined)
        team.asked = (*cheap, *passed)
        if not passed:
            return
    sample = team.pool.sample(config.stack.sample, config.seed)
    preparation.progress(f"stacking the prompted members on {len(sample)} pool sentences")
    asked = ask(preparation, team, examined, sample)
    folds = [team.pool.folds[s] for s in sample]
    weighed = weigh_members(team, asked, folds)
    gold = [examined.gold[s] for s in sample]
    decided = Decided(asked.candidates, weighed.shares, asked.truth, gold, config.overlap)
    # beside cheap voters theirs stay, which were fitted on the whole pool
    decided = replace(decided, calibration=team.calibration) if cheap else preparation.calibrate(team, decided)
    team.stack = weighed.stack
    preparation.facts["members on the sample"] = {
        "sentences": len(sample), "penalty": weighed.penalty,
        "gain in log-probability per sentence": round(weighed.gain, 4), "standard error": round(weighed.error, 4),
    }  # fmt: skip
    team.verifier = preparation.verifier(team)
    if team.verifier is not None:
        weigh = _weigh_verdicts if config.verify.by == "choice" else _weigh_written
        decided = replace(decided, verified=weigh(preparation, team, asked, decided, folds))
    preparation.points = decided.points(team.threshold)


def _weigh_verdicts(
    preparation: Preparation, team: Team, asked: Asked, decided: Decided, folds: Sequence[int]
) -> list[np.ndarray] | None:
    """The scores after the verifier, whose weights are set here; None where it brings nothing and need not be asked."""
    verdicts = ask_verifier(team, asked, decided).undecided()
    weights, gain, error = weigh_verifier(verdicts, folds)
    preparation.facts["verifier's weights"] = [round(weight, 4) for weight in weights]
    if weights == NEUTRAL:
        unasked = _may_be_left_out(preparation)
        preparation.notes.append(
            f"the verifier brings nothing on {len(folds)} pool sentences ({gain:+.3f} in log-probability a sentence, "
            f"standard error {error:.3f}): {'it is not asked' if unasked else 'its verdicts change no score'}"
        )
        if unasked:
            team.verifier = None
            return None
    team.verifier_weights = weights
    return verified_scores(verdicts, weights, [len(own) for own in asked.candidates])


def _weigh_written(
    preparation: Preparation, team: Team, asked: Asked, decided: Decided, folds: Sequence[int]
) -> list[np.ndarray] | None:
    """The scores of what written verdicts let pass, -inf for the others; None where that brings nothing, as above."""
    passed = passed_scores(ask_verifier(team, asked, decided), [len(own) for own in asked.candidates])
    lead, error = replace(decided, verified=passed).lead(team.threshold, decided, team.threshold)
    preparation.facts["written verdicts"] = {
        "gain in F1": round(lead, 4),
        "standard error": round(error, 4),
    }
    if lead > error or not _may_be_left_out(preparation):
        return passed
    preparation.notes.append(
        f"the verifier brings nothing on {len(folds)} pool sentences ({lead:+.3f} in F1, standard error {error:.3f}): "
        "it is not asked"
    )
    team.verifier = None
    return None


def _may_be_left_out(preparation: Preparation) -> bool:
    """Whether a verifier that brings nothing need not be asked."""
    return preparation.config.voters == "auto" and preparation.config.verify.member is None


def _passing(preparation: Preparation, team: Team, examined: Examined) -> tuple[str, ...]:
    """The members that help on the audition's sentences. No gain on the first third of them ends it early."""
    size = preparation.config.stack.audition
    gain = error = 0.0
    trial: list[int] = []
    for number in sorted({max(4, size // 3), size}):
        trial = team.pool.sample(number, team.config.seed)
        preparation.progress(f"trying the prompted members on {len(trial)} pool sentences")
        asked, folds = ask(preparation, team, examined, trial, listing=False), [team.pool.folds[s] for s in trial]
        weighed = weigh_members(team, asked, folds)
        gain, error = weighed.gain, weighed.error
        if gain <= _LEAST_GAIN:
            break
    preparation.facts["audition of the members"] = {
        "sentences": len(trial), "gain in log-probability per sentence": round(gain, 4),
        "standard error": round(error, 4),
    }  # fmt: skip
    if gain > max(_STANDARD_ERRORS * error, _LEAST_GAIN):
        return _helpful(preparation, team, asked, folds)
    preparation.notes.append(
        f"prompted members bring nothing on {len(trial)} pool sentences ({gain:+.3f} in log-probability a "
        f"sentence, standard error {error:.3f}) and are not asked; --voters all asks them"
    )
    return ()


def _helpful(preparation: Preparation, team: Team, asked: Asked, folds: Sequence[int]) -> tuple[str, ...]:
    """The members less those without whose votes the others do as well, the least helpful left out first."""
    names = [member.name for member in team.asked_members]
    while len(names) > 1:
        gains = gains_of(team, names, asked, folds)
        least = min(names, key=gains.__getitem__)
        if gains[least] > _LEAST_GAIN:
            break
        names.remove(least)
        preparation.notes.append(
            f"member {least} adds {gains[least]:+.3f} in log-probability a sentence to the others on {len(folds)} pool "
            "sentences and is not asked; --voters all asks it"
        )
    return tuple(names)


class Asked:
    """What everybody says about the candidates of some pool sentences, the members' own proposals included."""

    def __init__(
        self, sentences: Sequence[Sentence], retrieved: Retrieved, candidates: Sequence[Sequence[Candidate]],
        votes: dict[str, list[FloatArray]], evidence: Sequence[FloatArray], truth: Sequence[np.ndarray],
    ) -> None:  # fmt: skip
        self.sentences, self.retrieved, self.candidates = sentences, retrieved, candidates
        self.votes, self.evidence, self.truth = votes, evidence, truth

    def rows(
        self, voters: Sequence[str], chosen: Sequence[int] | None = None
    ) -> tuple[list[FloatArray], FloatArray, np.ndarray]:
        """Votes, evidence and truth, one row a candidate, of all or some of the sentences."""
        own = range(len(self.sentences)) if chosen is None else chosen
        votes = [np.concatenate([self.votes[name][i] for i in own]) for name in voters]
        return votes, np.concatenate([self.evidence[i] for i in own]), np.concatenate([self.truth[i] for i in own])

    def averaged(self, names: Sequence[str]) -> Asked:
        """The same with voters that say of every candidate what they say on average; abstentions stay."""
        votes = dict(self.votes)
        for name in names:
            rows = np.concatenate(self.votes[name])
            spoken = rows[~np.isnan(rows).any(axis=1)]
            mean = spoken.mean(axis=0, dtype=np.float64).astype(np.float32) if len(spoken) else np.float32(np.nan)
            votes[name] = [np.where(np.isnan(own), own, mean) for own in self.votes[name]]
        return Asked(self.sentences, self.retrieved, self.candidates, votes, self.evidence, self.truth)


def ask(
    preparation: Preparation, team: Team, examined: Examined, chosen: Sequence[int], *, listing: bool = True
) -> Asked:
    """Members list and vote on pool sentences, shown demonstrations of other folds only. Replies are cached.

    listing: False lets them vote only.
    """
    pool, config = team.pool, team.config
    sentences = pool.as_sentences(chosen)
    folds = [pool.folds[s] for s in chosen]
    members = team.asked_members
    assert team.retriever is not None
    spans, _ = input_spans(sentences, team, folds)
    shown = Retrieved(tuple(team.retriever.find(sentences, spans, folds)), (Usage(),) * len(sentences))
    key = content_key(
        "audition", fitted_key(preparation, team), [(m.name, m.engine.source, m.variant) for m in members],
        list(team.base.voters) if team.base else [], list(chosen), listing,
        [[tuple(c.span) for c in examined.candidates[s]] for s in chosen],
    )  # fmt: skip
    stored = preparation.cache.get(key)
    lists: dict[str, list[list[Span]]] = {}
    if stored is None:
        listing = listing and config.extract.members
        talks = [m.extraction(sentences, shown.demonstrations) for m in members] if listing else []
        lists = {member.name: [[] for _ in sentences] for member in members}
        for member, replies in zip(members, together(talks), strict=bool(talks)):
            lists[member.name] = [list(reply.spans) for reply in replies]
    else:
        lists = {m.name: _unflatten(stored[f"{m.name} spans"], len(sentences)) for m in members}
    candidates = [
        _with_lists(examined.candidates[s], {name: own[i] for name, own in lists.items()}) for i, s in enumerate(chosen)
    ]
    names = [member.name for member in members]
    evidence = [evidence_of(s, own, names) for s, own in zip(sentences, candidates, strict=True)]
    votes = _cheap_rows(team, examined, chosen, sentences, candidates, folds)
    extracted = Extracted(tuple(candidates), (Usage(),) * len(sentences), (None,) * len(sentences))
    if stored is None:
        worth = [worth_asking(i, own, votes, evidence[i], team) for i, own in enumerate(candidates)]
        prompted, _, _ = member_votes(sentences, shown, extracted, worth, team)
        arrays = {f"{name} votes": np.concatenate(rows) for name, rows in prompted.items()}
        preparation.cache.put(key, arrays | {f"{name} spans": _flatten(own) for name, own in lists.items()})
    else:
        borders = np.cumsum([0, *(len(own) for own in candidates)])
        prompted = {name: [stored[f"{name} votes"][a:b] for a, b in pairwise(borders)] for name in names}
    truth = [pool.truth(s, [c.span for c in own]) for s, own in zip(chosen, candidates, strict=True)]
    return Asked(sentences, shown, candidates, votes | prompted, evidence, truth)


def _flatten(lists: Sequence[Sequence[Span]]) -> np.ndarray:
    """Spans of several sentences -> (n, 3) i64: sentence, start, end."""
    return np.array([(i, *span) for i, own in enumerate(lists) for span in own], dtype=np.int64).reshape(-1, 3)


def _unflatten(rows: np.ndarray, n_sentences: int) -> list[list[Span]]:
    lists: list[list[Span]] = [[] for _ in range(n_sentences)]
    for i, start, end in rows:
        lists[int(i)].append(Span(int(start), int(end)))
    return lists


def _with_lists(candidates: Sequence[Candidate], lists: dict[str, list[Span]]) -> tuple[Candidate, ...]:
    proposals: list[tuple[str, Sequence[Span]]] = list(lists.items())
    for candidate in candidates:
        proposals += [(name, [candidate.span]) for name in candidate.proposed_by]
    return unite(proposals)


def _cheap_rows(
    team: Team, examined: Examined, chosen: Sequence[int], sentences: Sequence[Sentence],
    candidates: Sequence[Sequence[Candidate]], folds: Sequence[int],
) -> dict[str, list[FloatArray]]:  # fmt: skip
    """The cheap voters' out-of-fold votes, also on spans that only members list."""
    votes: dict[str, list[FloatArray]] = {}
    spans = [[c.span for c in own] for own in candidates]
    probers = {voter.name: voter for voter in team.probers}
    for name in team.base.voters if team.base is not None else ():
        if team.retrieval is not None and name == team.retrieval.name:
            votes[name] = team.retrieval.vote(sentences, spans, exclude_folds=folds)
        elif name in probers:
            votes[name] = probers[name].vote(sentences, spans, exclude_folds=folds)
        else:
            votes[name] = [np.exp(examined.tables[name][s].rows(own)) for s, own in zip(chosen, spans, strict=True)]
    return votes
