"""Hostile text in every place that a run's folder has one: neither the page nor the document lets it act."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from report_page import Page

from el4ner.bench.cli import group

HOSTILE = "<script>alert(1)</script>\"'&|`*_[x](javascript:alert(1))\u202e\x07"
TEXTS = (f"{HOSTILE} Berlin {HOSTILE}", "</td></table><img src=x onerror=alert(2)> Paris \U0001f600 x")
LABEL = f"<img onerror=1>{HOSTILE}"
SYSTEMS = ("default", "a<script>b")


def _lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _entity(text: str, start: int, end: int, label: str, score: float | None = None) -> dict[str, Any]:
    entity = {"start": start, "end": end, "label": label}
    return entity if score is None else {**entity, "text": text[start:end], "score": score}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder whose names, texts, labels, settings and facts are all hostile."""
    run = tmp_path / 'ho<b>"st'
    berlin, paris = TEXTS[0].index("Berlin"), TEXTS[1].index("Paris")
    spans = [[(0, 8, LABEL), (berlin, berlin + 6, "loc")], [(paris, paris + 5, "loc")]]
    gold: list[dict[str, Any]] = [
        {"id": name, "text": text, "entities": [_entity(text, *span) for span in found]}
        for name, text, found in zip((HOSTILE, "2"), TEXTS, spans, strict=True)
    ]
    _lines(run / "gold.jsonl", gold)
    _lines(run / "pool.jsonl", [{"text": row["text"], "entities": row["entities"]} for row in gold])
    for cut, name in enumerate(SYSTEMS):
        rows = []
        for row, found in zip(gold, spans, strict=True):
            text = row["text"]
            entities = [_entity(text, s, e - cut, LABEL if cut else label, 0.6) for s, e, label in found]
            invented = {"start": 500, "end": 505, "text": "<i>no", "label": LABEL, "score": 0.9}
            rows.append({**row, "entities": [*entities, invented], "status": "fail<b>ed"})
        _lines(run / "predictions" / f"{name}.jsonl", rows)
        staged = [
            {"id": row["id"], "extract": [span[:2] for span in found], "classify": found}
            for row, found in zip(gold, spans, strict=True)
        ]
        _lines(run / "stages" / f"{name}.jsonl", staged)
    entry = {
        "settings": {HOSTILE: HOSTILE},
        "settings_hash": HOSTILE,
        "models": {HOSTILE: HOSTILE},
        "kind": "el4ner",
    }
    manifest = {
        "version": 1,
        "command": ["el4ner-bench", "run", HOSTILE, "```\n<b>"],
        "data": {"name": HOSTILE, "source": HOSTILE, "split": "test", "sha256": HOSTILE, "sentences": 2, "seed": 0},
        "pool": {"sentences": 2, "entities": 3},
        "systems": dict.fromkeys(SYSTEMS, entry),
        "k": 3,
        "seed": 0,
        "versions": {HOSTILE: HOSTILE},
        "hardware": {"cpu": HOSTILE},
        "commit": HOSTILE,
        "created": HOSTILE,
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    timing = {"prediction_s": 2.0, "sentences_per_s": 1.0, "prompt_tokens": 10, "generated_tokens": 0, "threads": 1}
    (run / "timings.json").write_text(json.dumps(dict.fromkeys(SYSTEMS, timing)))
    return run


def _report(*words: str) -> None:
    result = CliRunner().invoke(group, ["report", *words])
    assert result.exit_code == 0, result.output


def _has_controls(text: str) -> bool:
    return any((ord(c) < 32 and c != "\n") or 0x202A <= ord(c) <= 0x202E for c in text)


def test_nothing_hostile_becomes_markup_in_the_page(folder: Path, tmp_path: Path) -> None:
    _report(str(folder), "--html", str(tmp_path / "out.html"))
    written = (tmp_path / "out.html").read_text()
    page = Page(written)
    assert all(link.startswith(("#", "https://")) for link in page.links)
    assert not _has_controls(written)
    # What must not act is still shown: the label, the sentence's markup, the system's name.
    shown = "".join(page.shown)
    assert "<img onerror=1><script>" in shown
    assert "</td></table><img src=x" in shown
    assert "a<script>b" in shown


def test_nothing_hostile_becomes_markup_in_the_document(folder: Path, tmp_path: Path) -> None:
    _report(str(folder), "--markdown", str(tmp_path / "out.md"))
    written = (tmp_path / "out.md").read_text()
    lines = written.split("\n")
    fence = next(line for line in lines if line.startswith("```"))
    first = lines.index(fence)
    last = lines.index(fence, first + 1)
    outside = "\n".join(lines[:first] + lines[last + 1 :])
    assert len(fence) == 4  # longer than the run of backticks in the command
    assert "<" not in outside.replace("<https://", "")
    assert "](" not in outside.replace("\\](", "")
    assert "&lt;img onerror=1&gt;" in outside
    assert not _has_controls(written)


def test_a_digest_has_no_text_and_says_the_same(folder: Path, tmp_path: Path) -> None:
    _report(str(folder), "--keep", str(tmp_path / "kept"), "--markdown", str(tmp_path / "run.md"))
    (digest,) = (tmp_path / "kept").iterdir()
    assert "Paris" not in digest.read_text()
    _report(str(digest), "--markdown", str(tmp_path / "digest.md"))
    rows = [
        [line for line in (tmp_path / name).read_text().split("\n") if line.startswith("|")]
        for name in ("run.md", "digest.md")
    ]
    assert len(rows[0]) > 20
    assert rows[0] == rows[1]


def test_public_results_come_from_digests_and_leave_the_rest_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _report(str(folder), "--keep", str(tmp_path / "bench" / "results"))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold number 0.999\n<!-- /results -->\nafter\n")
    monkeypatch.chdir(tmp_path)
    _report("--write-results")
    text = readme.read_text()
    assert text.startswith("before\n<!-- results -->\n")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "0.999" not in text
    # 3 right, 5 predicted (two invented), 3 gold
    assert f"{2 * 3 / (5 + 3):.3f}" in text
    before, section = text.split("are, by:\n\n")
    assert "<script" not in before
    fence = section.split("\n")[0]
    assert len(fence) == 4  # longer than the run of backticks in the command
    assert section.endswith(f"\n{fence}\n<!-- /results -->\nafter\n")
    assert "# Results" in (tmp_path / "bench" / "RESULTS.md").read_text()
    _report("--write-results")
    assert readme.read_text() == text


@pytest.mark.parametrize("text", ["none", "<!-- results -->", "<!-- /results -->\n<!-- results -->"])
def test_a_readme_without_its_markers_is_refused(
    text: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _report(str(folder), "--keep", str(tmp_path / "bench" / "results"))
    (tmp_path / "README.md").write_text(text)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(group, ["report", "--write-results"])
    assert result.exit_code != 0
    assert (tmp_path / "README.md").read_text() == text
    assert not (tmp_path / "bench" / "RESULTS.md").exists()
