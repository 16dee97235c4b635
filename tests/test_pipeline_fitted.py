"""The pipeline where something is fitted on the pool: who is asked, thresholds, what is kept for the next start."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_members import (
    FIT,
    GOLD,
    LABELS,
    LetterEncoder,
    demonstration,
    large_pool,
    member,
    oracle,
    settings,
    surfaces,
)

from el4ner.audition import _cheap_rows
from el4ner.choosing import choose
from el4ner.config import make_config
from el4ner.crossfit import Examined, cross_fit
from el4ner.engines.base import Generate, TokenStates
from el4ner.engines.scripted import ScriptedEngine
from el4ner.errors import ConfigError
from el4ner.examining import examine, narrowed
from el4ner.operating import THRESHOLDS
from el4ner.pipeline import El4ner
from el4ner.pool import Pool, load_pool
from el4ner.preparation import Preparation
from el4ner.records import Candidate, Demonstration, LabelledSpan, Span
from el4ner.stages.team import Team
from el4ner.voters.reading import SpanTable
from el4ner.voters.stacking import start_stack


def test_a_member_that_helps_on_the_pool_is_asked(make: Callable[..., El4ner]) -> None:
    model = make({"a": oracle(useful=True)}, large_pool(), **FIT)
    (prediction,) = model.predict(["Dorx met Drox and zzzz 77"])
    assert surfaces(prediction) == {"Dorx": "person", "Drox": "place"}
    report = model.report()
    assert report["asked"] == ["retrieval", "a"]
    assert report["fitted"]["calibrated"] is True
    assert report["stack"]["a"]["person"] > 0.1
    assert "a: hidden states cannot be read there, so it has no reading, tagging or probing voter" in report["notes"]
    assert all(e.verified is None for e in prediction.entities)  # it says the same of everything: not asked
    assert any("the verifier brings nothing" in note for note in report["notes"])


def test_a_verifier_that_is_named_is_asked_though_it_brings_nothing(make: Callable[..., El4ner]) -> None:
    model = make({"a": oracle(useful=True)}, large_pool(), **FIT, verify={"member": "a"})
    (prediction,) = model.predict(["Dorx met Drox and zzzz 77"])
    assert all(e.verified == pytest.approx(0.5) for e in prediction.entities)
    assert any("its verdicts change no score" in note for note in model.report()["notes"])
    plain = make({"a": oracle(useful=True)}, large_pool(), **FIT)
    assert [e.score for e in plain.predict(["Dorx met Drox and zzzz 77"])[0].entities] == pytest.approx(
        [e.score for e in prediction.entities], abs=1e-6
    )


def test_members_alone_are_stacked_and_cut_where_f1_was_best_out_of_fold(make: Callable[..., El4ner]) -> None:
    model = make({"a": oracle(useful=True)}, large_pool(), **{**FIT, "voters": ["a"]})
    (prediction,) = model.predict(["Dorx met Drox and zzzz 77"])
    assert surfaces(prediction) == {"Dorx": "person", "Drox": "place"}
    report = model.report()
    assert report["asked"] == ["a"]
    assert report["threshold"] == report["fitted"]["threshold"]
    assert report["threshold"] in THRESHOLDS


def test_a_member_that_brings_nothing_is_not_asked_unless_all_are(make: Callable[..., El4ner]) -> None:
    useless = oracle(useful=False)
    model = make({"a": useless}, large_pool(), **FIT)
    model.prepare()
    assert model.report()["asked"] == ["retrieval"]
    # the first third of the twenty shows no gain, and ends the audition
    assert any("prompted members bring nothing on 6 pool sentences" in note for note in model.report()["notes"])
    asked_before = len(useless.requests)
    (prediction,) = model.predict(["Dora met Droa and zzzz 77"])
    assert len(useless.requests) == asked_before
    assert prediction.usage.prompt_tokens == 0
    everyone = make({"a": useless}, large_pool(), **{**FIT, "voters": "all"})
    everyone.prepare()
    assert everyone.report()["asked"] == ["retrieval", "a"]


def test_of_several_members_those_that_add_nothing_are_not_asked(make: Callable[..., El4ner]) -> None:
    useless = oracle(useful=False)
    model = make({"a": oracle(useful=True), "b": useless}, large_pool(), **FIT)
    model.prepare()
    assert model.report()["asked"] == ["retrieval", "a"]
    assert any(re.match(r"member b adds [+-]0\.0\d\d in log-probability", note) for note in model.report()["notes"])
    before = len(useless.requests)
    model.predict(["Dorx met Drox and zzzz 77"])
    assert len(useless.requests) == before
    twins = make({"a": oracle(useful=True), "b": oracle(useful=True)}, large_pool(), **FIT)
    twins.prepare()
    assert len(twins.report()["asked"]) == 2  # what one says the other need not say again
    everyone = make({"a": oracle(useful=True), "b": oracle(useful=False)}, large_pool(), **{**FIT, "voters": "all"})
    everyone.prepare()
    assert everyone.report()["asked"] == ["retrieval", "a", "b"]


def test_members_that_are_not_asked_propose_no_spans_to_retrieve_by(make: Callable[..., El4ner]) -> None:
    over = {**FIT, "retrieve": {"spans": "members"}}
    text = "Dorx met Drox and zzzz 77"
    useless = oracle(useful=False)
    first = make({"a": oracle(useful=True), "b": useless}, large_pool(), **over)
    first.prepare()
    before = len(useless.requests)
    (found,) = first.predict([text])
    assert len(useless.requests) == before
    (cached,) = make({"a": oracle(useful=True), "b": oracle(useful=False)}, large_pool(), **over).predict([text])
    assert cached == found


@pytest.mark.parametrize("wrong", [True, False])
def test_written_verdicts_are_weighed_on_the_pool(make: Callable[..., El4ner], wrong: bool) -> None:
    """Rejecting what is right, the verifier is not asked; rejecting what is wrong, it is, and it counts in `points`."""
    asked: list[str] = []

    class Writes(ScriptedEngine):
        def generate(self, requests: Sequence[Generate]) -> list[Any]:
            verdicts = [r for r in requests if r.grammar is None]
            asked.extend(str(r.prompt[-1]) for r in verdicts)
            return super().generate(requests)

    known = oracle(useful=True)
    inner: Any = known._generate

    def generate(request: Generate) -> str:
        if request.grammar is not None:
            return str(inner(request))
        return "false" if wrong else "true"

    engine = Writes(generate=generate, choose=known._choose)
    model = make({"a": engine}, large_pool(), **FIT, verify={"by": "generation"})
    model.prepare()
    assert asked
    asked.clear()
    (prediction,) = model.predict(["Dorx met Drox and zzzz 77"])
    assert surfaces(prediction) == {"Dorx": "person", "Drox": "place"}
    assert not asked  # true of everything, or false: nothing is gained
    assert any("the verifier brings nothing on 25 pool sentences" in note for note in model.report()["notes"])
    named = make({"a": engine}, large_pool(), **FIT, verify={"by": "generation", "member": "a"})
    named.prepare()
    assert named._preparation is not None
    points = named._preparation.points
    assert points is not None
    assert (len(points) == 0) is wrong


def test_the_seed_draws_the_sentences_that_members_are_tried_on(make: Callable[..., El4ner]) -> None:
    def tried(seed: int) -> set[str]:
        useless = oracle(useful=False)
        make({"a": useless}, large_pool(), **{**FIT, "stack": {"audition": 9, "sample": 9}}, seed=seed).prepare()
        return {" ".join(request.prompt)[-60:] for request in useless.requests}

    first, other = tried(0), tried(1)
    assert first
    assert other
    assert first != other


def test_a_low_least_score_does_not_cut_names_to_pieces(make: Callable[..., El4ner]) -> None:
    texts = ["Dorx met Drox and zzzz 77", "Fila met Flia and zzzz 78"]
    usual = make({"a": oracle(useful=True)}, large_pool(), **FIT)
    low = make({"a": oracle(useful=True)}, large_pool(), **FIT, min_score=0.0)
    for kept, more in zip(usual.predict(texts), low.predict(texts), strict=True):
        assert surfaces(kept).items() <= surfaces(more).items()


def test_a_verifier_that_nobody_asks_is_noted(make: Callable[..., El4ner]) -> None:
    model = make({"a": oracle(useful=False)}, large_pool(), **FIT, verify={"member": "a"})
    model.prepare()
    assert "a is not asked to verify: no prompted member is asked" in model.report()["notes"]


def test_a_target_precision_moves_the_threshold_and_says_what_to_expect(make: Callable[..., El4ner]) -> None:
    thresholds = []
    for precision in (0.3, 0.8):
        model = make({"a": oracle(useful=True)}, large_pool(), **FIT, target_precision=precision)
        model.prepare()
        report = model.report()
        point = report["fitted"]["operating point"]
        assert point["target precision"] == precision
        assert point["expected on texts like the pool"]["precision, a standard error below"] >= precision
        assert 0 < point["expected on texts like the pool"]["recall"] <= 1
        assert report["threshold"] == point["threshold"]
        thresholds.append(point["threshold"])
    assert thresholds[0] <= thresholds[1]
    with pytest.raises(ConfigError, match=r"target_precision=0\.999: no score reaches it"):
        make({"a": oracle(useful=True)}, large_pool(), **FIT, target_precision=0.999).prepare()
    few = Pool(large_pool().sentences[:5], large_pool().labels)
    with pytest.raises(ConfigError, match="the pool is too small"):
        make({"a": oracle(useful=True)}, few, **FIT, target_precision=0.5).prepare()


def test_what_was_asked_of_the_pool_is_not_asked_again(make: Callable[..., El4ner]) -> None:
    texts = ["Dorx met Drox and zzzz 77"]
    first = make({"a": oracle(useful=True)}, large_pool(), **FIT)
    before = [p.to_dict() for p in first.predict(texts)]
    engine = oracle(useful=True)
    again = make({"a": engine}, large_pool(), **FIT)
    again.prepare()
    # the verifier's verdicts on the sample are asked anew; lists and votes come from the cache
    assert not any(isinstance(request, Generate) for request in engine.requests)
    assert [p.to_dict() for p in again.predict(texts)] == before


def test_truth_and_gold_agree_where_a_span_has_two_labels(
    make: Callable[..., El4ner], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A second label of a span is no entity that nobody could find: the pool is judged as without it."""
    first, *rest = sorted(large_pool().sentences, key=lambda d: -len(d.entities))
    other = {"person": "place", "place": "person"}
    second = tuple(LabelledSpan(e.start, e.end, other[e.label]) for e in first.entities)
    twice = dataclasses.replace(first, entities=first.entities + second)
    reports = []
    for name, pool in (("one", large_pool()), ("two", Pool((twice, *rest), large_pool().labels))):
        monkeypatch.setenv("EL4NER_CACHE", str(tmp_path / name))
        model = make({"a": oracle(useful=True)}, pool, **FIT, min_score=0.3)
        model.prepare()
        reports.append(model.report())
    assert reports[0]["fitted"] == reports[1]["fitted"]
    assert reports[1]["notes"] == [*reports[0]["notes"], "2 pool spans have a second label, which does not count"]


