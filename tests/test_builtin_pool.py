"""The labelled sentences, labels and examples that ship with el4ner keep the promises of el4ner/data/README.md."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "el4ner" / "data"
EXAMPLES = ROOT / "examples"
DOMAINS = {"news", "business", "science", "medicine", "sport", "culture", "law", "informal"}
ENTITY_KEYS = {"start", "end", "label", "text"}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_labels(path: Path) -> list[dict[str, Any]]:
    labels = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(labels, list)
    return labels


def check_entities(record: dict[str, Any]) -> None:
    """Offsets hold, spans are trimmed, sorted, free of overlaps, and do not cut a word in two."""
    text, previous_end = record["text"], 0
    for entity in record["entities"]:
        assert set(entity) == ENTITY_KEYS, record["id"]
        start, end = entity["start"], entity["end"]
        assert previous_end <= start < end <= len(text), record["id"]
        surface = text[start:end]
        assert surface == entity["text"] == surface.strip(), record["id"]
        assert not (start and text[start - 1].isalnum() and surface[0].isalnum()), (record["id"], surface)
        assert not (end < len(text) and text[end].isalnum() and surface[-1].isalnum()), (record["id"], surface)
        previous_end = end


def without_entities(record: dict[str, Any]) -> str:
    """The text with a gap for each entity: equal for two sentences made from one template."""
    parts, position = [], 0
    for entity in record["entities"]:
        parts.append(record["text"][position : entity["start"]])
        position = entity["end"]
    parts.append(record["text"][position:])
    return " _ ".join(parts).casefold()


@pytest.fixture(scope="module")
def pool() -> list[dict[str, Any]]:
    return read_jsonl(DATA / "pool.jsonl")


def entities_of(pool: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entity for record in pool for entity in record["entities"]]


def test_counts(pool: list[dict[str, Any]]) -> None:
    assert len(pool) >= 300
    assert len(entities_of(pool)) >= 900
    assert sum(not record["entities"] for record in pool) >= 0.2 * len(pool)


def test_records_are_well_formed(pool: list[dict[str, Any]]) -> None:
    for record in pool:
        assert set(record) == {"id", "text", "entities", "domain"}
        assert record["text"] == record["text"].strip()
        assert "\n" not in record["text"]
        assert not re.search(r"[\[\]|]| {2}", record["text"]), f"left-over markup in {record['id']}"
        assert record["domain"] in DOMAINS
        check_entities(record)
    assert len({record["id"] for record in pool}) == len(pool)


def test_offsets_count_code_points_and_the_file_is_readable_utf8(pool: list[dict[str, Any]]) -> None:
    raw = (DATA / "pool.jsonl").read_text(encoding="utf-8")
    assert "\\u" not in raw
    # An astral character before an entity tells code points from UTF-16 units.
    assert any(
        ord(character) > 0xFFFF
        for record in pool
        for character in record["text"][: max((entity["start"] for entity in record["entities"]), default=0)]
    )
    assert any(not entity["text"].isascii() for entity in entities_of(pool))


def test_labels_are_those_of_the_label_file(pool: list[dict[str, Any]]) -> None:
    names = {label["name"] for label in read_labels(DATA / "labels.yaml")}
    counts = Counter(entity["label"] for entity in entities_of(pool))
    assert set(counts) == names
    assert min(counts.values()) >= 40, counts


def test_domains_have_both_kinds_of_sentences(pool: list[dict[str, Any]]) -> None:
    for domain in DOMAINS:
        records = [record for record in pool if record["domain"] == domain]
        empty = sum(not record["entities"] for record in records)
        assert len(records) >= 25, domain
        assert 5 <= empty <= len(records) // 2, domain


def test_no_duplicates_and_no_templates(pool: list[dict[str, Any]]) -> None:
    assert len({record["text"].casefold() for record in pool}) == len(pool)
    skeletons = Counter(without_entities(record) for record in pool)
    assert [skeleton for skeleton, count in skeletons.items() if count > 1] == []
    openings = Counter(tuple(re.findall(r"\w+", record["text"].casefold())[:3]) for record in pool)
    assert [opening for opening, count in openings.items() if count > 3] == []


def test_no_two_sentences_share_a_long_run_of_words(pool: list[dict[str, Any]]) -> None:
    runs: dict[tuple[str, ...], str] = {}
    for record in pool:
        words = re.findall(r"\w+", without_entities(record))
        for run in {tuple(words[i : i + 6]) for i in range(len(words) - 5)}:
            if run.count("_") > 1:
                continue  # mostly gaps: two sentences may well say "at _ in _ on _"
            assert run not in runs, f"{runs.get(run)} and {record['id']} share {' '.join(run)!r}"
            runs[run] = record["id"]


def test_lengths_vary(pool: list[dict[str, Any]]) -> None:
    lengths = [len(record["text"].split()) for record in pool]
    assert 4 <= min(lengths) <= max(lengths) <= 40
    assert sum(length <= 10 for length in lengths) >= 20
    assert sum(length >= 20 for length in lengths) >= 60


def test_hard_cases_are_there(pool: list[dict[str, Any]]) -> None:
    labels_of: dict[str, set[str]] = {}
    for entity in entities_of(pool):
        labels_of.setdefault(entity["text"], set()).add(entity["label"])
    assert labels_of["Washington"] == {"location", "organization"}
    assert labels_of["Hamlet"] == {"person", "creative-work"}
    informal = entities_of([record for record in pool if record["domain"] == "informal"])
    assert sum(entity["text"].islower() for entity in informal) >= 40
    assert any(entity["start"] == 0 for entity in entities_of(pool))
    assert any(" " in entity["text"] for entity in entities_of(pool))


def test_spans_follow_the_written_rules(pool: list[dict[str, Any]]) -> None:
    titles = r"(?:dr|mr|mrs|ms|sir|professor|president|queen|king|justice|judge)\b"
    for entity in entities_of(pool):
        text, label = entity["text"], entity["label"]
        assert text[0] not in "#@\"'“(", text
        assert text[-1] not in ",;:?\"'”", text
        assert text.count("(") == text.count(")"), text  # a title may open and close its own
        if label in {"person", "location", "date"}:  # a company may be called "Sotheby's"
            assert not text.endswith(("'s", "’s")), text
        # Titles of works keep their article, "The Hague" is written with one.
        if label != "creative-work" and text != "The Hague":
            assert not re.match(r"(?:the|an?)\s", text, re.IGNORECASE), text
        if label == "person" and text != "King Momo":  # a character's name, not a rank
            assert not re.match(titles, text, re.IGNORECASE), text


def check_labels(labels: list[dict[str, Any]]) -> None:
    for label in labels:
        assert set(label) == {"name", "definition", "examples", "counter_examples"}
        assert re.fullmatch(r"[a-z]+(?:-[a-z]+)*", label["name"])
        assert len(label["definition"].split()) >= 5
        assert label["definition"].endswith(".")
        assert 3 <= len(label["examples"]) <= 5
        assert 1 <= len(label["counter_examples"]) <= 4
        assert all(isinstance(value, str) for value in label["examples"] + label["counter_examples"])
    assert len({label["name"] for label in labels}) == len(labels)


def test_label_file() -> None:
    labels = read_labels(DATA / "labels.yaml")
    assert 8 <= len(labels) <= 12
    check_labels(labels)
    given = [value for label in labels for value in label["examples"]]
    assert len(set(given)) == len(given), "an example belongs to one label"


def test_example_inputs(pool: list[dict[str, Any]]) -> None:
    inputs = {path.stem: read_jsonl(path) for path in sorted(EXAMPLES.glob("*.jsonl"))}
    assert {"news", "science", "informal", "jobs"} <= set(inputs)
    records = list(itertools.chain.from_iterable(inputs.values()))
    assert len(records) <= 20, "the demo predicts all of these"
    assert len({record["id"] for record in records}) == len(records)
    assert all(record["text"] and "entities" not in record for record in records)
    assert any(set(record) - {"id", "text"} for record in records), "one shows how further keys are carried"
    assert any(not record["text"].isascii() for record in records)
    known = {record["text"] for record in pool}
    assert not known & {record["text"] for record in records}


def test_example_labels_and_pool() -> None:
    for path in sorted((EXAMPLES / "labels").glob("*.yaml")):
        check_labels(read_labels(path))
    pools = sorted((EXAMPLES / "pools").glob("*.jsonl"))
    assert pools
    for path in pools:
        records = read_jsonl(path)
        # Twenty is the least from which voters are fitted.
        assert len(records) >= 24
        assert len({record["id"] for record in records}) == len(records)
        for record in records:
            check_entities(record)
        assert len({entity["label"] for entity in entities_of(records)}) >= 3
        assert any(not record["entities"] for record in records)
