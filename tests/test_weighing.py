"""How far members' weights may move and whether verdicts count, chosen on a sample of the pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from el4ner.audition import Asked
from el4ner.config import make_config
from el4ner.pool import Pool
from el4ner.records import Label, Sentence
from el4ner.stages.classify import EVIDENCE
from el4ner.stages.retrieve import Retrieved
from el4ner.stages.team import Team
from el4ner.voters.stacking import fit_stack, start_stack
from el4ner.weighing import NEUTRAL, PENALTIES, Verdicts, verified_scores, weigh_members, weigh_verifier

N_SENTENCES, N_CANDIDATES = 40, 6


class _Member:
    """What a team knows a member by."""

    def __init__(self, name: str) -> None:
        self.name = name


def _votes(truth: list[np.ndarray], strength: float, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    found = []
    for own in truth:
        z = rng.normal(size=(len(own), 3))
        z[np.arange(len(own)), own] += strength
        p = np.exp(z)
        found.append((p / p.sum(axis=1, keepdims=True)).astype(np.float32))
    return found


def _case(strength: float) -> tuple[Team, Asked, list[int]]:
    """A cheap voter fitted on other sentences, and a member of some strength beside it."""
    rng = np.random.default_rng(5)
    truth = [rng.choice(3, size=N_CANDIDATES, p=[0.2, 0.1, 0.7]) for _ in range(N_SENTENCES)]
    others = [rng.choice(3, size=N_CANDIDATES, p=[0.2, 0.1, 0.7]) for _ in range(10 * N_SENTENCES)]
    none = np.zeros((N_SENTENCES * N_CANDIDATES * 10, len(EVIDENCE)), np.float32)
    base = fit_stack(
        start_stack(["retrieval"], 3, len(EVIDENCE)), [np.concatenate(_votes(others, 1.5, 1))], none,
        np.concatenate(others),
    )  # fmt: skip
    members: Any = (_Member("member"),)
    pool = Pool((), (Label("person"), Label("place")))
    team = Team(make_config({}), pool, members=members, asked=("retrieval", "member"), base=base)
    votes = {"retrieval": _votes(truth, 1.5, 2), "member": _votes(truth, strength, 3)}
    evidence = [np.zeros((N_CANDIDATES, len(EVIDENCE)), np.float32) for _ in truth]
    sentences = [Sentence(str(i), "any") for i in range(N_SENTENCES)]
    return team, Asked(sentences, Retrieved((), ()), (), votes, evidence, truth), [i % 5 for i in range(N_SENTENCES)]


def test_a_good_member_moves_and_the_cheap_voter_stays() -> None:
    team, asked, folds = _case(strength=3.0)
    weighed = weigh_members(team, asked, folds)
    assert weighed.gain > 2 * weighed.error > 0
    assert weighed.penalty < PENALTIES[-1]
    assert weighed.stack.weights[1].min() > 0.1
    assert team.base is not None
    assert (weighed.stack.weights[0] == team.base.weights[0]).all()
    assert [own.shape for own in weighed.shares] == [(N_CANDIDATES, 3)] * N_SENTENCES


def test_noise_is_left_where_it_starts() -> None:
    team, asked, folds = _case(strength=0.0)
    weighed = weigh_members(team, asked, folds)
    assert weighed.gain < weighed.error
    assert np.abs(weighed.stack.weights[1]).max() < 0.05


def test_a_member_that_says_the_same_of_everything_gains_nothing() -> None:
    team, asked, folds = _case(strength=0.0)
    asked.votes["member"] = [np.tile(np.float32([0.2, 0.3, 0.5]), (N_CANDIDATES, 1)) for _ in asked.truth]
    assert weigh_members(team, asked, folds).gain == pytest.approx(0.0, abs=1e-4)


def test_averaged_votes_keep_abstentions_and_the_other_voters() -> None:
    _, asked, _ = _case(strength=1.0)
    asked.votes["member"][0][2] = np.nan
    averaged = asked.averaged(["member"])
    assert np.isnan(averaged.votes["member"][0][2]).all()
    rows = np.concatenate(averaged.votes["member"])
    rows = rows[~np.isnan(rows).any(axis=1)]
    assert len(rows) == N_SENTENCES * N_CANDIDATES - 1
    assert (rows == rows[0]).all()
    assert rows[0].sum() == pytest.approx(1.0, abs=1e-5)
    assert averaged.votes["retrieval"] is asked.votes["retrieval"]


def _verdicts(informative: bool) -> tuple[Verdicts, list[int]]:
    rng = np.random.default_rng(0)
    right = [rng.random(4) < 0.6 for _ in range(50)]
    scores = [np.clip(0.55 + 0.1 * rng.normal(size=4), 0.05, 0.95) for _ in right]
    said = [np.where(own, 0.85, 0.15) if informative else rng.uniform(0.2, 0.8, size=4) for own in right]
    return Verdicts([np.array([0, 2, 3, 5])] * 50, scores, said, right), [i % 5 for i in range(50)]


def test_verdicts_count_if_they_tell_right_from_wrong() -> None:
    verdicts, folds = _verdicts(informative=True)
    weights, gain, error = weigh_verifier(verdicts, folds)
    assert gain > 2 * error
    assert weights[1] > 0.5
    scores = verified_scores(verdicts, weights, [7] * 50)
    assert np.isneginf(scores[0][[1, 4, 6]]).all()
    kept = np.concatenate([own[[0, 2, 3, 5]] for own in scores])
    right = np.concatenate(verdicts.right)
    assert kept[right].min() > kept[~right].max()


def test_verdicts_at_random_change_no_score() -> None:
    verdicts, folds = _verdicts(informative=False)
    weights, gain, error = weigh_verifier(verdicts, folds)
    assert gain <= error
    assert weights == NEUTRAL
    scores = verified_scores(verdicts, weights, [7] * 50)
    np.testing.assert_allclose(scores[3][[0, 2, 3, 5]], verdicts.scores[3], rtol=1e-6)