def test_a_pool_of_copies_fits_nothing(make: Callable[..., El4ner]) -> None:
    pool = Pool((demonstration("Bob left Oslo.", {"Bob": "person"}),) * 30, LABELS)
    model = make({"a": member(["Bob"], GOLD)}, pool, voters="auto")
    assert surfaces(model.predict(["Bob came."])[0]) == {"Bob": "person"}
    assert model.report()["fitted"]["calibrated"] is False


def test_what_is_fitted_beside_a_pool_shares_no_text_with_it() -> None:
    """A text in both would tell a read-out about a sentence of the fold that it must not have seen."""
    builtin = load_pool(None, None)
    some = Pool(builtin.sentences[:30], builtin.labels)
    beside = Preparation(make_config({})).beside(some)
    assert beside is not None
    drawn = {builtin.sentences[i].text for i in builtin.sample(600)} - {d.text for d in some.sentences}
    assert {d.text for d in beside.sentences} == drawn
    assert not {d.text for d in beside.sentences} & {d.text for d in some.sentences}
    assert Preparation(make_config({})).beside(builtin) is None


@pytest.mark.parametrize(("size", "drawn"), [(1, 600), (600, 600), (601, 1200), (3000, 2518)])
def test_more_is_fitted_beside_larger_pools(size: int, drawn: int) -> None:
    sentences = tuple(Demonstration(str(i), f"Text {i}.", ()) for i in range(size))
    beside = Preparation(make_config({})).beside(Pool(sentences, LABELS))
    assert beside is not None
    assert len(beside.sentences) == drawn


