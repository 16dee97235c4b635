"""The whole pipeline with scripted members: records in, records out, whatever goes wrong in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scripted_members import GOLD, LABELS, POOL, demonstration, large_pool, member, surfaces

from el4ner.config import make_config
from el4ner.engines.base import Choose, Completion, Generate
from el4ner.engines.scripted import ScriptedEngine
from el4ner.errors import ConfigError, EngineError, UsageError
from el4ner.jsonl import read_inputs
from el4ner.kernels import available_backends
from el4ner.pipeline import El4ner, _shortfall
from el4ner.pool import Pool
from el4ner.preparation import Preparation
from el4ner.records import Sentence


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_every_record_comes_back_in_its_place(make: Callable[..., El4ner], batch_size: int) -> None:
    model = make({"a": member(list(GOLD), GOLD)}, batch_size=batch_size)
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


def test_sentences_are_checked_as_other_records_are(make: Callable[..., El4ner]) -> None:
    model = make({"a": member(["Dora"], GOLD)})
    given = [Sentence("a", "Dora met Bob.", {"page": 3}), Sentence("b", "half \ud83d"), Sentence("c", 5)]  # type: ignore[arg-type]
    first, second, third = model.predict(given)
    assert (first.id, first.status, first.extra, surfaces(first)) == ("a", "ok", {"page": 3}, {"Dora": "person"})
    assert (second.id, second.status) == ("b", "skipped")
    assert "lone surrogate" in str(second.error)
    assert (third.id, third.status) == ("c", "skipped")
    assert third.error == "record 3: text came as int; give a string"


def test_nothing_is_prepared_for_records_that_need_no_model() -> None:
    model = El4ner.from_config(members=["a=nobody/nothing"])
    assert [p.status for p in model.predict(["", {"text": None}])] == ["ok", "skipped"]  # type: ignore[list-item]
    assert model.report()["records"] == {"ok": 1, "skipped": 1}


def test_records_have_the_same_keys_and_plain_numbers(make: Callable[..., El4ner]) -> None:
    (prediction,) = make({"a": member(["Dora"], GOLD)}).predict(["Dora met Bob."])
    data = prediction.to_dict()
    assert list(data) == ["id", "text", "entities", "status", "error", "usage", "extra"]
    (entity,) = data["entities"]
    assert entity == {
        "start": 0, "end": 4, "text": "Dora", "label": "person", "score": 0.9,
        "votes": {"a": {"person": 0.9, "place": 0.05, "": 0.05}}, "proposed_by": ["a"], "verified": 0.8,
    }  # fmt: skip
    assert all(type(value) is float for value in entity["votes"]["a"].values())


def test_one_string_is_no_list_of_texts(make: Callable[..., El4ner]) -> None:
    model = make({"a": member()})
    for wrong in ("Dora met Bob.", {"text": "Dora"}, Sentence("1", "Dora"), b"Dora"):
        with pytest.raises(UsageError, match=r"write predict\(\[text\]\)"):
            model.predict(wrong)  # type: ignore[arg-type]


def test_what_is_no_list_of_texts_at_all(make: Callable[..., El4ner]) -> None:
    with pytest.raises(UsageError, match=r"^texts is int; give a list of texts"):
        make({"a": member()}).predict(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variable", "value"), [("EL4NER_BACKEND", "fast"), ("EL4NER_ISA", "mmx"), ("EL4NER_THREADS", "-1")]
)
def test_what_kernels_would_refuse_is_a_usage_error_before_models_load(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable == "EL4NER_ISA" and available_backends("vote")["native"] is not None:
        pytest.skip("no compiler built _native")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=f"^{variable}={value}; "):
        El4ner.from_config(members=["a=nobody/nothing"], encoder="nobody/nothing").prepare()


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
    model = make({"a": member(list(GOLD), GOLD)})
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

    predictions = make({"a": member(["Bob"], GOLD)}, batch_size=2).predict_iter(texts())
    assert next(predictions).text == "Bob 0"
    assert read == [0, 1]
    assert len(list(predictions)) == 9


def test_records_before_an_iterable_that_fails_come_first(make: Callable[..., El4ner]) -> None:
    def texts() -> Any:
        yield from ("Bob 0", "Bob 1", "Bob 2")
        raise OSError("the disk is gone")

    for batch_size in (2, 3, 8):
        predictions = make({"a": member(["Bob"], GOLD)}, batch_size=batch_size).predict_iter(texts())
        assert [next(predictions).text for _ in range(3)] == ["Bob 0", "Bob 1", "Bob 2"]
        with pytest.raises(OSError, match="the disk is gone"):
            next(predictions)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_record_that_fails_does_not_fail_the_others(make: Callable[..., El4ner], batch_size: int) -> None:
    good = member(["Bob", "Lima"], GOLD)

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


def test_what_succeeded_before_another_failed_is_asked_and_counted_once(make: Callable[..., El4ner]) -> None:
    good = member(["Bob", "Lima"], GOLD)

    def generate(request: Generate) -> Completion:
        assert request.grammar is not None
        if "boom" in request.grammar.text:
            raise EngineError("out of memory")
        return good.generate([request])[0]

    engine = ScriptedEngine(generate=generate, choose=lambda request: good.choose([request])[0].tolist())
    engine.prefix_tokens = 2 * 900  # type: ignore[attr-defined]  # two sentences at once
    model = make({"a": engine}, max_prompt_tokens=900)
    found = model.predict(["Bob left.", "Lima is far.", "Bob goes boom."])
    assert [p.status for p in found] == ["ok", "ok", "failed"]
    lists = [r for r in engine.requests if isinstance(r, Generate) and "boom" not in r.prompt[1]]
    assert len(lists) == len({r.prompt for r in lists}) == 2
    report = model.report()
    assert report["tokens"]["prompt"] == sum(p.usage.prompt_tokens for p in found)


def test_what_a_failed_batch_cost_is_not_counted_beside_what_each_alone_costs(make: Callable[..., El4ner]) -> None:
    good = member(["Bob", "Lima"], GOLD)

    def choose(request: Choose) -> list[float]:
        if "boom" in request.prompt[1]:
            raise EngineError("out of memory")
        return good.choose([request])[0].tolist()

    engine = ScriptedEngine(generate=lambda request: good.generate([request])[0], choose=choose)
    model = make({"a": engine})
    found = model.predict(["Bob left.", "Lima is far.", "Bob goes boom."])
    assert [p.status for p in found] == ["ok", "ok", "failed"]
    report = model.report()
    assert report["replies"]["a: replies"] == 2
    spent = [own["prompt"] for stage in report["tokens by stage"].values() for own in stage.values()]
    assert sum(spent) == report["tokens"]["prompt"] > 0


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("kind", "message"), [(RuntimeError, "shape\nmismatch"), (ValueError, ""), (IndexError, "5")])
def test_errors_of_libraries_fail_their_record_and_are_named(
    make: Callable[..., El4ner], monkeypatch: pytest.MonkeyPatch, batch_size: int, kind: type[Exception], message: str
) -> None:
    good = member(["Bob", "Lima"], GOLD)
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
        whole = member(["Bob"], GOLD)
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


def test_a_question_about_spans_that_is_too_long_is_said(make: Callable[..., El4ner]) -> None:
    whole = member(["Bob"], GOLD)
    small = ScriptedEngine(choose=lambda request: whole.choose([request])[0].tolist(), max_tokens=300)
    long = "Bob left. " + "Nothing more was seen of him. " * 80
    # who lists nothing is first asked when spans are labelled
    model = make({"a": small}, extract={"members": False, "noun_phrases": True})
    (short, cut) = model.predict(["Bob left.", long])
    assert (short.status, surfaces(short)) == ("ok", {"Bob": "person"})
    question = "a could not read this text with the question about its spans"
    assert (cut.status, cut.error, cut.entities) == ("truncated", f"{question}: too long", ())
    # and who votes nowhere, when they are judged
    settings: dict[str, Any] = {"voters": ["b"], "verify": {"member": "a"}, "max_prompt_tokens": 4000}
    (kept,) = make({"a": small, "b": whole}, **settings).predict([long])
    assert (kept.status, kept.error) == ("truncated", f"{question}: too long; other voters did")
    assert [(e.text, e.verified) for e in kept.entities] == [("Bob", None)]


def test_a_text_of_many_spans_is_not_dropped_in_silence_by_the_paper_preset(make: Callable[..., El4ner]) -> None:
    names = [f"Bob{i}" for i in range(20)]
    listed, typed = "".join(f"{name}[SEP]" for name in names), "[SEP]".join(f"{name} -> person" for name in names)
    for max_tokens, status in ((500, "truncated"), (4096, "ok")):
        replies = paper_member(f"[CLS]{listed}", typed, dict.fromkeys(names, "true"))
        engine = ScriptedEngine(generate=lambda r, own=replies: own.generate([r])[0], max_tokens=max_tokens)
        (found,) = paper(make, {"a": engine}).predict([" and ".join(names)])
        assert (found.status, len(found.entities)) == (status, 20 if status == "ok" else 0)
    written = paper_member("[CLS]Bob[SEP]", "Bob -> person", {})
    engine = ScriptedEngine(generate=lambda request: written.generate([request])[0], max_tokens=60)
    judged = make({"a": member(["Bob"], GOLD), "b": engine}, voters=["a"], verify={"by": "generation", "member": "b"})
    (found,) = judged.predict(["Bob left, and nobody has heard of him since that day. " * 3])
    assert (found.status, found.entities) == ("truncated", ())
    assert str(found.error).startswith("b could not read this text with the question about its spans: too long")


def test_who_read_how_much_is_said_in_one_line() -> None:
    text = "x" * 50
    assert _shortfall(text, None, ["reading"]) is None
    assert _shortfall(text, {"reading": 20}, ["reading"]) == "reading read only the first 20 of 50 characters: too long"
    assert _shortfall(text, {"reading": 20, "a": 0, "b": 0}, ["reading", "retrieval", "a", "b"], (), ["reading"]) == (
        "reading read only the first 20 of 50 characters and a, b could not read this text: too long; "
        "of the rest, other voters judge what members and strings known from the pool propose"
    )
    assert _shortfall(text, {"a": 0}, ["a", "b"], ["b", "a", "b"]) == (
        "a could not read this text and b could not read this text with the question about its spans: too long"
    )


def test_the_order_of_the_pool_does_not_matter(make: Callable[..., El4ner]) -> None:
    texts = ["Dora met Bob.", "Nobody saw Lima or Oslo."]
    everyone = {"members": True}
    results = []
    for sentences in (POOL.sentences, POOL.sentences[::-1]):
        pool = Pool(sentences, LABELS)
        model = make({"a": member(["Lima"], GOLD, 0.5)}, pool, extract=everyone, voters="all")
        results.append([p.to_dict() for p in model.predict(texts)])
    assert results[0] == results[1]
    assert any(entity["votes"].keys() == {"a", "retrieval"} for p in results[0] for entity in p["entities"])


def test_a_small_pool_counts_everybody_alike_and_says_so(make: Callable[..., El4ner]) -> None:
    model = make({"a": member(["Oslo"], GOLD)}, voters="auto")
    (prediction,) = model.predict(["Oslo is cold."])
    (entity,) = prediction.entities
    assert entity.score == pytest.approx(np.mean([entity.votes[voter]["place"] for voter in ("a", "retrieval")]))
    report = model.report()
    assert report["asked"] == ["a", "retrieval"]
    assert report["stack"] is None
    assert report["fitted"]["calibrated"] is False
    unfitted = "4 pool sentences: nothing was fitted, voters count alike, scores are uncalibrated"
    assert report["notes"] == [unfitted]
    named = make({"a": member(["Oslo"], GOLD)}, voters=["reading", "a"])
    named.prepare()
    unasked = "the reading voter is named, but not asked: there is none without a fit"
    assert (named.report()["asked"], named.report()["notes"]) == (["a"], [unasked, unfitted])


def test_labels_without_examples_are_zero_shot(make: Callable[..., El4ner]) -> None:
    engine = member(["Bob"], GOLD)
    model = make({"a": engine}, Pool((), LABELS), voters="auto")
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
    good = member(["Bob"], GOLD)

    def generate(request: Generate) -> Completion:
        clock[0] += 1.0
        return good.generate([request])[0]

    engine = ScriptedEngine(generate=generate, choose=lambda request: good.choose([request])[0].tolist())
    model = make({"a": engine}, batch_size=2)
    for _ in model.predict_iter(["Bob left.", "Bob came.", "Bob went."]):
        clock[0] += 100.0
    assert model.report()["seconds"]["prediction"] == 3.0


def test_the_preparation_says_what_it_is_about(make: Callable[..., El4ner]) -> None:
    model = make({"a": member()}, large_pool(), voters=["retrieval"], extract={"reading": False})
    told: list[str] = []
    model.progress = told.append
    model.predict(["Dora left."])
    assert "retrieval: encoding the pool's strings" in told


def test_nobody_to_ask_is_a_usage_error(make: Callable[..., El4ner]) -> None:
    model = make({"a": member()}, voters="reading")
    with pytest.raises(
        ConfigError,
        match=r"nobody to ask: the reading, tagging and probing voters need 20 and classify\.combine: stack",
    ):
        model.predict(["Bob"])
    with pytest.raises(ConfigError, match="no labels"):
        make({"a": member()}, Pool((), ())).predict(["Bob"])
    same = Pool(tuple(demonstration("Bob is here", {"Bob": "person"}) for _ in range(25)), POOL.labels)
    with pytest.raises(ConfigError, match=r"^voters=reading with 25 pool sentences, all in one fold leaves nobody"):
        make({"a": member()}, same, voters=["reading"]).predict(["Bob"])
    # a pool that is large enough, and a member whose states cannot be read
    with pytest.raises(ConfigError, match=r"^voters=reading leaves nobody to ask: no model among the members"):
        make({"a": member()}, large_pool(), voters=["reading"], extract={"reading": False}).predict(["Bob"])


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
    # in each of the two sentences what "wild" says of the types is none, and "maybe" no verdict
    assert (replies["wild: malformed labels"], replies["good: malformed labels"]) == (2, 0)
    assert replies["good: malformed verdicts"] == 2


def test_lists_that_were_cut_off_are_counted(make: Callable[..., El4ner]) -> None:
    cut = ScriptedEngine(
        generate=lambda request: Completion("Ada; Bo", 5, 2, truncated=True),
        choose=lambda request: [0.0] * len(request.choices),
    )
    model = make({"a": cut})
    model.predict(["Ada met Bob."])
    assert model.report()["replies"]["a: cut off at the token limit"] == 1


def test_what_is_no_config_is_said() -> None:
    for wrong in ({}, None, "settings.yaml"):
        with pytest.raises(ConfigError, match=r"write El4ner\.from_config"):
            El4ner(wrong)  # type: ignore[arg-type]


def test_paths_may_be_paths(tmp_path: Path) -> None:
    assert El4ner.from_config(examples=tmp_path / "pool.jsonl").config.examples == str(tmp_path / "pool.jsonl")


@pytest.mark.parametrize(("value", "raised"), [("1", True), ("0", False), ("", False)])
def test_debugging_is_on_or_off(
    make: Callable[..., El4ner], monkeypatch: pytest.MonkeyPatch, value: str, raised: bool
) -> None:
    def broken(request: Generate) -> Completion:
        raise RuntimeError("shape mismatch")

    monkeypatch.setenv("EL4NER_DEBUG", value)
    model = make({"a": ScriptedEngine(generate=broken, choose=lambda _: [0.0])})
    if raised:
        with pytest.raises(RuntimeError, match="shape mismatch"):
            model.predict(["Bob left."])
    else:
        assert model.predict(["Bob left."])[0].status == "failed"
