"""The baselines: what they ask, what they make of replies, which demonstrations they show; scripted, then for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from el4ner.bench.baseline_deer import TokenStatistics
from el4ner.bench.baseline_prompts import (
    align_pairs,
    judging_prompt,
    mark,
    marking_prompt,
    one_prompt,
    read_entities,
    read_marks,
    write_entities,
)
from el4ner.bench.mention_index import MentionIndex
from el4ner.bench.system import Found, Workbench, prediction_of
from el4ner.bench.systems import make_system
from el4ner.bench.tagger import outermost, tag_names, word_tags
from el4ner.config import make_config
from el4ner.engines.base import Choose, Generate, TokenStates
from el4ner.engines.scripted import ScriptedEngine
from el4ner.pool import Pool, labels_of
from el4ner.records import Demonstration, Label, LabelledSpan, Prediction, Sentence, Span
from el4ner.text import words

LABELS = (Label("creative-work"), Label("person", "A human being."), Label("place"))


def labelled(text: str, *entities: tuple[str, str], name: str = "") -> Demonstration:
    spans = tuple(LabelledSpan(text.index(s), text.index(s) + len(s), label) for s, label in entities)
    return Demonstration(name or text[:8], text, spans)


SENTENCES = (
    labelled("Ada Lovelace lives in London", ("Ada Lovelace", "person"), ("London", "place")),
    labelled("Paris is far from Rome", ("Paris", "place"), ("Rome", "place")),
    labelled("nobody came to town"),
    labelled("we saw Dune in Paris", ("Dune", "creative-work"), ("Paris", "place")),
)
POOL = Pool(SENTENCES, LABELS, 2)
TEXT = Sentence("1", "Ada Lovelace saw Rome")


# Prompts and replies

PAIRS = [("Ada; (Lady)", "person"), ("None", "creative-work"), ("a->b | c: d", "place")]


@pytest.mark.parametrize("wording", ["pairs", "arrows", "types"])
def test_what_is_written_is_read_again(wording: Any) -> None:
    assert sorted(read_entities(write_entities(PAIRS, wording), LABELS, wording, truncated=False)) == sorted(PAIRS)
    assert read_entities(write_entities([], wording), LABELS, wording, truncated=False) == []


def test_broken_replies_are_read_as_far_as_they_go() -> None:
    reply = " Ada (Person); Rome (planet); ; Paris; Oslo (place); Bern (pla\nText: more (place)"
    assert read_entities(reply, LABELS, "pairs", truncated=True) == [("Ada", "person"), ("Oslo", "place")]
    assert read_entities("x -> Creative Work; y ->", LABELS, "arrows", truncated=False) == [("x", "creative-work")]
    assert read_entities("person: Ada; Bob | : c | place", LABELS, "types", truncated=False) == [
        ("Ada", "person"), ("Bob", "person"),
    ]  # fmt: skip
    for junk in ("", "()", ";;;", "none.", "|:|"):
        for wording in ("pairs", "arrows", "types"):
            assert read_entities(junk, LABELS, wording, truncated=False) == []  # type: ignore[arg-type]


def test_a_surface_has_one_label_and_all_its_places() -> None:
    found = align_pairs(Sentence("1", "Rome, rome, Rome"), [("Rome", "place"), ("Rome", "person"), ("Oslo", "place")])
    assert found == [Found(Span(0, 4), "place"), Found(Span(12, 16), "place")]


def test_prompts_show_the_nearest_last() -> None:
    prompt = "".join(one_prompt("A new\ntext", SENTENCES[:2], LABELS, "pairs"))
    assert prompt.index("Paris is far") < prompt.index("Ada Lovelace (person); London (place)")
    assert prompt.endswith("Text: A new\\ntext\nEntities:")
    assert "- person: A human being." in prompt
    assert "Text:" not in "".join(one_prompt("", (), LABELS, "pairs")[:2])


def test_marks_are_read_where_they_stand() -> None:
    assert mark(SENTENCES[1], "place") == "@@Paris## is far from @@Rome##"
    assert mark(SENTENCES[1], "person") == "Paris is far from Rome"
    nested = labelled("the Bank of Rome", ("Bank of Rome", "place"), ("Rome", "place"))
    assert mark(nested, "place") == "the @@Bank of Rome##"
    twice = Sentence("1", "Rome is Rome")
    assert read_marks(twice, "Rome is @@Rome##") == [Span(8, 12)]
    assert read_marks(twice, "I think @@Rome## is big") == [Span(0, 4), Span(8, 12)]
    assert read_marks(twice, "@@Oslo## @@## Rome@@ ##") == []
    prompt = marking_prompt("x", SENTENCES[:1], LABELS[1])
    assert "person entities (A human being.)" in prompt[0]
    asked = "".join(judging_prompt("Rome burns", Span(0, 4), LABELS[2], [(SENTENCES[0], Span(0, 12), False)]))
    assert '"Ada Lovelace" in the sentence a place entity?\nAnswer: no\n\n' in asked
    assert asked.endswith('"Rome" in the sentence a place entity?\nAnswer:')


def test_flat_output_keeps_the_best_of_what_overlaps() -> None:
    found = [Found(Span(0, 3), "place", 0.4), Found(Span(0, 12), "person", 0.4), Found(Span(4, 12), "place", 0.3),
             Found(Span(17, 21), "place", 0.1), Found(Span(17, 21), "place", 0.2)]  # fmt: skip
    flat = prediction_of(TEXT, found, "flat", "x").entities
    assert [(e.text, e.label, e.score) for e in flat] == [("Ada Lovelace", "person", 0.4), ("Rome", "place", 0.2)]
    assert len(prediction_of(TEXT, found, "nested", "x").entities) == 4


# Systems, scripted


class WordEncoder:
    """Encodes a text as counts of letters: deterministic, and alike for like words."""

    source = "letters"
    n_layers = 2

    def encode(self, texts: Any) -> np.ndarray:
        rows = np.array([[text.casefold().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
        rows = rows.reshape(len(texts), 26).astype(np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

    def read(self, texts: Any, layers: Any) -> list[TokenStates]:
        found = []
        for text in texts:
            units = words(text)
            states = self.encode([text[u.start : u.end] for u in units])
            found.append(TokenStates(np.array(units, dtype=np.int64).reshape(-1, 2), dict.fromkeys(layers, states)))
        return found


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path / "cache"))
    made = Workbench(make_config({"device": "cpu"}), 2, 0)
    made._encoder = WordEncoder()
    return made


def asking(bench: Workbench, name: str, engine: ScriptedEngine, **options: Any) -> Any:
    bench._engines = {bench.config.members[0].source: engine}
    system = make_system(name, bench, {}, {name: options})
    system.load()
    system.prepare(POOL, lambda _: None)
    return system


def found_by(predictions: list[Prediction]) -> list[list[tuple[str, str]]]:
    return [[(e.text, e.label) for e in p.entities] for p in predictions]


def test_zero_shot_shows_nothing_and_kate_the_nearest(bench: Workbench) -> None:
    engine = ScriptedEngine(generate=lambda request: " Ada Lovelace (person); Rome (place)")
    zero = asking(bench, "zero-shot", engine)
    assert found_by(zero.predict([TEXT])) == [[("Ada Lovelace", "person"), ("Rome", "place")]]
    assert "London" not in "".join(engine.requests[0].prompt)
    kate = asking(bench, "kate", engine)
    predicted = kate.predict([TEXT, Sentence("2", "")])
    assert found_by(predicted) == [[("Ada Lovelace", "person"), ("Rome", "place")], []]
    assert predicted[0].usage.prompt_tokens > 0
    shown = "".join(engine.requests[1].prompt)
    assert shown.count("Text:") == 3  # two demonstrations and the question
    assert shown.index("Ada Lovelace lives") > shown.index("Text:")
    assert kate.demonstrations([TEXT])[0][0].text == "Ada Lovelace lives in London"
    bench.k = 4
    only = asking(bench, "kate", engine, only_with_entities=True)
    assert len(only.demonstrations([TEXT])[0]) == 3
    assert only.settings["k"] == 4


def test_what_does_not_fit_is_said(bench: Workbench) -> None:
    engine = ScriptedEngine(generate=lambda request: "none", max_tokens=200)
    kate = asking(bench, "kate", engine, max_new_tokens=150)  # room for 50 words: demonstrations are dropped first
    assert kate.predict([TEXT])[0].status == "ok"
    long = Sentence("1", "word " * 100)
    assert (kate.predict([long])[0].status, len(engine.requests)) == ("truncated", 1)


def test_gpt_ner_asks_every_label_and_verifies(bench: Workbench) -> None:
    def write(request: Generate) -> str:
        head = request.prompt[0]
        if "label place entities" in head:
            return "Ada Lovelace saw @@Rome##"
        return "@@Ada Lovelace## @@saw## Rome" if "label person entities" in head else TEXT.text

    def judge(request: Choose) -> list[float]:
        return [-3.0, -0.05] if '"saw"' in request.prompt[-1] else [-0.05, -3.0]

    engine = ScriptedEngine(generate=write, choose=judge)
    system = asking(bench, "gpt-ner", engine)
    predicted = system.predict([TEXT])
    assert found_by(predicted) == [[("Ada Lovelace", "person"), ("Rome", "place")]]
    assert predicted[0].entities[0].score == pytest.approx(np.exp(-0.05))
    asked = [r for r in engine.requests if isinstance(r, Generate)]
    assert len(asked) == 3
    place = next(r for r in asked if "label place" in r.prompt[0])
    assert place.prompt[1].count("Input:") == 2
    judged = [r for r in engine.requests if isinstance(r, Choose)]
    assert all(r.prompt[1].count("Answer: yes") == r.prompt[1].count("Answer: no") == 1 for r in judged)
    loose = asking(bench, "gpt-ner", engine, verify=False, positives=1.0)
    assert ("saw", "person") in found_by(loose.predict([TEXT]))[0]
    tight = asking(bench, "gpt-ner", ScriptedEngine(generate=write, choose=judge, max_tokens=40))
    assert tight.predict([TEXT])[0].status == "truncated"


def test_the_index_finds_entities_of_a_label(bench: Workbench) -> None:
    index = MentionIndex(POOL, bench.encoder)
    (vector,) = index.vectors([Sentence("1", "Paris")], [[Span(0, 5)]])
    cosines = index.cosines(vector)
    texts = [POOL.sentences[m.sentence].text[slice(*m.span)] for m in index.nearest(cosines, 2, "place", having=True)]
    assert texts == ["Paris", "Paris"]
    assert {m.label for m in index.nearest(cosines, 9, "place", having=False)} == {"person", "creative-work"}
    (only,) = index.sentences(cosines, 9, "person")
    assert POOL.sentences[only].text == "Ada Lovelace lives in London"
    assert index.sentences(index.cosines(vector[:0]), 1) in ([0], [1], [2], [3])
    again = MentionIndex(POOL, bench.encoder)  # from the cache
    assert np.array_equal(again.cosines(vector), cosines)


def test_deer_counts_words_and_asks_twice_about_the_doubtful(bench: Workbench) -> None:
    statistics = TokenStatistics(SENTENCES, 1)
    assert statistics.share("paris", "entity") == 1.0
    assert statistics.share("in", "context") == 1.0
    assert statistics.share("came", "other") == 1.0
    assert statistics.share("unknown", "entity") is None

    def choose(request: Choose) -> list[float]:
        right = {'"Rome"': 2, '"Zoe"': 1}
        wanted = next((i for surface, i in right.items() if surface in request.prompt[-1]), 3)
        return [0.0 if i == wanted else -9.0 for i in range(4)]

    engine = ScriptedEngine(generate=lambda request: " came (place)", choose=choose)
    system = asking(bench, "deer", engine)
    assert system.weight("Paris") > system.weight("in") > system.weight("came")
    predicted = system.predict([Sentence("1", "Zoe came to Rome")])
    # "came" is never an entity in the pool: asked about again, and dropped; "Rome" always is, "Zoe" may be
    assert found_by(predicted) == [[("Zoe", "person"), ("Rome", "place")]]
    plain = asking(bench, "deer", engine, reflect=False)
    assert found_by(plain.predict([Sentence("1", "Zoe came to Rome")])) == [[("came", "place")]]
    assert "Paris is far from Rome" in {d.text for d in system.demonstrations([Sentence("1", "Rome")])[0]}


# Tags


def test_words_are_tagged_with_the_outermost_entities() -> None:
    text = "the Bank of Rome-West"
    nested = labelled(text, ("Bank of Rome", "place"), ("Rome", "place"), ("West", "person"))
    assert [text[e.start : e.end] for e in outermost(nested)] == ["Bank of Rome", "West"]
    assert word_tags(nested, words(text)) == ["O", "B-place", "I-place", "I-place", "O", "B-person"]
    assert tag_names(["a", "b"]) == ("O", "B-a", "I-a", "B-b", "I-b")


@pytest.mark.embedded
def test_each_baseline_runs_on_the_embedded_models() -> None:
    """Two sentences each; whatever such a small model finds, records are whole and everything is counted."""
    made = Workbench(make_config({"device": "cpu", "dtype": "float32"}), 1, 0)
    pool = Pool(SENTENCES[:2], labels_of(SENTENCES[:2]), 2)
    sentences = [TEXT, Sentence("2", "It rains in Paris")]
    for name, options in (
        ("zero-shot", {"max_new_tokens": 12}),
        ("kate", {"max_new_tokens": 12}),
        ("deer", {"max_new_tokens": 12}),
        ("gpt-ner", {}),
    ):
        system = make_system(name, made, {}, {name: options})
        system.load()
        system.prepare(pool, lambda _: None)
        predicted = system.predict(sentences)
        assert [(p.id, p.status) for p in predicted] == [("1", "ok"), ("2", "ok")]
        assert all(p.usage.prompt_tokens > 0 and p.usage.generated_tokens > 0 for p in predicted)
        assert {e.label for p in predicted for e in p.entities} <= {"person", "place"}
        used = {"embedded:smollm2"} | ({"embedded:minilm"} if name != "zero-shot" else set())
        assert set(system.models()) == used
        assert system.parameters() == 134_515_008 + (22_713_216 if name != "zero-shot" else 0)
        if name == "kate":  # so small a model copies the demonstration's strings, though not always their types
            (copied,) = system.predict([Sentence("3", "Paris is far from Rome")])
            assert [e.text for e in copied.entities] == ["Paris", "Rome"]