def test_nothing_is_fitted_beside_without_the_builtin_pool() -> None:
    builtin = load_pool(None, None)
    some = Pool(builtin.sentences[:30], builtin.labels)
    assert Preparation(make_config({"reading": {"builtin": False}})).beside(some) is None


# What is said about a pool sentence comes from what has not seen it


def test_no_pool_sentence_is_judged_by_what_its_own_fold_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name of the pool stands in one sentence: only that sentence's own fold knows it."""
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path))
    odd = demonstration("Xyxyx left", {"Xyxyx": "person"})
    pool = Pool((*large_pool().sentences, odd), large_pool().labels)
    config = make_config(settings(["a"], voters=["retrieval"], extract={"reading": False, "noun_phrases": True}))
    preparation = Preparation(config, engines={"a": member()}, encoder=LetterEncoder(), pool=pool)
    team = Team(config, pool)
    examined = examine(preparation, team)
    assert not any("pool-strings" in c.proposed_by for own in examined.candidates for c in own)
    assert team.retrieval is not None
    sentences = pool.as_sentences(range(len(pool.sentences)))
    spans = [[c.span for c in own] for own in examined.candidates]
    honest = team.retrieval.vote(sentences, spans, exclude_folds=pool.folds)
    knowing = team.retrieval.vote(sentences, spans)
    for votes, own in zip(examined.votes["retrieval"], honest, strict=True):
        assert (votes == own).all()
    for d, own, truth in zip(pool.sentences, spans, examined.truth, strict=True):
        gold = {e.span: pool.label_names.index(e.label) for e in d.entities}
        assert [gold.get(span, 2) for span in own] == truth.tolist()
    place = next(i for i, d in enumerate(pool.sentences) if d.text == "Xyxyx left")
    row = spans[place].index(Span(0, 5))
    assert knowing[place][row, 0] > 0.6 > 0.5 > examined.votes["retrieval"][place][row, 0]
    assert examined.gold == tuple(len(d.entities) for d in pool.sentences)


