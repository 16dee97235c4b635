"""Runs on the same sentences and pool are one; the default against its goals; operating points; ablations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from el4ner.bench.cli import group
from el4ner.bench.finished_run import FinishedRun, compared, load_run
from el4ner.bench.merged_runs import merged
from el4ner.bench.metrics import run_metrics
from el4ner.bench.report import build_report, load_places, pool_sections
from el4ner.bench.report_goals import (
    against_baselines,
    goals_tables,
    is_baseline,
    is_own_part,
    missed_at,
    operating_section,
)
from el4ner.bench.report_markdown import render_markdown, render_table
from el4ner.bench.results_files import BEGIN, END, readme_section, results_document, write_results
from el4ner.errors import InputError

N = 60
GOLD: list[dict[str, Any]] = [
    {"id": str(n), "text": "Oslo is cold", "entities": [{"start": 0, "end": 4, "label": "place"}]} for n in range(N)
]


def answers(right: int, wrong: int = 0, score: float = 0.9) -> list[dict[str, Any]]:
    """Records with the first `right` entities found, and `wrong` false ones in the last sentences."""
    found = [{"start": 0, "end": 4, "label": "place", "score": score}]
    false = [{"start": 5, "end": 7, "label": "place", "score": score}]
    return [
        {**g, "entities": (found if n < right else []) + (false if n >= N - wrong else [])} for n, g in enumerate(GOLD)
    ]


def write_run(
    folder: Path, systems: dict[str, list[dict[str, Any]]], *, pool: str = "p1", data: str = "wnut17",
    created: str = "2026-01-01", of: int = N, **settings: Any,
) -> Path:  # fmt: skip
    """The folder of a run on GOLD; settings: of each system, by its name with _ for -."""
    (folder / "predictions").mkdir(parents=True)
    (folder / "gold.jsonl").write_text("".join(json.dumps(g) + "\n" for g in GOLD))
    for name, records in systems.items():
        (folder / "predictions" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    entries = {}
    for name in systems:
        own = settings.get(name.partition("@")[0].replace("-", "_"), {})
        target = float(name.partition("@")[2]) if "@" in name else None
        entries[name] = {
            "settings": {**own, "target_precision": target}, "settings_hash": json.dumps(own), "models": {},
            "kind": "el4ner" if name.startswith(("default", "reading")) else "baseline",
            "commands": [["el4ner-bench", "run", "--systems", name, "--out", folder.name]], "commits": ["c0ffee"],
            "report": {"asked": ["reading"], "threshold": 0.25, "notes": [], "fitted": {"operating point": {
                "threshold": 0.8, "expected on texts like the pool":
                {"precision, a standard error below": 0.91, "recall": 0.4}}}},
        }  # fmt: skip
    manifest = {
        "version": 1, "command": ["unused"], "created": created, "commit": "c0ffee", "k": 4, "seed": 0,
        "data": {"name": data, "split": "test", "sha256": data, "sentences": N, "of": of,
                 "limit": None if of == N else N, "seed": 0},
        "pool": {"sentences": len(pool), "sha256": pool}, "systems": entries,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "timings.json").write_text(json.dumps({name: {"sentences": N} for name in systems}))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two runs on the same sentences; only the first has the default, both have the dictionary."""
    first = write_run(tmp_path / "cheap", {"default": answers(50), "dictionary": answers(10)})
    later = {"kate": answers(30), "dictionary": answers(12)}
    return [first, write_run(tmp_path / "asking", later, created="2026-02-01")]


