"""A report on finished runs: what was run, how right each system is, what it costs, where it errs, who else did what.

`build_report` arranges; `report_scores` and `report_details` make the parts; `report_html` and `report_markdown` write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from el4ner.bench.finished_run import REFERENCE, FinishedRun, load_run
from el4ner.bench.merged_runs import merged
from el4ner.bench.report_charts import Point, line_chart
from el4ner.bench.report_details import (
    ablation_table,
    calibration_section,
    confusion_section,
    cost_section,
    decided_section,
    errors_section,
    examples_sections,
    stages_section,
)
from el4ner.bench.report_goals import goals_section, operating_section
from el4ner.bench.report_model import Block, Chart, Command, Link, Report, Section, Table
from el4ner.bench.report_scores import (
    groups_section,
    labels_section,
    ranked,
    schemes_section,
    strict_section,
    with_interval,
)
from el4ner.errors import InputError
from el4ner.lines import display_name

ANCHORS = Path(__file__).with_name("anchors.yaml")


def load_places(places: Sequence[Path]) -> list[FinishedRun]:
    """Runs from run folders, digests, and folders of digests, in that order; sorted by data set within a folder.

    Raises InputError if a folder holds neither.
    """
    runs = []
    for place in places:
        if place.is_dir() and not (place / "manifest.json").is_file():
            digests = sorted(place.glob("*.json"))
            if not digests:
                raise InputError(f"{display_name(place)}: has neither manifest.json nor digests (*.json) of runs")
            runs += [load_run(digest) for digest in digests]
        else:
            runs.append(load_run(place))
    return runs


def build_report(runs: Sequence[FinishedRun], title: str = "Evaluation of named-entity recognition") -> Report:
    """All sections: an overview, what was aimed at, each run, pool sizes, published results, how to repeat it.

    Runs on the same sentences with the same pool are one.
    """
    united = merged(runs)
    sections: list[Section | None] = [_overview(united), goals_section(united)]
    for run in united:
        sections += _run_sections(run)
    sections += [*pool_sections(united), anchors_section(united), repeat_section(runs)]
    return Report(title, [section for section in sections if section is not None])


def sample_words(run: FinishedRun) -> str:
    """ "60 of 431, seed 0", or "431, all"."""
    data = run.data
    n, of = data.get("sentences"), data.get("of")
    if data.get("limit") is None or n == of:
        return f"{n:,}, all"
    return f"{n:,}{f' of {of:,}' if of else ''}, drawn with seed {data.get('seed')}"


def _title(run: FinishedRun) -> str:
    return f"{run.data['name']}, {run.data.get('split', 'test')}: {sample_words(run)} ({run.name})"


def _overview(runs: Sequence[FinishedRun]) -> Section:
    rows = []
    for run in runs:
        pool = run.manifest.get("pool") or {}
        names = ranked(run)
        best = run.metrics[names[0]]["strict"] if names else None
        rows.append(
            [
                run.name,
                run.data["name"],
                run.data.get("split", ""),
                sample_words(run),
                _count(run.pool_size),
                _count(pool.get("dropped_duplicates")),
                _count(pool.get("near_duplicates")),
                str(len(run.metrics)),
                "–" if best is None else f"{names[0]} {with_interval(best['f1'], best['ci95'])}",
            ]
        )
    columns = [
        "run",
        "data",
        "split",
        "sentences",
        "pool",
        "copies dropped",
        "near copies",
        "systems",
        "best strict F1 [95%]",
    ]
    unfinished = [f"{run.name}: {words}" for run in runs for words in (*_unfinished(run), *run.notes)]
    note = "Copies dropped: sentences of the test data that also stood in the pool. Near copies are reported and kept."
    return Section("Overview", [Table(columns, rows, note=note, names=4), *unfinished])


def _unfinished(run: FinishedRun) -> Iterator[str]:
    for name, done in run.unfinished.items():
        refused = run.entry(name).get("refused")
        if refused:
            yield f"{name} was not run: {refused}."
        else:
            yield f"{name} has answered {done:,} of {run.data.get('sentences'):,} sentences and is left out."


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"


def _run_sections(run: FinishedRun) -> list[Section | None]:
    if not run.metrics:
        return [Section(_title(run), ["No system has answered all sentences yet."])]
    pool = run.manifest.get("pool") or {}
    said = (
        f"Pool: {_count(run.pool_size)} sentences, {_count(pool.get('entities'))} entities. At most "
        f"{run.manifest.get('k', '–')} demonstrations in any prompt. Seed {run.manifest.get('seed', '–')}."
    )
    if run.ablation:
        table = ablation_table(run.ablation, int(run.data.get("sentences") or 0))
        return [Section(f"Ablation: {_title(run)}", [said, table])]
    parts = [
        strict_section(run), cost_section(run), stages_section(run), calibration_section(run), operating_section(run),
        decided_section(run), labels_section(run), groups_section(run), errors_section(run), schemes_section(run),
        confusion_section(run), *examples_sections(run),
    ]  # fmt: skip
    return [Section(_title(run), [said]), *parts]


# Over several runs


def pool_sections(runs: Sequence[FinishedRun]) -> Iterator[Section]:
    """F1 over the size of the pool, where runs on the same sentences, or an ablation's variants, differ in it."""
    groups: dict[tuple[Any, ...], dict[tuple[str, int], Point]] = {}
    for run in runs:
        data = run.data
        key = (data["name"], data.get("split"), data.get("sentences"), data.get("limit"), data.get("seed"))
        for name, metrics in run.metrics.items():
            part = run.settings(name).get("pool_size")  # a variant of the default that uses a part of the pool
            series, size = (REFERENCE, part) if isinstance(part, int) else (name, run.pool_size)
            if size is not None:
                strict = metrics["strict"]
                point = Point(series, float(size), strict["f1"], strict["ci95"])
                groups.setdefault(key, {})[series, size] = point
    for key, points in groups.items():
        curves: dict[str, list[Point]] = {}
        for (series, _), point in sorted(points.items()):
            curves.setdefault(series, []).append(point)
        curves = {series: own for series, own in curves.items() if len(own) > 1}
        if curves:
            yield _pool_section(f"{key[0]}, {key[1]}, {key[2] or 0:,} sentences", curves)


