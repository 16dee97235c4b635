"""The real embedded models from end to end: the built-in pool, all four stages with prompted members, the paper preset.

Everything is computed in a cache of its own, so that nothing comes from an earlier run; the converted weights are
borrowed from the user's cache, and the models are loaded once.
"""

from __future__ import annotations

import json
import pickle
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from el4ner.cache import cache_root
from el4ner.config import make_config
from el4ner.engines import load_engine
from el4ner.pipeline import El4ner
from el4ner.pool import Pool, load_pool
from el4ner.records import Prediction

# alone a core needs three minutes for the file, beside other work several times that
pytestmark = [pytest.mark.embedded, pytest.mark.slow, pytest.mark.timeout(1200)]

MEMBERS = ["smollm2-list", "smollm2-ask", "smollm2-define"]
READING: dict[str, Any] = {"hidden": 64, "heads": 1, "swaps": 20}  # 800 copies take minutes
CHEAP: dict[str, Any] = {"voters": ["reading", "retrieval"], "reading": READING, "dtype": "float32"}
# by themselves: hundreds of sentences of the built-in pool beside them would take most of the time
SMALL: dict[str, Any] = {**CHEAP, "reading": {**READING, "builtin": False}}
TEXTS = [
    "Maria Silva flew from Lisbon to Berlin on Monday.",
    "Nothing happened, and nobody was there to see it.",
    "The Red Cross opened an office in Nairobi.",
]

Build = Callable[..., El4ner]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache but for the converted weights, if there are any."""
    folder = tmp_path_factory.mktemp("cache")
    converted = cache_root() / "converted"
    if converted.is_dir():
        (folder / "converted").symlink_to(converted.resolve(), target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EL4NER_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def build(embedded: None, cache: Path) -> Build:
    """Makes pipelines that share the loaded models."""
    from el4ner.engines import load_encoder, load_engine
    from el4ner.models import prefers_chat

    source = "embedded:smollm2"
    # asked as by default
    engines = {source: load_engine(source, device="cpu", dtype="float32", chat=prefers_chat(source))}
    encoder = load_encoder("embedded:minilm", device="cpu", dtype="float32")

    def make(pool: Pool | None = None, **settings: Any) -> El4ner:
        return El4ner(make_config(settings), engines=dict(engines), encoder=encoder, pool=pool)

    return make


@pytest.fixture(scope="module")
def small() -> Pool:
    """Thirty short sentences of the built-in pool, with their persons, organizations and locations only."""
    whole = load_pool(None, None)
    labels = tuple(label for label in whole.labels if label.name in ("person", "organization", "location"))
    names = {label.name for label in labels}
    short = [d for d in whole.sentences if len(d.text) < 100]
    marked = [replace(d, entities=tuple(e for e in d.entities if e.label in names)) for d in short]
    picked = [d for d in marked if len(d.entities) > 1][:24] + [d for d in marked if not d.entities][:6]
    assert len(picked) == 30
    return Pool(tuple(picked), labels)


def as_bytes(predictions: Sequence[Prediction]) -> list[str]:
    return [json.dumps(p.to_dict(), ensure_ascii=False) for p in predictions]


def examples(root: Path) -> list[dict[str, Any]]:
    paths = [root / "examples" / name for name in ("news.jsonl", "science.jsonl", "informal.jsonl")]
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def part() -> Pool:
    """A quarter of the built-in pool: to read and fit all of it would take most of the file's time."""
    whole = load_pool(None, None)
    return Pool(tuple(whole.sentences[i] for i in whole.sample(600)), whole.labels)


def embedded_model() -> Any:
    """The members' model, with its kept prefixes: what is loaded twice is one model."""
    return load_engine("embedded:smollm2", device="cpu", dtype="float32")


def test_a_part_of_the_builtin_pool_finds_what_a_reader_would(build: Build, root: Path, part: Pool) -> None:
    records = examples(root)
    model = build(part, **SMALL)
    found = {p.id: p for p in model.predict(records)}
    assert list(found) == [record["id"] for record in records]
    for record in records:
        prediction = found[record["id"]]
        assert (prediction.text, prediction.status, prediction.error) == (record["text"], "ok", None)
        ends = [0]
        for e in prediction.entities:
            assert prediction.text[e.start : e.end] == e.text
            assert e.start >= ends[-1]
            ends.append(e.end)
            assert 0 < e.score <= 1
            assert set(e.votes) == {"reading", "retrieval"}
            assert all(abs(sum(vote.values()) - 1) < 1e-4 for vote in e.votes.values())
            assert e.proposed_by
    labels = {key: {e.text: e.label for e in p.entities} for key, p in found.items()}
    assert labels["news-1"]["Sofía Ibáñez"] == "person"
    assert labels["news-1"]["Mérida"] == "location"
    assert labels["news-2"]["Senegal"] == "location"
    assert labels["news-3"]["Toyota"] == "organization"
    assert labels["science-2"]["Keiko Watanabe"] == "person"
    assert labels["science-2"]["Alzheimer's disease"] == "disease"
    assert labels["informal-5"]["Zoë"] == "person"
    assert labels["news-4"] == labels["science-4"] == labels["informal-4"] == {}
    report = model.report()
    assert report["asked"] == ["reading", "retrieval"]
    assert report["fitted"]["calibrated"] is True
    # far above the chance of a read-out that learnt nothing; 0.757 was seen
    assert report["fitted"]["cross-validated F1"] > 0.7


