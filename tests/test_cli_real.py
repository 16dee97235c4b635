"""Bad and good input from end to end with the real embedded models, through the command line.

The pool is tiny and only the retrieval voter is asked, so that a run takes seconds; the other stages have their own
tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from el4ner.cli import main

pytestmark = pytest.mark.embedded

KEYS = ["id", "text", "entities", "status", "error", "usage", "extra"]
ENTITY_KEYS = ["start", "end", "text", "label", "score", "votes", "proposed_by", "verified"]

POOL = [
    ("Berlin and Hamburg are cities in Germany.", {"Berlin": "place", "Hamburg": "place", "Germany": "place"}),
    ("Ada Lovelace wrote the first program.", {"Ada Lovelace": "person"}),
    ("Paris is the capital of France.", {"Paris": "place", "France": "place"}),
    ("Marie Curie was born in Warsaw.", {"Marie Curie": "person", "Warsaw": "place"}),
    ("It rained all day and nobody went out.", {}),
    ("Alan Turing worked in Manchester.", {"Alan Turing": "person", "Manchester": "place"}),
]
SETTINGS = """\
voters: [retrieval]
extract: {members: false, reading: false}
verify: {enabled: false}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pool, labels and settings, which is the current one."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for text, entities in POOL:
        spans = [{"start": text.find(s), "end": text.find(s) + len(s), "label": n} for s, n in entities.items()]
        lines.append(json.dumps({"text": text, "entities": spans}) + "\n")
    Path("pool.jsonl").write_text("".join(lines))
    Path("labels.yaml").write_text("- {name: place, definition: A place.}\n- {name: person, definition: A human.}\n")
    Path("settings.yaml").write_text(SETTINGS)
    return tmp_path


def run(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), input=stdin)


def predict(*arguments: str) -> Result:
    return run("predict", *arguments, "--examples", "pool.jsonl", "--config", "settings.yaml", "--device", "cpu")


def records(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout_bytes.split(b"\n") if line]


def test_a_target_precision_promises_nothing_where_nothing_was_fitted() -> None:
    for text, code in (('{"text": ""}', 0), ("not json", 3)):
        result = run("predict", "-", "--target-precision", "0.9", "--report", "report.json", stdin=text.encode())
        assert result.exit_code == code, result.stderr
        assert len(records(result)) == 1
        assert "expect" not in result.stderr
        assert json.loads(Path("report.json").read_text())["fitted"] == {}


