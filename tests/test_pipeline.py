"""The whole pipeline with scripted members: records in, records out, whatever goes wrong in between."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from el4ner.config import make_config
from el4ner.engines.base import Choose, Completion, Generate
from el4ner.engines.scripted import ScriptedEngine
from el4ner.errors import ConfigError, EngineError, UsageError
from el4ner.jsonl import read_inputs
from el4ner.pipeline import El4ner, _shortfall
from el4ner.pool import Pool, load_pool
from el4ner.preparation import Preparation
from el4ner.prompts import VERDICT_CHOICES
from el4ner.records import Demonstration, Label, LabelledSpan, Sentence


def _load_stages() -> Any:
    """The scripted members of test_stages.py: with importlib import mode tests do not see each other."""
    spec = importlib.util.spec_from_file_location("scripted_stages", Path(__file__).with_name("test_stages.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


stages = _load_stages()
GOLD = {"Dora": "person", "Bob": "person", "Lima": "place", "Oslo": "place"}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., El4ner]:
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path))

    def build(engines: dict[str, Any], pool: Pool = stages.POOL, **over: Any) -> El4ner:
        config = make_config(stages.settings(list(engines), **over))
        return El4ner(config, engines=engines, encoder=stages.LetterEncoder(), pool=pool)

    return build


def surfaces(prediction: Any) -> dict[str, str]:
    return {e.text: e.label for e in prediction.entities}


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_every_record_comes_back_in_its_place(make: Callable[..., El4ner], batch_size: int) -> None:
    model = make({"a": stages.member(list(GOLD), GOLD)}, batch_size=batch_size)
    given = [
        "Dora met Bob.",
        {"id": "x", "text": "Lima is far.", "page": 3, "entities": []},
        "",
        Sentence("bad", "", {"line": 7}, "docs.jsonl:7: not JSON"),
        {"id": 5, "text": None},
        " \n\t",
        17,
        {"id": None, "text": "Oslo"},
        {"text": "half \ud83d"},
        "\u200b",
        {"tokens": ("Dora", "met", "Bob", ".")},
        {"id": [1], "text": "Dora"},
        {"tokens": ["Dora", 5]},
        "Dora met Bob.",
    ]
    found = model.predict(given)  # type: ignore[arg-type]
    assert [p.id for p in found] == ["1", "x", "3", "bad", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14"]
    assert [i for i, p in enumerate(found) if p.status != "ok"] == [3, 4, 6, 8, 11, 12]
    assert (found[10].text, surfaces(found[10])) == ("Dora met Bob .", {"Dora": "person", "Bob": "person"})
    assert found[11].error == 'record 12: "id" is a list ([1]); use a string or an integer'
    assert found[12].error == 'record 13: "tokens" holds a number (5); use strings only'
    assert surfaces(found[0]) == surfaces(found[-1]) == {"Dora": "person", "Bob": "person"}
    assert surfaces(found[7]) == {"Oslo": "place"}
    assert found[1].extra == {"page": 3, "entities": []}
    assert (found[3].error, found[3].extra) == ("docs.jsonl:7: not JSON", {"line": 7})
    assert all(p.error is not None and not p.entities for p in found if p.status == "skipped")
    assert "came as int" in str(found[6].error)
    assert "lone surrogate" in str(found[8].error)
    for empty in (found[2], found[5]):
        assert (empty.entities, empty.usage.prompt_tokens) == ((), 0)
    assert model.report()["records"] == {"ok": 8, "skipped": 6}


def test_records_have_the_same_keys_and_plain_numbers(make: Callable[..., El4ner]) -> None:
    (prediction,) = make({"a": stages.member(["Dora"], GOLD)}).predict(["Dora met Bob."])
    data = prediction.to_dict()
    assert list(data) == ["id", "text", "entities", "status", "error", "usage", "extra"]
    (entity,) = data["entities"]
    assert entity == {
        "start": 0, "end": 4, "text": "Dora", "label": "person", "score": 0.9,
        "votes": {"a": {"person": 0.9, "place": 0.05, "": 0.05}}, "proposed_by": ["a"], "verified": 0.8,
    }  # fmt: skip
    assert all(type(value) is float for value in entity["votes"]["a"].values())


def test_one_string_is_no_list_of_texts(make: Callable[..., El4ner]) -> None:
    model = make({"a": stages.member()})
    for wrong in ("Dora met Bob.", {"text": "Dora"}, Sentence("1", "Dora"), b"Dora"):
        with pytest.raises(UsageError, match=r"write predict\(\[text\]\)"):
            model.predict(wrong)  # type: ignore[arg-type]


def test_what_is_no_list_of_texts_at_all(make: Callable[..., El4ner]) -> None:
    with pytest.raises(UsageError, match=r"^texts is int; give a list of texts"):
        make({"a": stages.member()}).predict(5)  # type: ignore[arg-type]


def test_records_of_files_and_of_python_are_read_alike(make: Callable[..., El4ner], tmp_path: Path) -> None:
    records: list[Any] = [
        {"text": "Dora met Bob.", "id": 7},
        {"tokens": ["Dora", "left"], "x": 1},
        {"text": 5},
        {"id": True, "text": "a"},
        {},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    model = make({"a": stages.member(list(GOLD), GOLD)})
    direct = [p.to_dict() for p in model.predict(records)]
    for record, other in zip(direct, model.predict(read_inputs([path])), strict=True):
        error = None if other.error is None else other.error.replace(f"{path}:", "record ")
        assert other.to_dict() | {"error": error} == record


def test_predict_iter_reads_a_chunk_at_a_time(make: Callable[..., El4ner]) -> None:
    read = []

    def texts() -> Any:
        for i in range(10):
            read.append(i)
            yield f"Bob {i}"

    predictions = make({"a": stages.member(["Bob"], GOLD)}, batch_size=2).predict_iter(texts())
    assert next(predictions).text == "Bob 0"
    assert read == [0, 1]
    assert len(list(predictions)) == 9


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_record_that_fails_does_not_fail_the_others(make: Callable[..., El4ner], batch_size: int) -> None:
    good = stages.member(["Bob", "Lima"], GOLD)

    def generate(request: Generate) -> Completion:
        assert request.grammar is not None
        if "boom" in request.grammar.text:
            raise EngineError("engine 'a': out of memory; use a smaller batch")
        return good.generate([request])[0]

    engine = ScriptedEngine(generate=generate, choose=lambda request: good.choose([request])[0].tolist())
    model = make({"a": engine}, batch_size=batch_size)
    found = model.predict(["Bob left.", "Bob goes boom.", "Lima is far."])
    assert [p.status for p in found] == ["ok", "failed", "ok"]
    assert found[1].error == "engine 'a': out of memory; use a smaller batch"
    assert (found[1].text, found[1].entities) == ("Bob goes boom.", ())
    assert (surfaces(found[0]), surfaces(found[2])) == ({"Bob": "person"}, {"Lima": "place"})


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("kind", "message"), [(RuntimeError, "shape\nmismatch"), (ValueError, ""), (IndexError, "5")])
def test_errors_of_libraries_fail_their_record_and_are_named(
    make: Callable[..., El4ner], monkeypatch: pytest.MonkeyPatch, batch_size: int, kind: type[Exception], message: str
) -> None:
    good = stages.member(["Bob", "Lima"], GOLD)
    raised: list[tuple[type[BaseException], str]] = [(kind, message)]

    def generate(request: Generate) -> Completion:
        assert request.grammar is not None
        if "boom" in request.grammar.text:
            raise raised[0][0](raised[0][1])
        return good.generate([request])[0]

    engine = ScriptedEngine(generate=generate, choose=lambda request: good.choose([request])[0].tolist())
    model = make({"a": engine}, batch_size=batch_size)
    monkeypatch.delenv("EL4NER_DEBUG", raising=False)
    texts = ["Bob left.", "Bob goes boom.", "Lima is far."]
    found = model.predict(texts)
    assert [p.status for p in found] == ["ok", "failed", "ok"]
    reason = str(found[1].error)
    assert reason.startswith(f"unexpected {kind.__name__}: {' '.join(message.split()) or 'no message'}; ")
    assert "\n" not in reason
    monkeypatch.setenv("EL4NER_DEBUG", "1")
    with pytest.raises(kind):
        model.predict(texts)
    monkeypatch.delenv("EL4NER_DEBUG")
    for stops in (KeyboardInterrupt, SystemExit, UsageError):
        raised[0] = (stops, "a wrong call")
        with pytest.raises(stops):
            model.predict(texts)


def test_a_text_too_long_for_a_member_says_who_read_it(make: Callable[..., El4ner]) -> None:
    def limited(max_tokens: int) -> ScriptedEngine:
        whole = stages.member(["Bob"], GOLD)
        return ScriptedEngine(
            generate=lambda request: whole.generate([request])[0],
            choose=lambda request: whole.choose([request])[0].tolist(),
            max_tokens=max_tokens,
        )

    long = "Bob left. " + "Nothing more was seen of him. " * 80
    settings: dict[str, Any] = {"max_prompt_tokens": 4000}
    both = make({"a": limited(300), "b": limited(4096)}, **settings)
    (short, cut) = both.predict(["Bob left.", long])
    assert (short.status, short.error) == ("ok", None)
    assert (cut.status, cut.error) == ("truncated", "a could not read this text: too long; other voters did")
    assert surfaces(cut) == {"Bob": "person"}
    assert set(cut.entities[0].votes) == {"b"}
    (nobody,) = make({"a": limited(300), "b": limited(301)}, **settings).predict([long])
    assert (nobody.status, nobody.error) == ("truncated", "a, b could not read this text: too long")
    assert nobody.entities == ()


def test_who_read_how_much_is_said_in_one_line() -> None:
    text = "x" * 50
    assert _shortfall(text, None, ["reading"]) is None
    assert _shortfall(text, {"reading": 20}, ["reading"]) == "reading read only the first 20 of 50 characters: too long"
    assert _shortfall(text, {"reading": 20, "a": 0, "b": 0}, ["reading", "retrieval", "a", "b"]) == (
        "reading read only the first 20 of 50 characters and a, b could not read this text: too long; "
        "other voters read all of it"
    )


def test_the_order_of_the_pool_does_not_matter(make: Callable[..., El4ner]) -> None:
    texts = ["Dora met Bob.", "Nobody saw Lima or Oslo."]
    everyone = {"members": True}
    results = []
    for sentences in (stages.POOL.sentences, stages.POOL.sentences[::-1]):
        pool = Pool(sentences, stages.LABELS)
        model = make({"a": stages.member(["Lima"], GOLD, 0.5)}, pool, extract=everyone, voters="all")
        results.append([p.to_dict() for p in model.predict(texts)])
    assert results[0] == results[1]
    assert any(entity["votes"].keys() == {"a", "retrieval"} for p in results[0] for entity in p["entities"])


def test_a_small_pool_counts_everybody_alike_and_says_so(make: Callable[..., El4ner]) -> None:
    model = make({"a": stages.member(["Oslo"], GOLD)}, voters="auto")
    (prediction,) = model.predict(["Oslo is cold."])
    (entity,) = prediction.entities
    assert entity.score == pytest.approx(np.mean([entity.votes[voter]["place"] for voter in ("a", "retrieval")]))
    report = model.report()
    assert report["asked"] == ["a", "retrieval"]
    assert report["stack"] is None
    assert report["fitted"]["calibrated"] is False
    assert report["notes"] == ["4 pool sentences: nothing was fitted, voters count alike, scores are uncalibrated"]


def test_labels_without_examples_are_zero_shot(make: Callable[..., El4ner]) -> None:
    engine = stages.member(["Bob"], GOLD)
    model = make({"a": engine}, Pool((), stages.LABELS), voters="auto")
    (prediction,) = model.predict(["Bob left."])
    assert surfaces(prediction) == {"Bob": "person"}
    assert set(prediction.entities[0].votes) == {"a"}
    prompt = "".join(engine.requests[0].prompt)
    assert "person: A human." in prompt
    assert prompt.count("Text:") == 1
    assert model.report()["pool"] == {"sentences": 0, "labels": ["person", "place"]}


def test_what_the_caller_does_between_records_is_no_time_of_the_run(
    make: Callable[..., El4ner], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("el4ner.pipeline.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    good = stages.member(["Bob"], GOLD)

    def generate(request: Generate) -> Completion:
        clock[0] += 1.0
        return good.generate([request])[0]

    engine = ScriptedEngine(generate=generate, choose=lambda request: good.choose([request])[0].tolist())
    model = make({"a": engine}, batch_size=2)
    for _ in model.predict_iter(["Bob left.", "Bob came.", "Bob went."]):
        clock[0] += 100.0
    assert model.report()["seconds"]["prediction"] == 3.0


def test_the_preparation_says_what_it_is_about(make: Callable[..., El4ner]) -> None:
    model = make({"a": stages.member()}, large_pool(), voters=["retrieval"], extract={"reading": False})
    told: list[str] = []
    model.progress = told.append
    model.predict(["Dora left."])
    assert "retrieval: encoding the pool's strings" in told


def test_nobody_to_ask_is_a_usage_error(make: Callable[..., El4ner]) -> None:
    model = make({"a": stages.member()}, voters="reading")
    with pytest.raises(ConfigError, match="leaves nobody to ask: the reading voter needs 20"):
        model.predict(["Bob"])
    with pytest.raises(ConfigError, match="no labels"):
        make({"a": stages.member()}, Pool((), ())).predict(["Bob"])
    # a pool that is large enough, and a member whose states cannot be read
    with pytest.raises(ConfigError, match=r"^voters=\('reading',\) leaves nobody to ask: no model among the members"):
        make({"a": stages.member()}, large_pool(), voters=["reading"], extract={"reading": False}).predict(["Bob"])


# The paper preset: everything is generated


def paper_member(lists: str, types: str, verdicts: dict[str, str]) -> ScriptedEngine:
    def generate(request: Generate) -> str:
        assert request.grammar is None
        prompt = "".join(request.prompt)
        if prompt.endswith("Types:"):
            return types
        if prompt.endswith("Entities:"):
            return lists
        return next(verdict for surface, verdict in verdicts.items() if f'Is "{surface}" an entity' in prompt)

    return ScriptedEngine(generate=generate)


def paper(make: Callable[..., El4ner], engines: dict[str, Any]) -> El4ner:
    # what `settings` says about extraction belongs to the default preset
    return make(engines, preset="paper", voters="all", extract={})


def test_the_paper_preset_from_end_to_end(make: Callable[..., El4ner]) -> None:
    second = paper_member("[CLS]Lima[SEP]", "Dora -> person[SEP]Lima -> place[SEP]Bob -> person", {})
    third = paper_member("[CLS]Lima[SEP]", "Lima -> place[SEP]Bob -> person", {})
    first_verdicts = {"Dora": "true", "Bob": "true", "Lima": "false"}
    first = paper_member("[CLS]Dora[SEP]Bob[SEP]", "Dora -> person[SEP]Bob -> place", first_verdicts)
    model = paper(make, {"a": first, "b": second, "c": third})
    (prediction,) = model.predict(["Dora met Bob in Lima."])
    found = {e.text: e for e in prediction.entities}
    assert {name: e.label for name, e in found.items()} == {"Dora": "person", "Bob": "person"}  # Lima was rejected
    assert found["Bob"].score == pytest.approx(2 / 3)
    assert found["Dora"].score == 1.0
    assert set(found["Dora"].votes) == {"a", "b"}  # the third said nothing about it
    assert found["Dora"].verified == 1.0
    assert found["Dora"].proposed_by == ("a",)
    assert {"asked": ["a", "b", "c"], "verifier": "a"}.items() <= model.report().items()
    # zero-shot list, list with demonstrations, types, three verdicts
    assert len(first.requests) == 6
    assert "Sentence: Bob left Oslo." in "".join(first.requests[1].prompt)  # type: ignore[union-attr]


def test_the_paper_preset_wants_members_only(make: Callable[..., El4ner]) -> None:
    preparation = Preparation(make_config({"preset": "paper", "classify": {"combine": "equal"}}))
    assert not preparation.wants("reading")
    assert not preparation.wants("retrieval")
    assert [member.name for member in preparation.wanted_members()] == ["smollm2-list", "smollm2-ask", "smollm2-define"]
    one = paper_member("[CLS]Bob[SEP]", "Bob -> person", {"Bob": "true"})
    model = make({"a": one}, large_pool(), preset="paper", voters="all", extract={}, classify={"combine": "equal"})
    model.prepare()
    assert model.report()["asked"] == ["a"]


def test_a_tie_of_the_paper_preset_goes_to_the_earlier_member(make: Callable[..., El4ner]) -> None:
    def one(label: str) -> ScriptedEngine:
        return paper_member("[CLS]Bob[SEP]", f"Bob -> {label}", {"Bob": "true"})

    for labels in (("person", "place"), ("place", "person")):
        model = paper(make, {"a": one(labels[0]), "b": one(labels[1])})
        assert surfaces(model.predict(["Bob left."])[0]) == {"Bob": labels[0]}


def test_malformed_replies_are_counted_and_lose_nothing(make: Callable[..., El4ner]) -> None:
    wild = paper_member("I think: Bob and somebody", "Bob is a person", {})
    good = paper_member("[CLS]Bob[SEP]Zorro[SEP]", "Bob -> person", {"Bob": "maybe"})
    model = paper(make, {"good": good, "wild": wild})
    predictions = model.predict(["Bob left.", "Bob came."])
    assert [p.status for p in predictions] == ["ok", "ok"]
    assert all(p.entities == () for p in predictions)  # "maybe" is no verdict, and written verdicts must be given
    replies = model.report()["replies"]
    assert replies["wild: replies"] == replies["wild: malformed"] == 2
    assert (replies["good: malformed"], replies["good: surfaces not in the text"]) == (0, 2)


# With a fit: 30 sentences, retrieval and members


def large_pool() -> Pool:
    names = [f"{a}{b}" for a in ("Dor", "Fil", "Gus") for b in ("a", "e", "i", "o", "u")]
    towns = [f"{a}{b}" for a in ("Dro", "Fli", "Gsu") for b in ("a", "e", "i", "o", "u")]  # the same letters
    rows = [
        stages.demonstration(f"{n} met {t} and zzzz {i}", {n: "person", t: "place"})
        for i, (n, t) in enumerate(zip(names, towns, strict=True))
    ]
    rows += [Demonstration(f"e{i}", f"qqqq {i} went xxxx", ()) for i in range(10)]
    return Pool(tuple(rows), (Label("person"), Label("place")))


def oracle(useful: bool) -> ScriptedEngine:
    """Knows every name by its form, or says the same about everything."""

    def label(surface: str) -> str:
        if surface[:3] in ("Dor", "Fil", "Gus"):
            return "person"
        return "place" if surface[:3] in ("Dro", "Fli", "Gsu") else "none of these"

    def generate(request: Generate) -> str:
        assert request.grammar is not None
        words = request.grammar.text.split()
        return "; ".join(word for word in words if useful and label(word) != "none of these") or "none"

    def choose(request: Choose) -> list[float]:
        surface = stages.surface_of(request)
        if request.choices == VERDICT_CHOICES or surface == "N/A" or not useful:
            return [float(-np.log(len(request.choices)))] * len(request.choices)
        return [float(np.log(0.94 if choice.strip() == label(surface) else 0.03)) for choice in request.choices]

    return ScriptedEngine(generate=generate, choose=choose)


FIT: dict[str, Any] = {"extract": {"reading": False}, "stack": {"audition": 20, "sample": 25}, "voters": "auto"}


def test_a_member_that_helps_on_the_pool_is_asked(make: Callable[..., El4ner]) -> None:
    model = make({"a": oracle(useful=True)}, large_pool(), **FIT)
    (prediction,) = model.predict(["Dorx met Drox and zzzz 77"])
    assert surfaces(prediction) == {"Dorx": "person", "Drox": "place"}
    report = model.report()
    assert report["asked"] == ["retrieval", "a"]
    assert report["fitted"]["calibrated"] is True
    assert report["stack"]["a"]["person"] > 0.1
    assert "a: hidden states cannot be read there, so it has no reading voter" in report["notes"]
    assert all(e.verified == pytest.approx(0.5) for e in prediction.entities)


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
    pool = Pool((stages.demonstration("Bob left Oslo.", {"Bob": "person"}),) * 30, stages.LABELS)
    model = make({"a": stages.member(["Bob"], GOLD)}, pool, voters="auto")
    assert surfaces(model.predict(["Bob came."])[0]) == {"Bob": "person"}
    assert model.report()["fitted"]["calibrated"] is False


def test_what_is_fitted_beside_a_pool_shares_no_text_with_it() -> None:
    """A text in both would tell a read-out about a sentence of the fold that it must not have seen."""
    builtin = load_pool(None, None)
    some = Pool(builtin.sentences[:30], builtin.labels)
    beside = Preparation(make_config({})).beside(some)
    assert beside is not None
    assert len(beside.sentences) == len(builtin.sentences) - 30
    assert not {d.text for d in beside.sentences} & {d.text for d in some.sentences}
    assert Preparation(make_config({})).beside(builtin) is None
    assert Preparation(make_config({"reading": {"builtin": False}})).beside(some) is None
