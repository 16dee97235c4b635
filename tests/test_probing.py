"""The probing voter: what it asks, that its fit tells labels apart, that folds are left out, and that fits are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_members import LABELS, LetterEncoder, demonstration, large_pool, settings, surfaces

from el4ner.cache import ArrayCache
from el4ner.choosing import choose
from el4ner.config import ProbingConfig, make_config
from el4ner.engines.base import TokenStates
from el4ner.engines.scripted import ScriptedEngine
from el4ner.examining import examine
from el4ner.pipeline import El4ner
from el4ner.pool import Pool
from el4ner.preparation import Preparation
from el4ner.records import Sentence, Span
from el4ner.stages.team import Team
from el4ner.voters.probe import ProbeSettings, fit_probes, mean_distribution
from el4ner.voters.probing import ProbingVoter, question

PROBING = ProbingConfig(depths=(0.5,), directions=0, hidden=16, heads=2)


def knowing(text: str, layers: Sequence[int]) -> TokenStates:
    """The last token's state tells by its first letter what is asked about: D a person, L a place, else nothing."""
    asked = text.rpartition('\n"')[2]
    state = np.array([[asked.startswith("D"), asked.startswith("L"), 1.0]], np.float32)
    return TokenStates(np.array([[0, 1]]), dict.fromkeys(layers, state))


POOL = Pool(
    tuple(
        demonstration(f"Dora{i} met x{i} in Lima{i}", {f"Dora{i}": "person", f"Lima{i}": "place"}) for i in range(12)
    ),
    LABELS,
)


def spans_of(text: str) -> list[Span]:
    found, at = [], 0
    for word in text.split():
        found.append(Span(at, at + len(word)))
        at += len(word) + 1
    return found


def make(engine: Any, folder: Path, config: ProbingConfig = PROBING) -> ProbingVoter:
    return ProbingVoter("probing", engine, POOL.label_names, config, ArrayCache(folder))


def test_long_texts_are_shown_in_parts_around_the_span() -> None:
    assert question("Ada met Bob.", Span(8, 11)) == ("Ada met Bob.\n", '"Bob" is a')
    text = " ".join(f"word{i}" for i in range(2000))
    for start in (0, 700, 5000, len(text) - 4):
        span = Span(start, start + 4)
        shown, asked = question(text, span)
        assert len(shown) <= 2101
        assert shown[:-1] in text
        assert text[max(0, start - 300) : span.end] in shown
        assert text[span.start : span.end] in asked
    assert question(text, Span(5000, 5004))[0] == question(text, Span(5010, 5014))[0]  # neighbours share
    whole = Span(0, len(text))
    assert question(text, whole)[0] == text + "\n"