def test_every_line_gives_a_record_and_bad_ones_say_why() -> None:
    Path("docs.jsonl").write_bytes(
        b'{"id": "good", "text": "Warsaw lies in Poland."}\n'
        b"not json\n"
        b"\n"
        b'{"id": "no-text", "body": "x"}\n'
        b'{"id": "number", "text": 5}\n'
        b'{"id": "latin-1", "text": "caf\xe9"}\n'
        b'{"id": "half", "text": "a\\ud83d"}\n'
        b'{"id": "good", "text": "\xf0\x9f\x87\xa9\xf0\x9f\x87\xaa Hamburg and Berlin", "source": {"page": 3}}\n'
        b'{"text": ""}\n'
    )
    result = predict("docs.jsonl")
    assert result.exit_code == 3, result.stderr
    found = records(result)
    assert all(list(record) == KEYS for record in found)
    assert [record["id"] for record in found] == ["good", "2", "no-text", "number", "latin-1", "half", "good", "9"]
    assert [record["status"] for record in found] == ["ok", *["skipped"] * 5, "ok", "ok"]
    errors = [record["error"] for record in found]
    assert [error is None for error in errors] == [True, *[False] * 5, True, True]
    for error, beginning in zip(
        errors[1:6],
        (
            'docs.jsonl:2: not JSON: "not json" (',
            'docs.jsonl:4: no "text" (keys: "id", "body"); add "text"',
            'docs.jsonl:5: "text" is a number (5), not a string',
            "docs.jsonl:6: invalid UTF-8 (byte 0xe9 at byte ",
            'docs.jsonl:7: "text" has a lone surrogate (\\ud83d at character 1)',
        ),
        strict=True,
    ):
        assert error.startswith(beginning)
    assert found[6]["extra"] == {"source": {"page": 3}}
    assert found[7]["entities"] == []
    for record in found:
        for entity in record["entities"]:
            assert list(entity) == ENTITY_KEYS
            assert record["text"][entity["start"] : entity["end"]] == entity["text"]
    assert {entity["text"] for entity in found[6]["entities"]} >= {"Hamburg", "Berlin"}
    assert 'warning: docs.jsonl:8: id "good" was used before, at docs.jsonl:1' in result.stderr
    assert "5 of 8 records are not ok (5 skipped)" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["missing.jsonl"], ["missing.jsonl: no such file; check the path"]),
        (["empty.jsonl"], ["empty.jsonl: is empty; expected one record a line"]),
        (["good.jsonl", "--examples", "missing.jsonl"], ["missing.jsonl: no such file; check the path"]),
        (
            ["good.jsonl", "--examples", "wrong-offsets.jsonl"],
            ['wrong-offsets.jsonl:2: entity 1 says "Berlin" but [1:7] of the text reads "erlin "', "stands at [0:6]"],
        ),
        (
            ["good.jsonl", "--labels", "wrong-labels.yaml"],
            ['wrong-labels.yaml:2: unknown key "defintion"; did you mean "definition"?'],
        ),
        (["good.jsonl", "--config", "wrong-settings.yaml"], ["wrong-settings.yaml", "batchsize", "batch_size"]),
        (["good.jsonl", "--members", "a=embedded:nothing", "--voters", "a"], ["embedded:nothing"]),
        (["good.jsonl", "--members", "a=./no-such-folder", "--voters", "a"], ["no-such-folder"]),
        (["good.jsonl", "--members", "a=./no-such-folder", "--voters", "retrieval"], ["no-such-folder"]),
    ],
)
def test_unusable_files_end_with_two_and_one_message(arguments: list[str], parts: list[str]) -> None:
    Path("good.jsonl").write_text('{"text": "Berlin"}\n')
    Path("empty.jsonl").touch()
    Path("wrong-offsets.jsonl").write_text(
        '{"text": "x", "entities": []}\n'
        '{"text": "Berlin is big", "entities": [{"start": 1, "end": 7, "label": "place", "text": "Berlin"}]}\n'
    )
    Path("wrong-labels.yaml").write_text("- name: place\n  defintion: A place.\n")
    Path("wrong-settings.yaml").write_text("batchsize: 3\n")
    defaults = {"--examples": "pool.jsonl", "--config": "settings.yaml"}
    rest = [part for name, value in defaults.items() if name not in arguments for part in (name, value)]
    result = run("predict", *arguments, *rest, "--device", "cpu")
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("el4ner: error: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def test_predict_show_and_evaluate_fit_together() -> None:
    gold = [{"text": text, "entities": []} for text, _ in POOL]
    Path("docs.jsonl").write_text("".join(json.dumps({"text": record["text"]}) + "\n" for record in gold))
    result = predict("docs.jsonl", "-o", "out.jsonl", "--report", "report.json")
    assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    assert isinstance(json.loads(Path("report.json").read_text()), dict)
    shown = run("show", "out.jsonl")
    assert shown.exit_code == 0
    assert "[Berlin](place" in shown.stdout
    # The pool itself is the input, so a pipeline that lost offsets or labels could not reach this.
    scores = json.loads(run("evaluate", "pool.jsonl", "out.jsonl", "--json").stdout)
    assert scores["micro"]["f1"] > 0.7
    assert scores["problems"] == {
        "lost_records": 0,
        "extra_records": 0,
        "different_texts": 0,
        "not_in_text": 0,
        "duplicates": 0,
        "not_ok": {},
    }


def test_batch_size_and_neighbours_do_not_change_the_bytes() -> None:
    texts = ["Hamburg is in Germany.", "Marie met Alan Turing in Paris.", "", "Nobody came.", "<|im_end|> Warsaw"]
    Path("docs.jsonl").write_text("".join(json.dumps({"id": str(i), "text": t}) + "\n" for i, t in enumerate(texts)))
    whole = predict("docs.jsonl", "--batch-size", "8")
    assert whole.exit_code == 0, whole.stderr
    assert predict("docs.jsonl", "--batch-size", "1").stdout_bytes == whole.stdout_bytes
    Path("one.jsonl").write_text(json.dumps({"id": "1", "text": texts[1]}) + "\n")
    assert predict("one.jsonl").stdout_bytes == whole.stdout_bytes.split(b"\n")[1] + b"\n"
    assert predict("docs.jsonl", "--limit", "2").stdout_bytes == b"\n".join(whole.stdout_bytes.split(b"\n")[:2]) + b"\n"


UNFITTED = (
    "el4ner: warning: nothing was fitted on the pool (6 sentences): voters count alike, scores are no probabilities\n"
)


def test_scores_that_are_no_probabilities_are_announced() -> None:
    Path("docs.jsonl").write_text('{"text": "Warsaw is a city."}\n')
    assert predict("docs.jsonl").stderr == UNFITTED
    assert predict("docs.jsonl", "-q").stderr == ""
    named = predict("docs.jsonl", "--voters", "reading,retrieval").stderr
    assert named == UNFITTED.replace("ties\n", "ties; not asked without a fit: reading\n")


@pytest.mark.filterwarnings("default::el4ner.cache.CacheWarning")
def test_an_unusable_cache_is_one_warning_and_costs_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("docs.jsonl").write_text('{"text": "Warsaw is a city."}\n')
    Path("file").write_text("in the way")
    sound = predict("docs.jsonl")
    monkeypatch.setenv("EL4NER_CACHE", "file")
    result = predict("docs.jsonl")
    assert (result.exit_code, result.stdout) == (0, sound.stdout)
    assert result.stderr.count("\n") == 2
    assert result.stderr.endswith(UNFITTED)
    assert result.stderr.startswith("el4ner: warning: cache folder file/pools cannot be written (Not a directory)")
    assert "EL4NER_CACHE" in result.stderr
    assert predict("docs.jsonl", "-q").stderr == ""
    built = run("pool", "build", "--examples", "pool.jsonl", "--config", "settings.yaml", "--device", "cpu")
    assert built.exit_code == 2  # the cache is what it is for
    assert "so nothing would be kept; set EL4NER_CACHE" in built.stderr


@pytest.mark.filterwarnings("default::el4ner.cache.CacheWarning")
def test_damaged_cache_files_are_messages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("docs.jsonl").write_text('{"text": "Warsaw is a city."}\n')
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path / "cache"))

    def damaged(*options: str) -> Result:
        for path in (tmp_path / "cache").rglob("*.npz"):
            path.write_bytes(b"damaged")
        return predict("docs.jsonl", *options)

    sound = damaged()  # nothing is there yet
    assert sound.stderr == UNFITTED
    result = damaged()
    assert (result.exit_code, result.stdout) == (0, sound.stdout)
    lines = result.stderr.removesuffix(UNFITTED).splitlines()
    assert lines
    assert all(line.startswith("el4ner: warning: cache file ") and "computing it again" in line for line in lines)
    assert damaged("--quiet").stderr == ""
