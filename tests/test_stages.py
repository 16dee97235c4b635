"""The four stages on a small pool, with scripted members and a letter-counting encoder: no model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_members import POOL, LetterEncoder, demonstration, member, settings, surface_of

from el4ner.config import make_config
from el4ner.engines.base import Choose
from el4ner.engines.scripted import ScriptedEngine
from el4ner.pool import Pool
from el4ner.preparation import Preparation
from el4ner.records import Candidate, Entity, Sentence, Span, Usage
from el4ner.stages import classify, extract, retrieve, verify
from el4ner.stages.classify import EVIDENCE, Scored, combine, evidence_of, worth_asking
from el4ner.stages.extract import pursued, unite
from el4ner.stages.retrieve import input_spans
from el4ner.stages.team import Team
from el4ner.stages.verify import _judge
from el4ner.voters.reading import SpanTable
from el4ner.voters.stacking import Stack


@pytest.fixture
def make_team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Team]:
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path))

    def make(engines: dict[str, Any], pool: Pool = POOL, **over: Any) -> Team:
        config = make_config(settings(list(engines), **over))
        return Preparation(config, engines=engines, encoder=LetterEncoder(), pool=pool).team()

    return make


def run(team: Team, *texts: str) -> tuple[list[tuple[Entity, ...]], list[Usage]]:
    sentences = [Sentence(str(i), text) for i, text in enumerate(texts)]
    retrieved = retrieve(sentences, team)
    extracted = extract(sentences, retrieved, team)
    verified = verify(sentences, retrieved, classify(sentences, retrieved, extracted, team), team)
    return list(verified.entities), list(verified.usage)


def found(team: Team, text: str) -> dict[str, str]:
    ((entities, *_), _) = run(team, text)
    assert all(text[e.start : e.end] == e.text for e in entities)
    return {e.text: e.label for e in entities}


TEXT = "Dora met Bob in Lima."
GOLD = {"Dora": "person", "Bob": "person", "Lima": "place"}


def test_the_four_stages(make_team: Callable[..., Team]) -> None:
    first, second = member(["Dora", "Bob"], GOLD), member(["Bob", "Lima"], GOLD, sure=0.6)
    team = make_team({"a": first, "b": second})
    sentence = Sentence("1", TEXT)

    retrieved = retrieve([sentence], team)
    assert len(retrieved.demonstrations[0]) == 3  # the sentence without entities is no demonstration
    assert retrieved.demonstrations[0][0].text == "Bob left Oslo."
    assert not first.requests  # retrieval spans come from the proposers and cost nothing

    extracted = extract([sentence], retrieved, team)
    assert extracted.candidates[0] == (
        Candidate(Span(0, 4), ("a",)),
        Candidate(Span(9, 12), ("a", "b")),
        Candidate(Span(16, 20), ("b",)),
    )
    assert "Bob left Oslo." in "".join(first.requests[0].prompt)  # type: ignore[union-attr]

    classified = classify([sentence], retrieved, extracted, team)
    assert [(s.label, round(s.score, 3)) for s in classified.kept[0]] == [
        ("person", 0.75), ("person", 0.75), ("place", 0.75),
    ]  # fmt: skip
    assert set(classified.kept[0][0].votes) == {"a", "b"}
    assert list(classified.kept[0][0].votes["a"]) == ["person", "place", ""]
    assert classified.kept[0][0].votes["a"]["person"] == pytest.approx(0.9)

    verified = verify([sentence], retrieved, classified, team)
    (entities,), (usage,) = verified.entities, verified.usage
    assert [(e.text, e.proposed_by) for e in entities] == [("Dora", ("a",)), ("Bob", ("a", "b")), ("Lima", ("b",))]
    assert [e.verified for e in entities] == [pytest.approx(0.8)] * 3
    assert usage.prompt_tokens > classified.usage[0].prompt_tokens > extracted.usage[0].prompt_tokens > 0
    assert usage.generated_tokens > 0


def test_everybody_who_is_allowed_proposes(make_team: Callable[..., Team]) -> None:
    everyone = {"noun_phrases": True, "pool_strings": True}
    team = make_team({"a": member(["Bob"], GOLD)}, extract=everyone)
    sentence = Sentence("1", TEXT)
    (candidates,) = extract([sentence], retrieve([sentence], team), team).candidates
    by = {TEXT[c.span.start : c.span.end]: c.proposed_by for c in candidates}
    assert by["Bob"] == ("a", "noun-phrases", "pool-strings")
    assert by["Lima"] == ("noun-phrases",)
    silent = make_team({"a": member(["Bob"], GOLD)}, extract={**everyone, "members": False})
    (candidates,) = extract([sentence], retrieve([sentence], silent), silent).candidates
    assert all("a" not in c.proposed_by for c in candidates)
    assert found(silent, TEXT) == GOLD  # it still votes


def test_evidence_stands_in_the_order_that_is_named() -> None:
    assert EVIDENCE == ("noun phrase", "pool string", "words beyond the first", "share of members that listed it")
    sentence = Sentence("1", TEXT)
    candidates = [
        Candidate(Span(0, 4), ("noun-phrases",)),
        Candidate(Span(9, 12), ("a", "pool-strings")),
        Candidate(Span(9, 20), ("a", "b", "reading")),
    ]
    assert evidence_of(sentence, candidates, ["a", "b"]).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0.5], [0, 0, 2, 1]]
    assert evidence_of(sentence, candidates, []).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0]]


def test_unite_sorts_spans_and_proposers() -> None:
    united = unite([("b", [Span(3, 5), Span(0, 2)]), ("a", [Span(3, 5)]), ("a", [Span(3, 5)])])
    assert united == (Candidate(Span(0, 2), ("b",)), Candidate(Span(3, 5), ("a", "b")))


def test_phrases_and_strings_are_dropped_where_every_reading_voter_rules_them_out() -> None:
    def table(*entity: float) -> SpanTable:
        p = np.array(entity, np.float32)[:, None]
        return SpanTable((Span(0, 4), Span(5, 8)), np.log(np.stack([p, 1 - p], axis=2)))

    team = Team(make_config({}), POOL)
    proposals = [("noun-phrases", [Span(0, 4), Span(5, 8)]), ("pool-strings", [Span(5, 8)]), ("a", [Span(0, 8)])]
    # 0.01 is too little for a phrase (0.02) and enough for a string (0.005)
    kept = pursued(proposals, [table(0.5, 0.001), table(0.001, 0.01)], team)
    assert kept == [("noun-phrases", [Span(0, 4)]), ("pool-strings", [Span(5, 8)]), ("a", [Span(0, 8)])]
    kept = pursued(proposals, [table(0.001, 0.001)], team)
    assert kept == [("noun-phrases", []), ("pool-strings", []), ("a", [Span(0, 8)])]
    assert pursued(proposals, [], team) == proposals
    # what no reading voter read: known strings are pursued, phrases are not
    cut = replace(table(0.5, 0.5), truncated_at=6)
    assert np.isnan(cut.rows([Span(5, 8)])).all()
    kept = pursued(proposals, [cut], team)
    assert kept == [("noun-phrases", [Span(0, 4)]), ("pool-strings", [Span(5, 8)]), ("a", [Span(0, 8)])]
    kept = pursued(proposals, [cut, table(0.001, 0.001)], team)
    assert kept == [("noun-phrases", [Span(0, 4)]), ("pool-strings", []), ("a", [Span(0, 8)])]


def test_where_nobody_votes_a_stack_says_none() -> None:
    stack = Stack(("a", "b"), np.ones((2, 2)), np.array([9.0, 0.0]), np.zeros(len(EVIDENCE)))
    team = Team(make_config({}), POOL, asked=("a", "b"), stack=stack)
    votes = np.full((2, 2, 2), np.nan, np.float32)
    votes[1, 1] = (0.5, 0.5)
    found = combine(list(votes), np.zeros((2, len(EVIDENCE)), np.float32), team)
    assert found[0].tolist() == [0.0, 1.0]
    assert found[1, 0] > 0.99  # as the stack says where somebody votes


def test_a_rejected_entity_is_dropped(make_team: Callable[..., Team]) -> None:
    engines = {"a": member(["Dora", "Lima"], GOLD, rejects=["Dora"])}
    assert found(make_team(engines), TEXT) == {"Lima": "place"}
    assert found(make_team(engines, verify={"enabled": False}), TEXT) == {"Dora": "person", "Lima": "place"}


def test_a_fitted_verdict_enters_the_score_and_the_threshold_decides(make_team: Callable[..., Team]) -> None:
    team = make_team({"a": member(["Dora", "Lima"], GOLD, rejects=["Dora"])})
    team.verifier_weights, team.threshold = (1.0, 2.0, -0.5), 0.5
    ((entity,),), _ = run(team, TEXT)
    assert (entity.text, entity.verified) == ("Lima", pytest.approx(0.8))
    # the score's log-odds of 9 to 1, twice the verdict's of 4 to 1
    assert entity.score == pytest.approx(1 / (1 + np.exp(-(np.log(9) + 2 * np.log(4) - 0.5))), abs=1e-5)
    team.threshold = 0.05
    assert {e.text: round(e.score, 3) for e in run(team, TEXT)[0][0]}["Dora"] == 0.063


def test_a_verdict_that_cannot_be_used_weighs_as_even_odds(make_team: Callable[..., Team]) -> None:
    """As where the weights were fitted."""
    team = make_team({"a": member(["Dora"], GOLD)})
    scored = Scored(Candidate(Span(0, 4), ("a",)), "person", 0.9, {})
    team.verifier_weights, team.threshold = (1.0, 2.0, -0.5), 0.5
    kept = _judge(Sentence("1", TEXT), scored, float("nan"), team)
    assert kept is not None
    assert kept.verified is None
    assert kept.score == pytest.approx(1 / (1 + np.exp(-(np.log(9) - 0.5))), abs=1e-5)
    team.threshold = 0.95
    assert _judge(Sentence("1", TEXT), scored, float("nan"), team) is None
    team.verifier_weights = None
    kept = _judge(Sentence("1", TEXT), scored, float("nan"), team)
    assert kept is not None
    assert (kept.score, kept.verified) == (0.9, None)


def test_the_named_member_verifies(make_team: Callable[..., Team]) -> None:
    engines = {"a": member(["Dora"], GOLD, rejects=["Dora"]), "b": member(["Dora"], GOLD)}
    assert found(make_team(engines), TEXT) == {}
    assert found(make_team(engines, verify={"member": "b"}), TEXT) == {"Dora": "person"}


def test_a_majority_decides_and_a_tie_goes_to_the_earlier_member(make_team: Callable[..., Team]) -> None:
    person, place, nothing = member(["Bob"], {"Bob": "person"}), member(["Bob"], {"Bob": "place"}), member(["Bob"])
    majority = {"combine": "majority"}
    assert found(make_team({"a": person, "b": place}, classify=majority), TEXT) == {"Bob": "person"}
    assert found(make_team({"a": place, "b": person}, classify=majority), TEXT) == {"Bob": "place"}
    assert found(make_team({"a": person, "b": place, "c": place}, classify=majority), TEXT) == {"Bob": "place"}
    assert found(make_team({"a": place, "b": person, "c": nothing}, classify=majority), TEXT) == {"Bob": "place"}
    assert found(make_team({"a": nothing, "b": person}, classify=majority), TEXT) == {}
    assert found(make_team({"a": nothing, "b": person, "c": person}, classify=majority), TEXT) == {"Bob": "person"}


def test_who_abstains_is_not_counted() -> None:
    config = make_config(settings(["a", "b"], classify={"combine": "majority"}))
    nan = np.full((1, 3), np.nan, np.float32)
    vote = np.array([[0.1, 0.7, 0.2]], np.float32)
    evidence = np.zeros((1, 4), np.float32)
    majority, equal = Team(config, POOL), Team(make_config(settings(["a", "b"])), POOL)
    assert combine([nan, vote], evidence, majority).tolist() == [[0, 1, 0]]
    np.testing.assert_allclose(combine([nan, vote], evidence, equal), vote)
    for team in (majority, equal):
        assert combine([nan, nan], evidence, team).tolist() == [[0, 0, 1]]


def test_overlaps_are_resolved_unless_nesting_is_asked_for(make_team: Callable[..., Team]) -> None:
    engines = {"a": member(["Bob in Lima", "Lima"], {"Bob in Lima": "person", "Lima": "place"})}
    assert found(make_team(engines, overlap="nested"), TEXT) == {"Bob in Lima": "person", "Lima": "place"}
    assert len(found(make_team(engines), TEXT)) == 1


@pytest.mark.parametrize("over", [{}, {"min_score": 0.01}])
def test_parts_of_a_name_do_not_win_where_nothing_is_fitted(make_team: Callable[..., Team], over: Any) -> None:
    sure = {"Bob in Lima": 0.95, "Bob": 0.4, "Lima": 0.4}  # the parts are likelier than "none", which has 0.3

    def choose(request: Choose) -> list[float]:
        p = sure[surface_of(request)]
        shares = {"person": p, "place": (1 - p) / 2, "none of these": (1 - p) / 2}
        return [float(np.log(shares[choice.strip()])) for choice in request.choices]

    engine = ScriptedEngine(generate=lambda _: "Bob in Lima; Bob; Lima", choose=choose)
    assert found(make_team({"a": engine}, verify={"enabled": False}, **over), TEXT) == {"Bob in Lima": "person"}


def test_min_score_cuts(make_team: Callable[..., Team]) -> None:
    engines = {"a": member(["Bob"], GOLD, sure=0.6)}
    assert found(make_team(engines, min_score=0.61), TEXT) == {}
    assert found(make_team(engines, min_score=0.59), TEXT) == {"Bob": "person"}


def test_a_pool_sentence_is_never_its_own_demonstration(make_team: Callable[..., Team]) -> None:
    team = make_team({"a": member()})
    sentence = Sentence("1", "Ada saw Rome.")
    (shown,) = retrieve([sentence], team).demonstrations
    assert "Ada saw Rome." not in [d.text for d in shown]
    assert team.retriever is not None
    fold = POOL.folds[next(i for i, d in enumerate(POOL.sentences) if d.text == "Bob left Oslo.")]
    (left,) = team.retriever.find([Sentence("1", TEXT)], [[Span(9, 12)]], [fold])
    assert "Bob left Oslo." not in [d.text for d in left]


def test_a_pool_sentence_is_not_compared_by_strings_that_only_its_fold_knows(make_team: Callable[..., Team]) -> None:
    """As input from outside, so that what is fitted on it is no better shown than a text to come."""
    odd = demonstration("it was xyzz0 and so on", {"was xyzz0 and": "person"})
    pool = Pool((*POOL.sentences, odd), POOL.labels)
    team = make_team({"a": member()}, pool=pool)
    where = next(i for i, d in enumerate(pool.sentences) if d.text == odd.text)
    sentence = Sentence("1", odd.text)
    ((own,), _), ((left,), _) = input_spans([sentence], team), input_spans([sentence], team, [pool.folds[where]])
    assert Span(3, 16) in own
    assert Span(3, 16) not in left


def test_candidates_of_an_index_are_the_same_demonstrations(
    make_team: Callable[..., Team], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    stage = importlib.import_module("el4ner.stages.retrieve")
    sentences = [Sentence("1", "Ada saw Rome."), Sentence("2", "Bob came to Oslo.")]
    exact = retrieve(sentences, make_team({"a": member()})).demonstrations
    monkeypatch.setattr(stage, "LARGE", 1)
    team = make_team({"a": member()}, retrieve={"approximate": True})
    assert team.retriever is not None
    assert team.retriever._index is not None
    assert retrieve(sentences, team).demonstrations == exact
    monkeypatch.setattr(stage, "LARGE", 10**6)
    assert make_team({"a": member()}, retrieve={"approximate": True}).retriever._index is None  # type: ignore[union-attr]


def test_demonstrations_without_a_weighty_span_are_the_same_for_all(make_team: Callable[..., Team]) -> None:
    team = make_team({"a": member()}, retrieve={"k": 2})
    one, other = retrieve([Sentence("1", "and so on"), Sentence("2", "but why")], team).demonstrations
    assert one == other
    assert len(one) == 2
    none = make_team({"a": member()}, retrieve={"k": 0})
    assert retrieve([Sentence("1", TEXT)], none).demonstrations == ((),)


def test_members_can_give_the_retrieval_spans(make_team: Callable[..., Team]) -> None:
    engine = member(["Lima"], GOLD)
    team = make_team({"a": engine}, retrieve={"spans": "members"})
    retrieved = retrieve([Sentence("1", TEXT)], team)
    assert len(engine.requests) == 1
    assert retrieved.usage[0].prompt_tokens > 0


def test_only_what_is_worth_it_is_asked() -> None:
    from el4ner.voters.stacking import start_stack

    team = Team(make_config({}), POOL, base=start_stack(["reading"], 3, 4))
    candidates = (Candidate(Span(0, 4), ("x",)),) * 3
    votes = {"reading": [np.array([[0.3, 0.3, 0.4], [0.01, 0.01, 0.98], [0.01, 0.01, 0.98]], np.float32)]}
    evidence = np.zeros((3, 4), np.float32)
    evidence[2, 3] = 0.5  # a member listed it
    assert worth_asking(0, candidates, votes, evidence, team) == [True, False, True]
