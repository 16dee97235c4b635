"""el4ner-bench report: numbers arrive, hostile text stays text, digests hold no texts, public files are renewed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from report_page import Page

from el4ner.bench.calibration import curve
from el4ner.bench.cli import group
from el4ner.bench.finished_run import load_run, rounded
from el4ner.bench.report import build_report, load_anchors, load_places
from el4ner.bench.report_charts import (
    Bar,
    Point,
    interval_chart,
    line_chart,
    reliability_chart,
    scatter_chart,
    stage_chart,
)
from el4ner.bench.report_html import render_html
from el4ner.bench.report_markdown import render_markdown
from el4ner.bench.results_files import BEGIN, END, between_markers, readme_section, write_results
from el4ner.errors import InputError

SCRIPT = "<script>alert(1)</script>"
HOSTILE = (SCRIPT, '"><img src=x onerror=alert(1)>', "a|b`c`*d* [x](javascript:alert(1)) $y$ \u202e\n# z")


def write_run(
    folder: Path, systems: dict[str, list[list[tuple[int, int, str, float]]]], *, pool: int = 5,
    texts: list[str] | None = None, label: str = "place", data: str = "crossner_ai", limit: int | None = None,
) -> Path:  # fmt: skip
    """A run's folder. systems: name -> per sentence the predicted entities; gold is the first four characters."""
    texts = texts or ["Oslo is cold .", "Rome is warm .", "Bonn is small ."]
    gold = [
        {"id": f"s{n}", "text": text, "entities": [{"start": 0, "end": 4, "label": label}]}
        for n, text in enumerate(texts)
    ]
    files: dict[str, Any] = {"gold.jsonl": gold, "pool.jsonl": [{"text": "Oslo", "entities": gold[0]["entities"]}]}
    for name, found in systems.items():
        records = []
        for record, entities in zip(gold, found, strict=False):
            listed = [{"start": s, "end": e, "label": lab, "score": p} for s, e, lab, p in entities]
            records.append({"id": record["id"], "text": record["text"], "entities": listed, "status": "ok"})
        files[f"predictions/{name.replace(':', '.')}.jsonl"] = records
    first = next(iter(systems)).replace(":", ".")
    files[f"stages/{first}.jsonl"] = [{"id": g["id"], "extract": [[0, 4]], "classify": []} for g in gold]
    for path, records in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    manifest = {
        "version": 1, "command": ["el4ner-bench", "run", "--data", data, "--out", folder.name],
        "data": {"name": data, "split": "test", "sentences": len(gold), "of": 50, "limit": limit, "seed": 0},
        "pool": {"sentences": pool, "entities": 9, "dropped_duplicates": 2, "near_duplicates": 1}, "k": 4, "seed": 0,
        "systems": {name: {"settings_hash": "abc", "models": {"embedded:smollm2": "r1"}} for name in systems},
        "versions": {"el4ner": "0"}, "hardware": {"cpu": "z80"}, "commit": "c0ffee", "created": "2026-01-01",
    }  # fmt: skip
    timing = {"sentences_per_s": 2.0, "prediction_s": 1.5, "prompt_tokens": 30, "generated_tokens": 3, "threads": "1"}
    timings = {name: {**timing, "prompt_tokens": 30 * n} for n, name in enumerate(systems)}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "timings.json").write_text(json.dumps(timings), encoding="utf-8")
    return folder


RIGHT = [[(0, 4, "place", 0.9)]] * 3
HALF: list[list[tuple[int, int, str, float]]] = [[(0, 4, "place", 0.8)], [(0, 7, "place", 0.7)], []]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "large", {"default": RIGHT, "member:tiny": HALF}, pool=50, limit=3),
        write_run(tmp_path / "small", {"default": HALF, "member:tiny": [[], [], []]}, pool=5, limit=3),
    ]