def test_runs_on_the_same_sentences_and_pool_are_one(two: list[Path], tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    CliRunner().invoke(group, ["report", *map(str, two), "--keep", str(kept)])
    for runs in (load_places(two), load_places([kept])):
        (run,) = merged(runs)
        assert set(run.metrics) == {"default", "dictionary", "kate"}
        assert run.metrics["dictionary"]["strict"]["correct"] == 12  # the newer answer
        assert [(row["a"], row["b"]) for row in run.comparisons] == [("kate", "default"), ("dictionary", "default")]
        assert run.comparisons[0]["p_holm"] == pytest.approx(2 * min(row["p"] for row in run.comparisons))
        assert run.notes == ["dictionary of cheap is left out: measured again in asking."]
        assert len(run.commands) == 3
    shown = render_markdown(build_report(load_places([kept])))
    assert "dictionary of cheap is left out" in shown
    assert shown.count("Strict scores") == 1


def test_a_digest_can_be_compared_as_its_run(two: list[Path], tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    CliRunner().invoke(group, ["report", str(two[0]), "--keep", str(kept)])
    shown = [CliRunner().invoke(group, ["compare", str(place)]).stdout for place in (two[0], kept / "cheap.json")]
    assert shown[0] == shown[1]
    assert shown[0].startswith("dictionary  F1 0.")


def test_what_is_not_the_same_stays_apart(two: list[Path], tmp_path: Path) -> None:
    other_pool = write_run(tmp_path / "pool", {"default": answers(40)}, pool="p22")
    runs = load_places([*two, other_pool])
    assert len(merged(runs)) == 2
    budget = replace(runs[1], manifest={**runs[1].manifest, "k": 8})
    assert len(merged([runs[0], budget])) == 2
    assert len(merged([runs[0], replace(runs[1], counts={})])) == 2  # nothing to compare it by
    changed = write_run(tmp_path / "changed", {"default": answers(45)}, created="2026-03-01", default={"x": 1})
    (run,) = merged(load_places([two[0], changed]))
    assert run.notes == ["default of cheap is left out: measured again with other settings in changed."]
    assert run.metrics["default"]["strict"]["correct"] == 45


def test_digests_of_another_version_are_refused(two: list[Path], tmp_path: Path) -> None:
    digest = load_run(two[0]).digest()
    assert "Oslo" not in json.dumps(digest)
    digest["metrics"]["systems"]["default"]["version"] = 0
    (tmp_path / "old.json").write_text(json.dumps(digest))
    with pytest.raises(InputError, match="another version"):
        load_run(tmp_path / "old.json")


# Goals and operating points


def with_scores(run: FinishedRun, scores: np.ndarray, right: np.ndarray) -> FinishedRun:
    """The run with other calibration of its default."""
    from el4ner.bench.calibration import calibration

    own = {**run.metrics["default"], "calibration": calibration(scores, right)}
    return replace(run, metrics={**run.metrics, "default": own})


def test_the_default_against_the_baselines(two: list[Path], tmp_path: Path) -> None:
    better = write_run(tmp_path / "tuned", {"fine-tuned": answers(55), "reading-voter": answers(50)})
    (run,) = merged(load_places([*two, better]))
    tests = against_baselines([run])
    assert set(tests) == {"dictionary", "kate", "fine-tuned", "reading-voter"}
    f1 = {name: m["strict"]["f1"] for name, m in run.metrics.items()}
    assert tests["kate"].difference == pytest.approx(f1["default"] - f1["kate"])
    assert tests["kate"].interval[0] < tests["kate"].difference < tests["kate"].interval[1]
    (row, *_), note = goals_tables([run])[0].rows, goals_tables([run])[0].note
    assert row[:3] == ["wnut17", "2 of 2 (2)", "0 of 1 (0)"]  # the reading voter alone is as good
    assert str(row[3]).startswith("reading-voter +0.000")
    assert str(row[4]).startswith("-0.0")
    assert "are beaten on 0 of 1 sets, with p < 0.05 on 0; fine-tuned on 0 of 1." in note
    (untuned,) = merged(load_places(two))
    table = goals_tables([untuned])[0]
    assert (len(table.columns), len(table.rows[0])) == (4, 4)
    assert table.rows[0][:3] == ["wnut17", "2 of 2 (2)", "–"]
    assert table.note.endswith("with p < 0.05 on 1; fine-tuned is not measured yet.")
    small_pool = load_run(write_run(tmp_path / "small", {"default": answers(50), "gpt-ner": answers(3)}, pool="p"))
    assert goals_tables([small_pool, run])[0].rows == goals_tables([run])[0].rows  # another pool, another question
    sample = replace(run, manifest={**run.manifest, "data": {**run.data, "sentences": 9, "limit": 9}})
    shifted = replace(sample, comparisons=[{**row, "difference": 0.5} for row in sample.comparisons])
    assert against_baselines([run, shifted]) == tests  # of a baseline in both, the run on more sentences


def test_what_counts_as_a_baseline(two: list[Path]) -> None:
    names = ("default", "all", "paper", "members", "member:a", "probing-voter", "membership", "member:a@0.9", "kate")
    systems: dict[str, Any] = {name: {"kind": "el4ner", "settings": {}} for name in names}
    systems["kate"] = {"kind": "baseline"}
    systems["member:a@0.9"]["settings"] = {"target_precision": 0.9}
    run = load_run(two[0])
    run = replace(run, manifest={**run.manifest, "systems": systems})
    counted = [name for name in names if is_baseline(run, name)]
    assert counted == ["paper", "members", "member:a", "probing-voter", "kate"]
    assert [name for name in counted if is_own_part(name)] == ["members", "member:a", "probing-voter"]


def test_what_scores_are_worth(tmp_path: Path) -> None:
    systems = {"default": answers(50, 5), "default@0.9": answers(52, 3), "dictionary": answers(9)}
    run = load_run(write_run(tmp_path / "r", systems))
    rng = np.random.default_rng(0)
    scores = rng.random(3000)
    good = with_scores(run, scores, (rng.random(3000) < scores).astype(float))
    assert [row["a"] for row in run.comparisons] == ["dictionary"]  # an operating point is no rival
    (row,) = goals_tables([good])[1].rows
    assert (row[1], row[6], row[9]) == ("none", "0.9", "55")
    assert str(row[7]).startswith(f"{52 / 55:.3f} [")
    (row,) = goals_tables([with_scores(run, scores**3, (rng.random(3000) < scores).astype(float))])[1].rows
    assert str(row[1]).startswith("ECE 0.")
    section = operating_section(run)
    assert section is not None
    assert section.blocks[0].rows[0][:6] == ["default@0.9", "none", "0.9", "0.800", "0.910", "0.400"]  # type: ignore[union-attr]
    assert operating_section(load_run(write_run(tmp_path / "none", {"default": answers(5)}))) is None
    (row,) = goals_tables([load_run(tmp_path / "none")])[0].rows  # no baseline there: scores only
    assert "no target precision measured" in str(row[1])


@pytest.mark.parametrize(
    ("right", "wrong", "missed"),
    [(55, 5, []), (44, 10, ["precision 0.815"]), (40, 2, ["42 entities"]), (5, 0, ["5 entities", "recall 0.083"])],
)
def test_goals_of_an_operating_point(tmp_path: Path, right: int, wrong: int, missed: list[str]) -> None:
    run = load_run(write_run(tmp_path / "r", {"default@0.9": answers(right, wrong)}))
    assert missed_at(run, "default@0.9") == missed


# Public tables


def test_whole_sets_and_samples_stand_in_the_readme(two: list[Path], tmp_path: Path) -> None:
    sample = write_run(tmp_path / "sample", {"default": answers(55), "zero-shot": answers(9)}, of=500, data="genia")
    other = write_run(tmp_path / "other", {"default": answers(55)}, data="bc5cdr")
    folder = tmp_path / "bench" / "results"
    CliRunner().invoke(group, ["report", *map(str, (*two, sample, other)), "--keep", str(folder)])
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    write_results(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| system | bc5cdr (60 sentences, pool of 2) | wnut17 (60 sentences, pool of 2) |" in text
    assert "| system | genia (60 of 500 sentences, pool of 2) |" in text
    assert "is left out" not in text
    for name in ("default", "dictionary", "kate", "zero-shot"):
        assert f"| {name} | " in text
        assert f"el4ner-bench run --systems {name} --out " in text
    assert "| wnut17 | 2 of 2 (2) | – | kate +0." in text
    # of the published numbers the best one that is no supervised model's
    assert "| bc5cdr | 0.957 | 0.741 | NuNER Zero | zero-shot |" in text
    assert "InferNER" not in text
    results = (tmp_path / "bench" / "RESULTS.md").read_text()
    assert "## The default against its goals" in results
    assert "60, all" in results
    assert "dictionary of cheap is left out: measured again in asking." in results
    assert "60 of 500, drawn with seed 0" in results


# Ablations


def test_an_ablation_is_one_table_and_a_curve(two: list[Path], tmp_path: Path) -> None:
    systems = {"default": answers(50), "pool-1": answers(20), "linear": answers(45)}
    path = write_run(tmp_path / "ablation", systems, pool_1={"pool_size": 1})
    rows = [
        {"group": "base", "name": "default", "what": "w", "base": "default", "f1": 0.9},
        {"group": "reading", "name": "linear", "what": "linear read-out", "base": "default", "f1": 0.8,
         "difference": -0.05, "ci95": [-0.09, -0.01], "p_holm": 0.012},
    ]  # fmt: skip
    (path / "ablation.json").write_text(json.dumps({"rows": rows}))
    kept = tmp_path / "kept"
    CliRunner().invoke(group, ["report", *map(str, (*two, path)), "--keep", str(kept)])
    shown = render_markdown(build_report(load_places([kept])))
    assert "| reading | linear | linear read-out | default | 0.800 | -0.050 [-0.090, -0.010] | 0.012 |" in shown
    assert shown.count("Strict scores") == 1  # of the run; the variants have their own table
    (section,) = pool_sections(load_places([kept]))
    (table,) = (block for block in section.blocks if not hasattr(block, "svg"))
    assert list(table.columns) == ["system", "1", "2"]  # type: ignore[union-attr]
    assert "linear" not in readme_section(kept)
    assert "counts" not in json.loads((kept / "ablation.json").read_text())


def test_stored_comparisons_are_those_of_the_counts(two: list[Path]) -> None:
    run = load_run(two[0])
    assert compared(replace(run, comparisons=())).comparisons == run.comparisons
    metrics = run_metrics(GOLD, answers(50))
    assert run.metrics["default"]["strict"] == metrics["strict"]
    assert render_table(goals_tables([run])[0]).startswith("The default against the baselines")


def test_public_tables_are_those_of_the_committed_runs(root: Path) -> None:
    folder = root / "bench" / "results"
    text = (root / "README.md").read_text(encoding="utf-8")
    assert f"{BEGIN}\n{readme_section(folder)}{END}" in text  # made by el4ner-bench report --write-results
    assert (root / "bench" / "RESULTS.md").read_text(encoding="utf-8") == results_document(folder)
