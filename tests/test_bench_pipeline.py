"""The plain script answers what the engine answers, and the comparison refuses to time entities that differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from el4ner.bench import pipeline as pipeline_bench
from el4ner.bench.cli import group
from el4ner.bench.pipeline import compare, compare_answers, pipeline_table
from el4ner.bench.plain_pipeline import PlainModel
from el4ner.bench.random_models import bench_engine
from el4ner.engines import Choose, Completion, Engine, Generate, SubstringList
from el4ner.records import Entity, Prediction, Sentence

pytestmark = pytest.mark.usefixtures("embedded")

PROMPTS = [("List.\n", "Ann met Bob in Rome.\n", f'Type of "{who}":') for who in ("Ann", "Rome")]
CHOICES = (" person", " place", " none of these", " none", " pla", " place")


@pytest.fixture(scope="module")
def pair() -> tuple[Any, PlainModel]:
    engine = bench_engine("random:tiny", device="cpu", dtype="float32", chat=False)
    return engine, PlainModel(engine.model, engine.tokenizer, engine.source)


def test_it_is_an_engine_and_answers_alike(pair: tuple[Any, PlainModel]) -> None:
    engine, plain = pair
    assert isinstance(plain, Engine)
    assert (plain.max_tokens, plain.n_layers) == (engine.max_tokens, engine.n_layers)
    assert plain.count_tokens(PROMPTS) == engine.count_tokens(PROMPTS)
    for normalise in ("vocab", "choices"):  # one choice begins another, one comes twice
        requests = [Choose(prompt, CHOICES, normalise) for prompt in PROMPTS]
        for ours, by_hand in zip(engine.choose(requests), plain.choose(requests), strict=True):
            np.testing.assert_allclose(ours, by_hand, atol=1e-4)
    listed = Generate((*PROMPTS[0][:2], "Entities:"), SubstringList("Ann met Bob in Rome."), 6)
    lists = [listed, Generate(PROMPTS[1], None, 4)]
    assert engine.generate(lists) == plain.generate(lists)
    texts = ["Ann in 東京", ""]
    for ours, by_hand in zip(engine.read(texts, [0, 1]), plain.read(texts, [0, 1]), strict=True):
        np.testing.assert_array_equal(ours.offsets, by_hand.offsets)
        np.testing.assert_allclose(ours.states[1], by_hand.states[1], atol=1e-4)


def test_lists_that_go_round_in_circles_end_alike(embedded_engine: Any) -> None:
    plain = PlainModel(embedded_engine.model, embedded_engine.tokenizer, embedded_engine.source)  # without template
    request = Generate(("Joan;" + " Joan;" * 20,), SubstringList("Joan"), 60)
    for engine in (plain, embedded_engine):
        (reply,) = engine.generate([request])
        assert (reply.text.strip(), reply.truncated) == ("Joan; Joan; Joan; Joan", False)
        assert reply.generated_tokens < 12


def _prediction(*entities: Entity) -> Prediction:
    return Prediction("1", "Ann met Bob", entities)


ANN = Entity(0, 3, "Ann", "person", 0.8, {"a": {"person": 0.8, "": 0.2}}, ("a",), None)
BOB = Entity(8, 11, "Bob", "person", 0.3001, {}, ("a",), None)


def test_what_counts_as_the_same() -> None:
    same = compare([_prediction(ANN)], [_prediction(replace(ANN, score=0.801))], 0.3)
    assert (same.entities, same.different) == (1, 0)
    assert same.largest == pytest.approx(0.001)
    assert compare([_prediction(ANN)], [_prediction(replace(ANN, label="place"))], 0.3).different == 2
    assert compare([_prediction(ANN, BOB)], [_prediction(ANN)], 0.3).different == 0  # at the threshold
    assert compare([_prediction(ANN, BOB)], [_prediction(ANN)], 0.1).different == 1
    other = replace(ANN, votes={"a": {"person": 0.5, "": 0.5}})
    assert compare([_prediction(ANN)], [_prediction(other)], 0.3).largest == pytest.approx(0.3)


def test_answers_of_models_are_compared_too() -> None:
    asked, listed = Choose(("a",), (" b", " c")), Generate(("a",))
    one = {asked: np.array([-1.0, -2.0]), listed: Completion("x", 1, 1)}
    assert compare_answers(one, dict(one)) == (0, 0.0)
    assert compare_answers(one, one | {asked: np.array([-1.0, -2.5])}) == (0, 0.5)
    assert compare_answers(one, one | {listed: Completion("y", 1, 1)}) == (1, 0.0)
    assert compare_answers(one, {listed: one[listed]}) == (1, 0.0)


def _folder(tmp_path: Path, root: Path) -> Path:
    lines = (root / "examples" / "pools" / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:6]) + "\n", encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("\n".join(lines[6:8]) + "\n", encoding="utf-8")
    return tmp_path


def test_both_sides_find_the_same_and_are_timed(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _folder(tmp_path, root)
    options = ["pipeline", str(folder), "--sentences", "1", "--blocks", "1", "--members", "a=random:tiny"]
    options += ["--set", "extract.max_new_tokens=6"]
    out = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(group, [*options, "--json", str(out)])
    assert done.exit_code == 0, done.output
    rows = {row["side"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert set(rows) == {"engine", "plain"}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["plain"]["tokens_run"] > rows["engine"]["tokens_run"] > 0
    assert rows["engine"]["asked"] == ["a", "retrieval"]
    assert rows["plain"]["speedup"]["min"] > 0
    assert rows["plain"]["answers"] > 3  # a list, and a question for every candidate
    assert (rows["plain"]["different_replies"], rows["plain"]["answers_difference"] < 1e-4) == (0, True)

    wrong = pipeline_bench.PlainModel.choose
    monkeypatch.setattr(
        pipeline_bench.PlainModel, "choose", lambda self, requests: [row[::-1] for row in wrong(self, requests)]
    )
    settings = {"members": [{"name": "a", "source": "random:tiny"}], "device": "cpu", "dtype": "float32"}
    found = list(
        pipeline_bench.measure_pipeline(
            folder, split="test", count=1, seed=0, settings=settings | {"extract": {"max_new_tokens": 6}}, blocks=1
        )
    )
    assert {row["status"] for row in found} == {"wrong"}
    assert all(row["timing"] is None for row in found)
    assert "nothing was timed" in pipeline_table(found)


class _FakeSide:
    """A side whose model finds `entity` everywhere, answers one request a sentence and counts one token for it."""

    def __init__(self, entity: Entity) -> None:
        self.entity = entity
        self.tokens = 0
        self.parts: list[list[str]] = []
        report = {"threshold": 0.3, "asked": ["a"], "notes": [], "tokens by stage": {}}
        self.model = SimpleNamespace(report=lambda: report)

    def heard(self, sentences: Sequence[Sentence]) -> tuple[list[Prediction], dict[str, dict[Any, Any]]]:
        self.tokens = len(sentences)
        self.parts.append([one.id for one in sentences])
        answers = {Generate((one.text,)): Completion("x", 1, 1) for one in sentences}
        return [_prediction(self.entity) for _ in sentences], {"a": answers}


def _rows_of(engine: _FakeSide, plain: _FakeSide, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    sentences = [Sentence(name, f"text {name}") for name in "abcde"]
    monkeypatch.setattr(pipeline_bench, "sides", lambda *_: {"engine": engine, "plain": plain})
    monkeypatch.setattr(
        pipeline_bench, "_material", lambda *_: (SimpleNamespace(), SimpleNamespace(sentences=()), sentences)
    )
    found = pipeline_bench.measure_pipeline(None, split="test", count=5, seed=0, settings={}, blocks=3, once=True)
    return {row["side"]: row for row in found}


def test_parts_of_the_sentences_are_checked_and_timed_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plain = _FakeSide(ANN), _FakeSide(ANN)
    rows = _rows_of(engine, plain, monkeypatch)
    assert engine.parts == plain.parts == [["a", "b"], ["c", "d"], ["e"]]  # each once
    for row in rows.values():
        assert (row["status"], row["entities"], row["answers"], row["tokens_run"]) == ("ok", 5, 5, 5)
        samples = row["timing"]["samples_s"]
        assert len(samples) == 3
        assert row["sentences_per_s"] == pytest.approx(5 / sum(samples), rel=1e-3)
    speedup = rows["plain"]["speedup"]  # of sides that take microseconds, so it may round to nothing
    assert 0 <= speedup["min"] <= speedup["median"] <= speedup["max"]
    assert "5 sentences" in pipeline_table(list(rows.values()))


def test_parts_that_differ_have_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows_of(_FakeSide(ANN), _FakeSide(replace(ANN, label="place")), monkeypatch)
    assert [(row["status"], row["timing"]) for row in rows.values()] == [("wrong", None)] * 2