def test_a_fit_tells_labels_apart_and_leaves_folds_out(tmp_path: Path) -> None:
    engine = ScriptedEngine(read=knowing, n_layers=2)
    voter = make(engine, tmp_path)
    sentences = POOL.as_sentences(range(12))
    spans = [spans_of(s.text) for s in sentences]
    votes = voter.fit(POOL, range(12), spans, lambda _: None)
    none = len(POOL.label_names)
    for i, rows in enumerate(votes):
        np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-5)
        assert rows.argmax(axis=1).tolist() == POOL.truth(i, spans[i]).tolist()
    (found,) = voter.vote([Sentence("1", "Dina saw Lund")], [[Span(0, 4), Span(5, 8), Span(9, 13)]])
    assert [POOL.label_names[k] if k < none else "" for k in found.argmax(axis=1)] == ["person", "", "place"]
    # what is said of a pool sentence without its fold is what the fit said of it
    again = voter.vote(sentences, spans, exclude_folds=POOL.folds)
    for one, other in zip(votes, again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    kept = make(engine, tmp_path / "other")
    kept.restore(voter.state())
    np.testing.assert_array_equal(kept.vote([Sentence("1", "Dina saw Lund")], [[Span(0, 4)]])[0], found[:1])


def test_a_label_that_only_one_fold_knows_is_not_known_to_its_own_probes(tmp_path: Path) -> None:
    def odd(text: str, layers: Sequence[int]) -> TokenStates:
        state = np.array([[text.rpartition('\n"')[2].startswith("Dora0"), 1.0]], np.float32)
        return TokenStates(np.array([[0, 1]]), dict.fromkeys(layers, state))

    voter = make(ScriptedEngine(read=odd, n_layers=2), tmp_path)
    where = next(i for i, d in enumerate(POOL.sentences) if d.text.startswith("Dora0 "))
    spans = [[Span(0, 5)] if i == where else [spans_of(d.text)[1]] for i, d in enumerate(POOL.sentences)]
    votes = voter.fit(POOL, range(12), spans, lambda _: None)
    person = POOL.label_names.index("person")
    (seen,) = voter.vote(POOL.as_sentences([where]), [[Span(0, 5)]])
    assert seen[0, person] > 0.5 > votes[where][0, person]


def test_a_fit_is_kept_and_another_pool_or_setting_is_another_fit(tmp_path: Path) -> None:
    spans = [spans_of(d.text) for d in POOL.sentences]

    def asked(config: ProbingConfig = PROBING, own: Sequence[Sequence[Span]] = spans) -> int:
        engine = ScriptedEngine(read=knowing, n_layers=2)
        make(engine, tmp_path, config).fit(POOL, range(12), own, lambda _: None)
        return len(engine.requests)

    assert asked() == 60
    assert asked() == 0
    assert asked(PROBING.model_copy(update={"decay": 0.2})) == 60
    assert asked(own=[own[:1] for own in spans]) == 12


def test_a_fold_that_was_not_drawn_is_judged_by_all_probes(tmp_path: Path) -> None:
    voter = make(ScriptedEngine(read=knowing, n_layers=2), tmp_path)
    drawn = [i for i, fold in enumerate(POOL.folds) if fold != POOL.folds[0]]
    voter.fit(POOL, drawn, [spans_of(POOL.sentences[i].text) for i in drawn], lambda _: None)
    sentences, spans = POOL.as_sentences([0]), [[Span(0, 4)]]
    (left_out,) = voter.vote(sentences, spans, exclude_folds=[POOL.folds[0]])
    np.testing.assert_array_equal(left_out, voter.vote(sentences, spans)[0])


def test_what_is_too_long_is_not_asked_about(tmp_path: Path) -> None:
    engine = ScriptedEngine(read=knowing, n_layers=2, max_tokens=240)
    voter = make(engine, tmp_path)
    spans = [spans_of(d.text) for d in POOL.sentences]
    long = "Dora " * 60
    fitted = voter.fit(POOL, range(12), spans, lambda _: None)
    assert all(np.isfinite(rows).all() for rows in fitted)
    (votes,) = voter.vote([Sentence("1", long)], [[Span(0, 4), Span(0, 201), Span(250, 254)]])
    assert np.isnan(votes[1]).all()
    assert votes[[0, 2]].argmax(axis=1).tolist() == [POOL.label_names.index("person")] * 2
    shown = [request[0] for request in engine.requests[-2:]]
    assert all(len(text) <= 240 for text in shown)  # a part of the text, as the model takes
    wide = "👩" * 30 + " Dora " + "👩" * 30
    assert np.isnan(voter.vote([Sentence("1", wide)], [[Span(31, 35)]])[0]).all()  # 240 bytes and more


def test_long_texts_that_show_the_same_part_are_read_apart(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    class Noting(ScriptedEngine):
        def read_ends(self, prompts: Sequence[Any], layers: Sequence[int]) -> Any:
            calls.append([prompt[1] for prompt in prompts])
            return super().read_ends(prompts, layers)

    voter = make(Noting(read=knowing, n_layers=2), tmp_path)
    voter.fit(POOL, range(12), [spans_of(d.text) for d in POOL.sentences], lambda _: None)
    calls.clear()
    shared = "Dora saw Lima. " * 150
    texts = [shared + "Ann", "Dora", shared + "Bob", "Lima", "Dora"]
    spans = [[Span(0, 4), Span(9, 13)], [Span(0, 4)], [Span(9, 13)], [Span(0, 4)], [Span(0, 4)]]
    votes = voter.vote([Sentence(str(i), text) for i, text in enumerate(texts)], spans)
    assert [len(call) for call in calls] == [4, 1]
    assert [int(row.argmax()) for rows in votes for row in rows] == [
        POOL.label_names.index(name) for name in ("person", "place", "person", "place", "place", "person")
    ]


def test_one_surface_is_asked_about_once_in_a_sentence(tmp_path: Path) -> None:
    engine = ScriptedEngine(read=knowing, n_layers=2)
    voter = make(engine, tmp_path)
    voter.fit(POOL, range(12), [spans_of(d.text) for d in POOL.sentences], lambda _: None)
    before = len(engine.requests)
    (votes,) = voter.vote([Sentence("1", "Dora and Dora")], [[Span(0, 4), Span(9, 13)]])
    assert len(engine.requests) == before + 1
    np.testing.assert_array_equal(votes[0], votes[1])
    assert voter.vote([Sentence("1", "nothing")], [[]])[0].shape == (0, 3)


def test_probes_learn_and_come_out_the_same_twice() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(60, 5)).astype(np.float32)
    truth = (values[:, 0] > 0).astype(np.int64)
    one, other = (fit_probes(values, truth, 3, ProbeSettings(hidden=8), seed=3, heads=2) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.hidden, b.hidden)
    said = np.stack([mean_distribution(one, row) for row in values])
    np.testing.assert_allclose(said.sum(axis=1), 1, atol=1e-6)
    assert (said[:, :2].argmax(axis=1) == truth).mean() > 0.9
    assert said[:, 2].max() < 0.2  # no example
    assert not np.array_equal(one[0].hidden, one[1].hidden)


def test_the_pipeline_asks_keeps_and_restores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path))
    probing = {"depths": [0.5], "directions": 0, "hidden": 16, "heads": 2, "sample": 30}
    given: dict[str, Any] = {
        "voters": ["probing"], "probing": probing, "verify": {"enabled": False}, "extract": {"members": False},
    }  # fmt: skip

    def model(engine: ScriptedEngine) -> El4ner:
        return El4ner(make_config(settings(["a"], **given)), engines={"a": engine}, pool=large_pool())

    def shows(text: str, layers: Sequence[int]) -> TokenStates:
        asked = text.rpartition('\n"')[2].partition('"')[0]
        state = np.array([[asked[:1].isupper() * (asked.count("o") > 0), asked[:1].isupper() * asked.count("x"), 1.0]])
        return TokenStates(np.array([[0, 1]]), dict.fromkeys(layers, state.astype(np.float32)))

    engine = ScriptedEngine(read=shows, n_layers=2)
    found = model(engine).predict(["Dorx met Drox and zzzz 77"])
    assert found[0].status == "ok", found[0].error
    assert all(list(e.votes) == ["probing"] for e in found[0].entities)
    again = ScriptedEngine(read=shows, n_layers=2)
    kept = model(again)
    assert [p.to_dict() for p in kept.predict(["Dorx met Drox and zzzz 77"])] == [p.to_dict() for p in found]
    assert len(again.requests) < 10  # of the pool nothing is asked again
    assert surfaces(found[0]) == surfaces(kept.predict(["Dorx met Drox and zzzz 77"])[0])