def test_a_stack_is_judged_on_sentences_it_was_not_fitted_on() -> None:
    """What is right in one fold is wrong in the other: a stack that saw its own fold would come out undecided."""
    pool = Pool(
        tuple(demonstration(f"{name} was here {i}", {name: "person"}) for i, name in enumerate("ABCDEFGHIJKL")),
        LABELS,
        n_folds=2,
    )
    vote = np.array([[0.4, 0.4, 0.2]], np.float32)
    truth = tuple(np.array([fold]) for fold in pool.folds)
    size = len(pool.sentences)
    examined = Examined(
        (((Candidate(Span(0, 1), ("x",))),),) * size, truth, {"v": [vote] * size},
        (np.zeros((1, 4), np.float32),) * size, (1,) * size,
    )  # fmt: skip
    assert sorted(set(pool.folds)) == [0, 1]
    stack, shares = cross_fit(Team(make_config({}), pool), examined, ("v",))
    for fold, row in zip(pool.folds, shares, strict=True):
        assert row[0, 1 - fold] > 2 * row[0, fold]
    (everyone,) = stack.probabilities([vote], examined.evidence[0])
    assert everyone[0] == pytest.approx(everyone[1], abs=0.1)


def test_of_three_cheap_voters_the_pair_that_is_as_good_as_all_is_asked() -> None:
    """One tells persons from places in half of the sentences, one in the other half, the third never."""
    pool = Pool(
        tuple(demonstration(f"Ab was here {i}", {"Ab": ("person", "place")[i // 2 % 2]}) for i in range(120)), LABELS
    )
    truth = tuple(np.array([pool.label_names.index(d.entities[0].label)]) for d in pool.sentences)
    unsure = np.array([[0.45, 0.45, 0.1]], np.float32)

    def told(label: int) -> np.ndarray:
        return np.array([[0.9, 0.05, 0.05] if label == 0 else [0.05, 0.9, 0.05]], np.float32)

    even = [int(d.text.split()[-1]) % 2 == 0 for d in pool.sentences]
    votes = {
        "a": [told(int(t[0])) if here else unsure for t, here in zip(truth, even, strict=True)],
        "b": [unsure if here else told(int(t[0])) for t, here in zip(truth, even, strict=True)],
        "c": [unsure for _ in even],
    }
    size = len(pool.sentences)
    candidates = (((Candidate(Span(0, 2), ("x",))),),) * size
    examined = Examined(candidates, truth, votes, (np.zeros((1, 4), np.float32),) * size, (1,) * size)
    preparation = Preparation(make_config({}), pool=pool)
    team = Team(preparation.config, pool)
    choose(preparation, team, examined)
    assert team.asked == ("a", "b")
    assert "voter c brings nothing on the pool and is not asked" in preparation.notes


def test_pool_sentences_are_shown_no_demonstration_of_their_own_fold(make: Callable[..., El4ner]) -> None:
    pool, engine = large_pool(), oracle(useful=True)
    make({"a": engine}, pool, **{**FIT, "voters": "all"}).prepare()
    fold_of = {d.text: fold for d, fold in zip(pool.sentences, pool.folds, strict=True)}
    asked = ["".join(request.prompt) for request in engine.requests]  # type: ignore[union-attr]
    assert asked
    for prompt in asked:
        *shown, text = re.findall(r"^Text: (.*)$", prompt, re.MULTILINE)
        assert len(shown) == 4
        assert fold_of[text] not in {fold_of[other] for other in shown}


# The reading voter from end to end, with the states of a script


def states_of_characters(text: str, layers: Sequence[int]) -> TokenStates:
    """One token per character that is not space; its state says where it stands in its copy of the text."""
    line = text.rpartition("\n")[2]
    at = [i for i, character in enumerate(text) if not character.isspace()]
    states = np.array([(ord(text[i]), line[: max(0, i - len(text) + len(line))].count(" ")) for i in at], np.float32)
    return TokenStates(np.array([(i, i + 1) for i in at]), dict.fromkeys(layers, states.reshape(-1, 2)))


def test_the_reading_voter_proposes_votes_and_is_kept(make: Callable[..., El4ner]) -> None:
    reading = {"depths": [0.4], "encoder_depths": [], "hidden": 16, "heads": 1, "builtin": False, "directions": 0}
    extract = {"noun_phrases": False, "pool_strings": False, "reading_floor": 0.05}
    given: dict[str, Any] = {"voters": ["reading"], "reading": reading, "extract": extract}
    model = make({"a": ScriptedEngine(read=states_of_characters, n_layers=10)}, large_pool(), **given)
    texts = ["Dorx met Drox and zzzz 77", "qqqq 77 went xxxx"]
    found = model.predict(texts)
    assert [surfaces(p) for p in found] == [{"Dorx": "person", "Drox": "place"}, {}]
    assert all((e.proposed_by, list(e.votes)) == (("reading",), ["reading"]) for e in found[0].entities)
    fitted = model.report()["fitted"]
    assert fitted["candidate recall on the pool"] > 0.9
    assert fitted["cross-validated F1"] > 0.9
    engine = ScriptedEngine(read=states_of_characters, n_layers=10)
    again = make({"a": engine}, large_pool(), **given)
    assert [p.to_dict() for p in again.predict(texts)] == [p.to_dict() for p in found]
    assert len(engine.requests) == len(texts)  # of the pool nothing is read again


READS: dict[str, Any] = {
    "reading": {"depths": [0.4], "encoder_depths": [], "hidden": 16, "heads": 1, "builtin": False, "directions": 0},
    "extract": {"noun_phrases": False, "pool_strings": False, "reading_floor": 0.05},
}


@pytest.mark.parametrize("voters", [["reading", "tagging"], ["tagging"]])
def test_a_tagging_voter_votes_and_is_kept(make: Callable[..., El4ner], voters: list[str]) -> None:
    given: dict[str, Any] = {**READS, "voters": voters}
    texts = ["Dorx met Drox and zzzz 77", "qqqq 77 went xxxx"]
    engines = [ScriptedEngine(read=states_of_characters, n_layers=10) for _ in range(2)]
    first, second = (make({"a": engine}, large_pool(), **given) for engine in engines)
    found = first.predict(texts)
    assert [surfaces(p) for p in found] == [{"Dorx": "person", "Drox": "place"}, {}]
    assert all(list(e.votes) == voters and {*e.proposed_by} == {*voters} for e in found[0].entities)
    assert first.report()["fitted"]["cross-validated F1"] > 0.9
    assert [p.to_dict() for p in second.predict(texts)] == [p.to_dict() for p in found]
    assert len(engines[1].requests) == len(texts)  # of the pool nothing is read again, and a text once for both


def test_what_only_a_reader_that_is_not_asked_proposed_is_no_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fitted in the end is fitted on the candidates that a run will have."""
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path))
    monkeypatch.setattr(Preparation, "wants", lambda self, name: name in ("reading", "tagging"))
    monkeypatch.setattr("el4ner.preparation._TAGGED", 10)
    weak = {**READS, "extract": {**READS["extract"], "reading_floor": 1e-4}}  # what both say of little
    pool, config = large_pool(), make_config(settings(["a"], **weak, voters="auto"))
    engine = ScriptedEngine(read=states_of_characters, n_layers=10)
    preparation = Preparation(config, engines={"a": engine}, encoder=LetterEncoder(), pool=pool)
    team = Team(config, pool)
    examined = examine(preparation, team)
    assert [*examined.votes] == ["reading", "tagging"]
    asked, other = "reading", "tagging"
    monkeypatch.setattr("el4ner.choosing.fewest", lambda *_: ((asked,), 0.0, 0.0))
    seen = choose(preparation, team, examined)
    assert team.asked == (asked,)
    assert {name for own in seen.candidates for c in own for name in c.proposed_by} == {asked}
    assert any(c.proposed_by == (other,) for own in examined.candidates for c in own)  # so something was left out
    for i, (own, former) in enumerate(zip(seen.candidates, examined.candidates, strict=True)):
        places = [[c.span for c in former].index(c.span) for c in own]
        np.testing.assert_array_equal(seen.truth[i], examined.truth[i][places])
        for name, rows in seen.votes.items():
            np.testing.assert_array_equal(rows[i], examined.votes[name][i][places])
        assert len(seen.evidence[i]) == len(own)
    assert [*seen.tables] == [asked]
    known = {voter.name: voter for voter in team.readers}
    known[asked].state()
    with pytest.raises(RuntimeError, match="before fit"):
        known[other].state()
    assert narrowed(preparation, team, examined, ("reading", "tagging")) is examined
    assert narrowed(preparation, team, examined, ("retrieval",)) is examined


def test_reading_votes_on_what_only_members_list_as_it_will(make: Callable[..., El4ner]) -> None:
    """A span that no other voter proposed has a row in the table of the fold that did not see it."""
    pool = large_pool()
    width = len(pool.label_names) + 1
    size = len(pool.sentences)
    odd = Span(0, 4)
    said = np.full((1, 1, width), np.log(0.1 / (width - 1)), np.float32)
    said[..., 0] = np.log(0.9)
    table = SpanTable((odd,), said)
    examined = Examined(
        ((),) * size, (np.zeros(0, np.int64),) * size, {"reading": [np.zeros((0, width), np.float32)] * size},
        (np.zeros((0, 4), np.float32),) * size, (1,) * size, {"reading": [table] * size},
    )  # fmt: skip
    team = Team(make_config({}), pool)
    team.base = start_stack(("reading",), width, 4)
    (votes,) = _cheap_rows(team, examined, [3], pool.as_sentences([3]), [[Candidate(odd, ("a",))]], [pool.folds[3]])[
        "reading"
    ]
    assert votes[0, 0] == pytest.approx(0.9)
