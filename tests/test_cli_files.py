"""Commands about files alone, without any model: pool check, show, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from el4ner.cli import main
from el4ner.cli_pool import _crossing, _nested
from el4ner.records import LabelledSpan


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EL4NER_DEBUG", raising=False)


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), input=stdin)


SPANS = st.sets(st.tuples(st.integers(0, 9), st.integers(1, 5), st.sampled_from("xy")), max_size=8)


@given(SPANS)
def test_entities_inside_and_across_others_are_counted(drawn: set[tuple[int, int, str]]) -> None:
    entities = [LabelledSpan(start, start + length, label) for start, length, label in drawn]
    inside = sum(any(o != i and o.start <= i.start and i.end <= o.end for o in entities) for i in entities)
    across = sum(any(f.start < s.start < f.end < s.end for f in entities) for s in entities)
    assert (_nested(entities), _crossing(entities)) == (inside, across)


def test_pool_check_counts_and_lists_every_problem() -> None:
    Path("pool.jsonl").write_text(
        '{"text": "human IL-2 gene", "entities": [{"start": 0, "end": 15, "label": "dna"}, '
        '{"start": 6, "end": 10, "label": "protein"}, {"start": 11, "end": 15, "label": "protein"}]}\n'
        '{"text": "x", "entities": []}\n{"text": "x", "entities": [{"start": 0, "end": 1, "label": "dna"}]}\n'
    )
    result = run("pool", "check", "pool.jsonl")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split(maxsplit=1) for line in result.stdout.splitlines() if line] == [
        ["3", "sentences"],
        ["1", "without entities"],
        ["4", "entities"],
        ["2", "inside another"],
        ["0", "spans with two labels (only the first counts)"],
        ["0", "crossing another"],
        ["1", "repeated texts"],
        ["1", "texts with conflicting entities"],
        ["entities", "label"],
        ["2", "dna"],
        ["2", "protein"],
    ]
    long = {"text": "x", "entities": [{"start": 0, "end": 1, "label": "y" * 5000}]}
    Path("long.jsonl").write_text(json.dumps(long) + "\n")
    assert max(map(len, run("pool", "check", "long.jsonl").stdout.splitlines())) < 100
    with Path("pool.jsonl").open("a") as stream:
        stream.write('oops\n{"text": "x", "entities": [{"start": 0, "end": 5, "label": "dna"}]}\n')
    result = run("pool", "check", "pool.jsonl")
    assert result.exit_code == 1
    assert "\n       2 wrong lines, which no other count has in it\n" in result.stdout
    first, second, last = result.stderr.splitlines()
    assert first.startswith("el4ner: pool.jsonl:4: not JSON")
    assert second.startswith("el4ner: pool.jsonl:5: entity 1 spans [0:5] of a text of 1 characters")
    assert last == "el4ner: error: pool.jsonl: 2 lines are wrong; correct them"
    assert run("pool", "check", "missing.jsonl").exit_code == 2
    Path("pool.jsonl").write_text(
        '{"text": "a", "entities": [{"start": 0, "end": 1, "label": "x"}, {"start": 0, "end": 1, "label": "y"}]}\n'
    )
    assert "       1 spans with two labels (only the first counts)\n" in run("pool", "check", "pool.jsonl").stdout


def test_pool_check_reads_columns() -> None:
    Path("pool.conll").write_text("Ada B-person\nleft O\n\nNobody O\n")
    result = run("pool", "check", "pool.conll")
    assert (result.exit_code, result.stdout.split("\n")[:3]) == (
        0,
        ["       2 sentences", "       1 without entities", "       1 entities"],
    )
    Path("pool.conll").write_text("Ada B-person\nleft\n")
    result = run("pool", "check", "pool.conll")
    assert (result.exit_code, result.stdout) == (1, "")  # nothing could be counted
    assert result.stderr.splitlines()[-1] == "el4ner: error: pool.conll: 1 line is wrong; correct it"
    Path("pool.conll").write_text("Ada B-person\nleft O\n\n" + "oops x\n" * 30)
    result = run("pool", "check", "pool.conll")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (1, "       1 sentences")
    listed = result.stderr.splitlines()
    assert [line.split(": ")[1] for line in listed[:-1]] == [f"pool.conll:{number}" for number in range(4, 24)]
    assert listed[-1] == "el4ner: error: pool.conll: 30 lines are wrong (10 more not shown); correct them"


def test_show_is_readable_and_inert() -> None:
    listed = [
        {"start": 0, "end": 15, "label": "dna", "score": 0.5},
        {"start": 6, "end": 10, "label": "protein"},
        {"start": 11, "end": 19, "label": "x"},
        {"start": 3, "end": 99, "label": "y"},
    ]
    lines = [
        {"id": "a", "text": "human IL-2 gene \x1b[31mred\n", "entities": listed, "status": "ok"},
        {"id": "b", "text": "long", "entities": [], "status": "truncated", "error": "cut at 3"},
        {"id": "c", "text": "[bold]:smile:", "entities": []},
    ]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("show", "p.jsonl")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        r"a  [human [IL-2](protein) gene](dna 0.50) \x1b[31mred\n",
        "  also [not in the text: 3:99](y)",
        r"  also [gene \x1b[3](x)",
        "b  truncated: cut at 3",
        "  long",
        "c  [bold]:smile:",
    ]
    assert run("show", "missing.jsonl").exit_code == 2


def test_show_reads_tokens_and_says_where_there_is_no_text() -> None:
    found = [{"start": 0, "end": 3, "label": "x"}]
    lines: list[dict[str, object]] = [
        {"tokens": ["Ada", "left"], "entities": found},
        {"text": None, "entities": found},
        {"entities": []},
        {"text": "", "entities": []},
    ]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("show", "p.jsonl").stdout.splitlines() == [
        "1  [Ada](x) left",
        "2  (no text)",
        "  also [not in the text: 0:3](x)",
        "3  (no text)",
        "4  ",
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('"entities": [{"start": 0, "end": 1, "label": "l", "score": "high"}]', 'an entity has the score "high"'),
        ('"entities": [{"start": 0, "end": 1, "label": "l", "score": true}]', "an entity has the score true"),
        ('"entities": [{"start": 0, "end": 1, "label": "l", "score": 1e300}]', "an entity has the score 1e+300"),
        ('"entities": [], "status": [1]', "status is [1]; use a string"),
    ],
)
@pytest.mark.parametrize("command", ["show", "evaluate"])
def test_malformed_predictions_are_named(command: str, record: str, message: str) -> None:
    Path("p.jsonl").write_text('{"text": "x", "entities": []}\n{"text": "x", ' + record + "}\n")
    Path("gold.jsonl").write_text('{"text": "x", "entities": []}\n')
    result = run(command, *(["gold.jsonl"] if command == "evaluate" else []), "p.jsonl")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("el4ner: error: p.jsonl:2: ")
    assert message in result.stderr


def test_evaluate_writes_any_label_and_reads_stdin_once() -> None:
    Path("gold.jsonl").write_text('{"text": "x", "entities": []}\n')
    Path("p.jsonl").write_text(r'{"text": "x", "entities": [{"start": 0, "end": 1, "label": "\ud800"}]}' + "\n")
    result = run("evaluate", "gold.jsonl", "p.jsonl", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["labels"]["\ud800"]["predicted"] == 1
    twice = run("evaluate", "-", "-", stdin="{}")
    assert twice.exit_code == 2
    assert "GOLD and PRED are both stdin (-), which can be read only once" in twice.stderr


def test_files_without_a_common_id_are_told_in_words() -> None:
    Path("gold.jsonl").write_text('{"id": "1", "text": "Bob", "entities": []}\n')
    Path("p.jsonl").write_text('{"id": "a", "text": "Bob", "entities": []}\n')
    said = (
        "no id of the predictions occurs in gold: were the two files made from the same input? give their records the"
    )
    table, machine = run("evaluate", "gold.jsonl", "p.jsonl"), run("evaluate", "gold.jsonl", "p.jsonl", "--json")
    assert (table.exit_code, machine.exit_code) == (0, 0)
    assert said in table.stdout
    assert json.loads(machine.stdout)["problems"]["lost_records"] == 1
    assert machine.stderr == f"el4ner: warning: {said} same ids\n"
    Path("p.jsonl").write_text('{"id": "1", "text": "Bob", "entities": []}\n')
    assert run("evaluate", "gold.jsonl", "p.jsonl", "--json").stderr == ""


@pytest.mark.parametrize("columns", ["0", "20", "50"])
def test_narrow_terminals_lose_nothing(columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    path = tmp_path / "gold.jsonl"
    path.write_text('{"id": "a", "text": "in Berlin", "entities": [{"start": 3, "end": 9, "label": "place"}]}\n')
    shown = CliRunner().invoke(main, ["show", str(path)])
    assert shown.stdout == "a  in [Berlin](place)\n"
    table = CliRunner().invoke(main, ["evaluate", str(path), str(path), "--bootstrap", "0"]).stdout
    for word in ("precision", "recall", "gold", "predicted", "correct", "place", "micro", "macro"):
        assert word in table
    assert "1.0000" in table
    assert "\u2026" not in table