@pytest.mark.parametrize("sample", [20, 100_000])
def test_a_voter_that_is_not_asked_costs_the_others_no_sentence(
    sample: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where candidates are drawn for the probing voter, the rest is stacked on the whole pool once it is left out."""
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path))

    def blind(text: str, layers: Sequence[int]) -> TokenStates:
        return TokenStates(np.array([[0, 1]]), dict.fromkeys(layers, np.ones((1, 3), np.float32)))

    def stack(voters: Any) -> Any:
        given = {"probing": {"depths": [0.5], "directions": 0, "hidden": 4, "heads": 1, "sample": sample}}
        config = make_config(settings(["a"], **given, voters=voters, extract={"members": False}))
        engine = ScriptedEngine(read=blind, n_layers=2)
        preparation = Preparation(config, engines={"a": engine}, encoder=LetterEncoder(), pool=large_pool())
        team = Team(config, large_pool())
        choose(preparation, team, examine(preparation, team))
        return team

    monkeypatch.setattr(Preparation, "wants", lambda self, name: name in ("probing", "retrieval"))
    chosen = stack("auto")
    assert chosen.asked == ("retrieval",)
    monkeypatch.setattr(Preparation, "wants", lambda self, name: name == "retrieval")
    alone = stack("auto")
    np.testing.assert_allclose(chosen.stack.weights, alone.stack.weights, atol=1e-6)
    assert chosen.threshold == alone.threshold


@pytest.mark.parametrize(
    ("n_folds", "voters", "fitted"),
    [(2, "auto", False), (3, "auto", True), (2, "all", True), (2, ("probing", "retrieval"), True)],
)
def test_in_two_folds_it_is_fitted_only_where_it_is_asked_for(
    n_folds: int, voters: Any, fitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path))
    monkeypatch.setattr(Preparation, "readers", lambda self, pool: ())  # nothing but the two others
    given = {"probing": {"depths": [0.5], "directions": 0, "hidden": 4, "heads": 1}, "extract": {"members": False}}
    config = make_config(settings(["a"], **{**given, "voters": voters}))
    engine = ScriptedEngine(read=knowing, n_layers=2)
    pool = replace(large_pool(), n_folds=n_folds)
    preparation = Preparation(config, engines={"a": engine}, encoder=LetterEncoder(), pool=pool)
    examined = examine(preparation, Team(config, pool))
    assert set(examined.votes) == ({"probing", "retrieval"} if fitted else {"retrieval"})