def test_numbers_arrive_in_both_forms(runs: list[Path]) -> None:
    report = build_report(load_places(runs), "A title & more")
    page, markdown = Page(render_html(report)), render_markdown(report)
    shown = "\n".join(page.shown)
    for text in (shown, markdown):
        for part in (
            "1.000 [1.000, 1.000]",
            "member:tiny",
            "c0ffee",
            "z80",
            "NuNER Zero-span",
            "Size of the pool",
            "abc",
        ):
            assert part in text.replace("\\", ""), part
    assert "0.400" in shown  # 2 * 1 / (2 + 3): one right, one with a wrong end, one missed
    assert "predicted “Rome is” as place (0.70), gold “Rome” is place" in shown
    assert "⟦Rome⟧} is⟧" not in markdown
    assert re.search(r"{⟦Rome⟧}⟦ is⟧ warm", markdown)
    anchors = {row["source"] for row in load_anchors()}
    assert {link for link in page.links if not link.startswith("#")} <= anchors
    targets = set(re.findall(r'id="(s\d+)"', render_html(report)))
    assert {link[1:] for link in page.links if link.startswith("#")} <= targets


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    names = {"default": RIGHT, HOSTILE[1]: HALF, HOSTILE[2]: HALF}
    texts = [f"Oslo {text}" for text in HOSTILE]
    path = write_run(tmp_path / "h", names, texts=texts, label=SCRIPT)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest |= {"command": ["x", f"```\n{SCRIPT}"], "commit": SCRIPT, "hardware": {"cpu": SCRIPT}}
    manifest["data"] |= {"split": SCRIPT, "sha256": SCRIPT}
    (path / "manifest.json").write_text(json.dumps(manifest))
    report = build_report([load_run(path)], SCRIPT)
    markup = render_html(report)
    shown = "".join(Page(markup).shown)
    assert SCRIPT in shown
    assert HOSTILE[1] in shown
    assert "\u202e" not in markup
    assert "default-src 'none'" in markup
    outside = re.sub(r"^(`{3,})\n.*?^\1\n", "", render_markdown(report), flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside
    assert "<img" not in outside
    assert "](javascript" not in outside
    assert not re.search(r"^# z", outside, re.MULTILINE)
    width = {line.count("|") - line.count("\\|") for line in outside.splitlines() if line.startswith("| default | ")}
    assert len(width) > 1  # rows of several tables
    for table in re.findall(r"(?:^\|.*\n)+", outside, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(cells) == 1, table


def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", {"default": RIGHT})
    manifest = (path / "manifest.json").read_text().replace('"default": {', '"../../x": {')
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match="names have no slashes"):
        load_run(path)


def test_unfinished_systems_are_named_and_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", {"default": RIGHT, "kate": HALF[:2], "deer": []})
    run = load_run(path)
    assert list(run.metrics) == ["default"]
    assert dict(run.unfinished) == {"kate": 2, "deer": 0}
    shown = "".join(Page(render_html(build_report([run]))).shown)
    assert "kate has answered 2 of 3 sentences and is left out" in shown
    none = load_run(write_run(tmp_path / "n", {"default": []}))
    assert "No system has answered all sentences yet" in render_markdown(build_report([none]))


def test_stored_metrics_are_used_and_old_ones_are_computed_again(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", {"default": HALF})
    fresh = load_run(path).metrics["default"]
    (path / "metrics.json").write_text(json.dumps({"systems": {"default": {**fresh, "strict": {"f1": 0.123}}}}))
    assert load_run(path).metrics["default"]["strict"]["f1"] == 0.123
    (path / "metrics.json").write_text(json.dumps({"systems": {"default": {"version": 0, "strict": {"f1": 0.123}}}}))
    assert load_run(path).metrics["default"] == fresh
    (path / "metrics.json").write_text(json.dumps({"systems": {"default": fresh}}))
    answers = path / "predictions" / "default.jsonl"
    answers.write_text(answers.read_text().replace('"label": "place"', '"label": "team"'))
    assert load_run(path).metrics["default"]["strict"]["f1"] == 0.0  # scores of other answers are not believed
    assert [row["stage"] for row in fresh["stages"]] == ["extract", "classify", "output"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{", "cannot be read"),
        ("manifest.json", "[]", "is no JSON object"),
        ("manifest.json", "{}", 'lacks "data"'),
        ("gold.jsonl", "", "gold.jsonl: is empty"),
        ("gold.jsonl", '{"id": "1", "text": "a"}\n', "gold.jsonl:1"),
        ("predictions/default.jsonl", '{"id": "1", "entities": 3}\n' * 3, "default.jsonl:1"),
    ],
)
def test_damaged_folders_are_refused_by_name(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = write_run(tmp_path / "r", {"default": RIGHT})
    (path / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        load_run(path)
    with pytest.raises(InputError, match=r"neither manifest.json nor digests"):
        load_places([tmp_path])


@pytest.mark.parametrize(
    "damage",
    [
        {"metrics": {}},
        {"metrics": 3},
        {"metrics": {"systems": {"default": {"version": 1}}}},
        {"metrics": {"systems": {"default": {"version": 1, "strict": {"f1": "high"}}}}},
        {"counts": {"gold": [1], "systems": {"default": {"correct": [1, 2], "predicted": [1]}}}},
        {"counts": {"gold": [1], "systems": ["default"]}},
    ],
)
def test_damaged_digests_are_refused_by_name(tmp_path: Path, damage: dict[str, Any]) -> None:
    digest = load_run(write_run(tmp_path / "r", {"default": RIGHT})).digest()
    path = tmp_path / "digest.json"
    path.write_text(json.dumps(digest | damage))
    with pytest.raises(InputError, match=r"digest\.json: is a damaged digest \(.*\); write it anew with report --keep"):
        load_run(path)


def test_charts_are_well_formed_and_show_their_numbers() -> None:
    rows = curve(np.array([0.2, 0.4, 0.9, 0.9]), np.array([0.0, 1.0, 1.0, 0.0]))
    points = [Point(f"{SCRIPT}{n}", x, y, (y / 2, y)) for n, (x, y) in enumerate([(0, 0.2), (10, 0.5), (10, 0.51)])]
    charts = [
        interval_chart([Bar("a & b", 0.5, (0.4, 0.6)), Bar("c", 0.0, None)], "t"),
        scatter_chart(points, "t", "tokens"),
        line_chart({"a": [Point("a", 10, 0.1, None), Point("a", 1000, 0.9, (0.8, 1.0))]}, "t", "pool"),
        reliability_chart(rows, "t"),
        stage_chart([("extract", 0.9, (0.8, 1.0), 3)], "t"),
    ]
    for chart in charts:
        ElementTree.fromstring(chart)
        assert "<script" not in chart
        for x in re.findall(r' (?:cx|x1|x2|x)="(-?[\d.]+)"', chart):
            assert 0 <= float(x) <= 700
    names = [
        (float(x), float(y)) for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*class="s name"', charts[1])
    ]
    assert len({y for _, y in names}) == 3  # names of near points do not lie on each other


# Digests and public files


def test_digests_hold_all_numbers_and_no_texts(runs: list[Path], tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    done = CliRunner().invoke(group, ["report", *map(str, runs), "--keep", str(keep)])
    assert done.exit_code == 0, done.output
    digest = (keep / "large.json").read_text()
    assert "Oslo" not in digest
    assert "Rome" not in digest
    again, before = load_places([keep]), load_places(runs)
    assert [run.metrics for run in again] == [rounded(run.metrics) for run in before]
    assert [run.comparisons for run in again] == [rounded(run.comparisons) for run in before]
    assert not any("Examples of errors" in section.title for section in build_report(again).sections)


def test_public_files_are_made_from_committed_results(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results"
    texts = [f"Oslo {n}" for n in range(12)]
    whole = write_run(tmp_path / "whole", {"default": [RIGHT[0]] * 12, "kate": [[]] * 12}, texts=texts, data="wnut17")
    sample = write_run(tmp_path / "sample", {"default": RIGHT, "kate": HALF}, limit=3)
    smaller = write_run(tmp_path / "smaller", {"default": HALF}, limit=3, pool=2)
    CliRunner().invoke(group, ["report", *map(str, (whole, sample, smaller)), "--keep", str(folder)])
    readme = tmp_path / "README.md"
    readme.write_text(f"# Before\n\n{BEGIN}\nhand-made\n{END}\n\nafter\n")
    assert [path.name for path in write_results(tmp_path)] == ["RESULTS.md", "README.md"]
    text = readme.read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "hand-made" not in text
    assert re.search(r"^\| default \| \*\*1\.000 \[1\.000, 1\.000\]\*\* \|$", text, re.MULTILINE)
    assert re.search(r"^\| kate \| 0\.000 \[0\.000, 0\.000\]\\\* \|$", text, re.MULTILINE)  # beaten: p < 0.05
    assert "(3 of 50 sentences, pool of 5)" in text  # of two pools the larger
    assert "--out smaller" not in text
    assert "--out whole" in text
    results = (tmp_path / "bench" / "RESULTS.md").read_text()
    assert "Size of the pool" in results
    assert write_results(tmp_path)
    assert readme.read_text() == text  # made again, the same


def test_nothing_committed_is_not_measured_yet(tmp_path: Path) -> None:
    (tmp_path / "engine.jsonl").write_text('{"what": "choose"}\n')  # of another command: no row of this table
    assert "Not measured yet." in readme_section(tmp_path)


def test_markers_are_needed_once_each() -> None:
    for text in ("", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(InputError, match="once each"):
            between_markers(text, "x", "README.md")


def test_anchors_have_sources_and_no_two_are_the_same() -> None:
    rows = load_anchors()
    assert {row["kind"] for row in rows} == {"in-context", "zero-shot", "supervised"}
    assert {row["seen"] for row in rows} == {"authors", "quoted"}
    assert {row["data"] for row in rows} == {
        "wnut17", "bc5cdr", "mit_movie", "genia", "crossner_ai", "crossner_politics",
    }  # fmt: skip
    assert len({(row["data"], row["system"]) for row in rows}) == len(rows)
    assert all(len(row["differs"]) > 10 for row in rows)


def test_the_command_writes_and_says_what_lacks(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    done = CliRunner().invoke(group, ["report", str(runs[0]), "--html", str(out), "--markdown", str(tmp_path / "r.md")])
    assert done.exit_code == 0, done.output
    Page(out.read_text())
    assert "http://" not in out.read_text()
    assert (tmp_path / "r.md").read_text().startswith("# Evaluation")
    for arguments, message in ((["report", str(runs[0])], "nothing to write"), (["report", "--html", "x"], "no runs")):
        done = CliRunner().invoke(group, arguments)
        assert message in str(done.exception)