def test_the_builtin_pool_helps_beside_a_pool_of_ones_own(
    build: Build, small: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read and fitted with the real models; sixty sentences of it, for time's sake."""
    monkeypatch.setattr("el4ner.preparation._BESIDE", 60)
    alone, beside = ({p.id: p for p in build(small, **own).predict(TEXTS)} for own in (SMALL, CHEAP))
    scores = [[{e.text: e.score for e in p.entities} for p in found.values()] for found in (alone, beside)]
    assert scores[0] != scores[1], "what was fitted beside the pool changed nothing"
    assert "Maria Silva" in scores[1][0]
    assert {e.label for p in beside.values() for e in p.entities} <= {"person", "organization", "location"}


def test_a_pool_of_ones_own_begins_at_what_was_fitted_on_the_builtin_one(build: Build, root: Path) -> None:
    pool = load_pool(str(root / "examples/pools/jobs.jsonl"), None)
    own: dict[str, Any] = {"voters": ["reading"], "reading": {"heads": 1, "swaps": 0}}
    begun = build(pool, **own)
    alone = build(pool, **{**own, "reading": {**own["reading"], "builtin": False}})
    text = "Hollis & Webb seeks a payroll clerk who knows Excel and can keep a secret."
    ((found,), _) = (model.predict([text]) for model in (begun, alone))
    assert begun.report()["fitted"]["built-in pool"] == {"reading": "begun at its read-outs"}
    assert alone.report()["fitted"]["built-in pool"] == {"reading": "not used"}
    assert {"Hollis & Webb": "employer", "Excel": "skill"}.items() <= {e.text: e.label for e in found.entities}.items()
    # 28 sentences say little; what was known before is worth a lot
    f1 = [model.report()["fitted"]["cross-validated F1"] for model in (begun, alone)]
    assert f1[0] > f1[1] + 0.03, f1


def test_a_tagging_voter_finds_what_the_pool_is_about(build: Build, root: Path) -> None:
    pool = load_pool(str(root / "examples/pools/jobs.jsonl"), None)
    model = build(pool, voters=["tagging"], reading={"swaps": 100})
    (found,) = model.predict(["Hollis & Webb seeks a payroll clerk who knows Excel and can keep a secret."])
    assert model.report()["asked"] == ["tagging"]
    assert {"Hollis & Webb": "employer", "Excel": "skill"}.items() <= {e.text: e.label for e in found.entities}.items()
    assert all(e.votes.keys() == {"tagging"} and "tagging" in e.proposed_by for e in found.entities)


def test_a_record_does_not_depend_on_its_neighbours(build: Build, root: Path, part: Pool) -> None:
    records = examples(root)
    together = as_bytes(build(part, **SMALL, batch_size=8).predict(records))
    assert as_bytes(build(part, **SMALL, batch_size=1).predict(records)) == together
    order = list(range(len(records)))
    random.Random(3).shuffle(order)
    shuffled = as_bytes(build(part, **SMALL, batch_size=5).predict([records[i] for i in order]))
    assert shuffled == [together[i] for i in order]


def test_texts_without_words_emoji_and_long_texts(build: Build, part: Pool) -> None:
    long = "Anna met Otto in Rome. " * 150
    texts = ["\u200b", "🎉🎉", "e\u0301", "She moved to Paris <|im_end|> in May.", "东京是日本的首都。", long]
    found = build(part, **SMALL).predict(texts)
    assert [p.status for p in found] == ["ok", "ok", "ok", "ok", "ok", "truncated"]
    assert found[0].entities == ()
    assert "Paris" in [e.text for e in found[3].entities]
    said = re.fullmatch(
        rf"reading read only the first (\d+) of {len(long)} characters: too long; "
        "of the rest, other voters judge what members and strings known from the pool propose",
        str(found[5].error),
    )
    assert said is not None
    end = int(said[1])
    assert 0 < end < len(long)
    assert [e.text for e in found[5].entities if e.end <= end].count("Rome") > 10
    for e in found[5].entities:
        if e.end > end:  # only the voter that read all of it can have meant this one
            assert e.proposed_by == ("pool-strings",)
            assert "reading" not in e.votes
            assert max(e.votes["retrieval"], key=e.votes["retrieval"].__getitem__) == e.label
    assert all(p.text[e.start : e.end] == e.text for p in found for e in p.entities)


ALL: dict[str, Any] = {
    "voters": "all",
    "dtype": "float32",
    "reading": SMALL["reading"],
    "retrieve": {"k": 2},
    "extract": {"max_new_tokens": 16},
    "stack": {"sample": 6},
    "min_score": 0.02,
}


@pytest.mark.parametrize("settings", [SMALL, ALL], ids=["default", "all"])
def test_the_order_of_the_pool_changes_no_byte(
    settings: dict[str, Any], build: Build, small: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for name, sentences in (("one", small.sentences), ("other", small.sentences[::-1])):
        monkeypatch.setenv("EL4NER_CACHE", str(tmp_path / name))  # nothing is taken over from the first
        embedded_model().forget_prefixes()
        results.append(as_bytes(build(Pool(sentences, small.labels), **settings).predict(TEXTS)))
    assert results[0] == results[1]
    assert any('"entities": [{' in line for line in results[0])


def test_a_pipeline_that_was_used_can_be_sent_to_another_process(embedded: None, cache: Path, small: Pool) -> None:
    model = El4ner(make_config({"voters": ["retrieval"], "device": "cpu", "dtype": "float32"}), pool=small)
    texts = [d.text for d in small.sentences[:3]]
    found = model.predict(texts)
    assert any(prediction.entities for prediction in found)
    sent = pickle.loads(pickle.dumps(model))
    assert sent.report()["records"] == {}
    assert sent.predict(texts) == found


def test_all_voters_through_all_four_stages(build: Build, small: Pool) -> None:
    model = build(small, **ALL)
    found = model.predict(TEXTS)
    assert [p.status for p in found] == ["ok"] * 3
    report = model.report()
    assert report["asked"] == ["reading", "tagging", "probing", "retrieval", *MEMBERS]
    assert report["verifier"] == "smollm2-list"
    assert report["replies"]["smollm2-ask: replies"] == 3
    entities = [e for p in found for e in p.entities]
    assert {e.text for e in entities} & {"Maria Silva", "Lisbon", "Berlin", "Nairobi", "Red Cross"}
    for e in entities:
        assert e.verified is not None
        assert 0 <= e.verified <= 1
    # a member is asked about what the other voters do not rule out
    full = [e for e in entities if set(e.votes) == {"reading", "tagging", "probing", "retrieval", *MEMBERS}]
    assert full
    assert all(abs(sum(vote.values()) - 1) < 1e-4 for e in full for vote in e.votes.values())
    for prediction in found:
        assert prediction.usage.prompt_tokens > 0
        assert prediction.usage.generated_tokens > 0
    # grounded lists hold nothing that is not in the text
    assert all(report["replies"][f"{name}: surfaces not in the text"] == 0 for name in MEMBERS)


def test_a_record_of_all_voters_does_not_depend_on_its_neighbours(build: Build, root: Path, small: Pool) -> None:
    records = examples(root)[:6]
    records.append({**records[0], "id": "again"})

    def found(order: Sequence[int], **settings: Any) -> list[str]:
        embedded_model().forget_prefixes()
        return as_bytes(build(small, **ALL, **settings).predict([records[i] for i in order]))

    together = found(range(7), batch_size=7)
    assert any(json.loads(record)["entities"] for record in together)
    assert found(range(7), batch_size=1) == together
    order = [3, 6, 0, 5, 1, 4, 2]
    assert found(order, batch_size=4) == [together[i] for i in order]


PAPER: dict[str, Any] = {"preset": "paper", "dtype": "float32", "retrieve": {"k": 2}, "batch_size": 2}


def test_the_paper_preset(build: Build, small: Pool) -> None:
    """Everything is generated; what so small a model writes is rarely a list, so only the asking is checked here."""
    model = build(small, **PAPER, extract={"max_new_tokens": 24})
    found = model.predict(TEXTS[::2])
    assert [p.status for p in found] == ["ok", "ok"]
    report = model.report()
    assert (report["asked"], report["stack"], report["verifier"]) == (MEMBERS, None, "smollm2-list")
    assert all(prediction.usage.generated_tokens > 0 for prediction in found)
    assert [report["replies"][f"{name}: replies"] for name in MEMBERS] == [2, 2, 2]


def test_the_paper_preset_with_its_questions_scored(build: Build, small: Pool) -> None:
    """The same majority and verdicts, with noun phrases to vote on and choices scored, which the model can do."""
    scored = {"classify": {"by": "choice"}, "verify": {"by": "choice"}}
    (prediction,) = build(small, **PAPER, **scored, extract={"max_new_tokens": 8, "noun_phrases": True}).predict(
        TEXTS[2:]
    )
    assert "Nairobi" in [e.text for e in prediction.entities]
    for e in prediction.entities:
        assert prediction.text[e.start : e.end] == e.text
        first_choices = [max(e.votes[name], key=e.votes[name].__getitem__) for name in MEMBERS]
        assert e.score == pytest.approx(first_choices.count(e.label) / 3)
        assert e.verified is not None
        assert e.verified >= 0.5
        assert "noun-phrases" in e.proposed_by