def _pool_section(title: str, curves: Mapping[str, Sequence[Point]]) -> Section:
    sizes = sorted({point.x for points in curves.values() for point in points})
    rows = []
    for name, points in curves.items():
        at = {point.x: with_interval(point.y, point.interval) for point in points}
        rows.append([name, *(at.get(size, "–") for size in sizes)])
    blocks: list[Block] = [
        Chart(
            line_chart(curves, f"Strict F1 over pool size on {title}", "sentences in the pool"),
            "Strict F1, 95% intervals",
        ),
        Table(["system", *(f"{size:,.0f}" for size in sizes)], rows, "Strict F1 [95%] by sentences in the pool"),
    ]
    return Section(f"Size of the pool: {title}", blocks)


_ANCHOR_KEYS = ("data", "system", "kind", "f1", "seen", "source", "differs")


def load_anchors() -> list[dict[str, Any]]:
    """Published results that ship with the package. Raises InputError if the file is damaged."""
    rows = yaml.safe_load(ANCHORS.read_text(encoding="utf-8"))
    for row in rows:
        if set(row) != set(_ANCHOR_KEYS) or not 0 < row["f1"] < 1 or not row["source"].startswith("https://"):
            raise InputError(f"{ANCHORS.name}: {row} needs {', '.join(_ANCHOR_KEYS)}; F1 from 0 to 1; an https source")
    return list(rows)


def anchors_section(runs: Sequence[FinishedRun]) -> Section | None:
    """Published results on the sets of these runs, beside our best; None if there are none."""
    anchors = load_anchors()
    blocks: list[Block] = []
    for name in dict.fromkeys(run.data["name"] for run in runs if run.metrics):
        published = sorted((row for row in anchors if row["data"] == name), key=lambda row: -row["f1"])
        if not published:
            continue
        rows: list[list[Any]] = [
            [row["system"], row["kind"], row["differs"], row["seen"], Link(row["source"]), f"{row['f1']:.3f}"]
            for row in published
        ]
        for run in (run for run in runs if run.data["name"] == name and run.metrics and not run.ablation):
            best = ranked(run)[0]
            strict = run.metrics[best]["strict"]
            about = f"sentences: {sample_words(run)}; pool of {_count(run.pool_size)}"
            rows.append([f"here: {best}", "measured", about, run.name, "", with_interval(strict["f1"], strict["ci95"])])
        blocks.append(Table(["system", "kind", "what differs", "seen in", "source", "F1"], rows, name, names=5))
    if not blocks:
        return None
    note = "Published numbers are copied from their sources, not reproduced here; models, data and scoring differ."
    return Section("Published results", [note, *blocks])


def repeat_section(runs: Sequence[FinishedRun]) -> Section:
    """Commands, versions, hardware, and settings by their hash."""
    blocks: list[Block] = []
    for run in runs:
        manifest = run.manifest
        blocks.append(
            f"{run.name}, made {manifest.get('created', '?')} at commit {manifest.get('commit') or 'unknown'}:"
        )
        blocks += [Command(line) for line in run.commands or ["unknown"]]
    facts = [_facts(run) for run in runs]
    columns = list(dict.fromkeys(key for row in facts for key in row))
    places = [[run.name, *(row.get(c, "–") for c in columns)] for run, row in zip(runs, facts, strict=True)]
    blocks.append(Table(["run", *columns], places, "Where"))
    rows = [
        [
            run.name,
            name,
            str(entry.get("settings_hash", ""))[:12],
            ", ".join(map(str, entry.get("commits") or [run.manifest.get("commit") or "unknown"])),
            ", ".join(map(str, _models(entry).values())) or "–",
        ]
        for run in runs
        for name, entry in run.manifest["systems"].items()
    ]
    caption = "Settings by the beginning of their hash; models by revision"
    blocks.append(Table(["run", "system", "settings", "commit", "models"], rows, caption, names=5))
    return Section("How to repeat this", blocks)


def _facts(run: FinishedRun) -> dict[str, str]:
    hardware = run.manifest.get("hardware") or {}
    versions = run.manifest.get("versions") or {}
    facts = {}
    for key in ("cpu", "cores", "threads", "cuda", "load_1min"):
        if key in hardware:
            value = hardware[key]
            facts[key] = (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
    facts |= {name: str(version) for name, version in versions.items()}
    return {**facts, "data sha256": str(run.data.get("sha256", ""))[:12]}


def _models(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    found = entry.get("models")
    return found if isinstance(found, Mapping) else {}
