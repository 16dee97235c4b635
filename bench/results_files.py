"""Public text made from committed results: bench/RESULTS.md and the results section of README.md.

Committed are digests of runs (`el4ner-bench report DIR --keep bench/results`), which hold numbers and no texts. The
README's section stands between two markers; everything else in it stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from el4ner.bench import engine_table, kernels_table
from el4ner.bench.finished_run import REFERENCE, FinishedRun
from el4ner.bench.merged_runs import merged
from el4ner.bench.report import build_report, load_anchors, load_places
from el4ner.bench.report_goals import ALPHA, goals_tables
from el4ner.bench.report_markdown import escape, fenced, render_markdown, render_table
from el4ner.bench.report_model import Cell, Table
from el4ner.bench.report_scores import with_interval
from el4ner.errors import InputError
from el4ner.lines import display_name
from el4ner.output import OutputFile

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def keep_digests(runs: Sequence[FinishedRun], folder: Path) -> list[Path]:
    """Write each run's digest as NAME.json into a folder. Raises InputError if two runs have one name."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise InputError(f"runs of the same name ({', '.join(sorted(names))}); rename their folders")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for run in runs:
        path = folder / f"{run.name}.json"
        _write(path, json.dumps(run.digest(), separators=(",", ":")) + "\n")
        paths.append(path)
    return paths


def write_results(root: Path) -> list[Path]:
    """Make bench/RESULTS.md and README.md's section from root/bench/results; the files written.

    Raises InputError if there are no results, or README.md lacks the markers.
    """
    readme = root / "README.md"
    section = readme_section(root / "bench" / "results")
    renewed = between_markers(_read(readme), section, display_name(readme))
    for table, make, name in (
        (engine_table, engine_table.speed_section, "engine.jsonl"),
        (kernels_table, kernels_table.kernels_section, "kernels.jsonl"),
    ):
        rows = root / "bench" / "results" / name
        if rows.is_file() and table.BEGIN in renewed:
            renewed = between_markers(renewed, make(rows), display_name(readme), (table.BEGIN, table.END))
    results = root / "bench" / "RESULTS.md"
    _write(results, results_document(root / "bench" / "results"))
    _write(readme, renewed)
    return [results, readme]


def between_markers(text: str, section: str, name: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """A text with what stands between the markers replaced. Raises InputError unless each marker stands there once."""
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InputError(f"{name}: needs the lines {begin} and {end} once each, in this order, around the results")
    return f"{text[: text.index(begin)]}{begin}\n{section}{text[text.index(end) :]}"


def results_document(folder: Path) -> str:
    """RESULTS.md: the whole report on committed runs."""
    runs = _committed(folder)
    head = "<!-- Made by `el4ner-bench report --write-results` from bench/results; do not edit. -->\n\n"
    report = render_markdown(build_report(runs, "Results")) if runs else "# Results\n\n"
    return head + report.rstrip() + "\n"


def readme_section(folder: Path) -> str:
    """The README's tables: strict F1 by system and set, whole test sets and samples apart; the default against its
    goals; commands to repeat it."""
    runs, left_out = _chosen(_committed(folder))
    parts = [
        "\nMade by `el4ner-bench report --write-results` from `bench/results`; all numbers are in `bench/RESULTS.md`.\n"
        "Strict F1 with 95% bootstrap intervals over sentences. \\*: "
        f"`{REFERENCE}` is better with p < {ALPHA} by a\npaired permutation test, corrected after Holm.\n\n"
    ]
    whole = [run for run in runs if not _is_sample(run)]
    samples = [run for run in runs if _is_sample(run)]
    for title, group in (("Whole test sets", whole), ("Seeded samples, the same sentences for all systems", samples)):
        if group:
            parts.append(render_table(_pivot(group, title)))
    parts += map(render_table, goals_tables(runs))
    if (published := _published(whole)).rows:
        parts.append(render_table(published))
    parts += [f"{escape(line)}\n\n" for line in left_out]
    if runs:
        commands = dict.fromkeys(line for run in runs for line in run.commands)
        parts.append(f"Made where the folders of the data are, by:\n\n{fenced(commands)}")
    else:
        parts.append("Not measured yet.\n")
    return "".join(parts)


def _pivot(runs: Sequence[FinishedRun], title: str) -> Table:
    names = dict.fromkeys(name for run in runs for name in run.metrics if run.target_precision(name) is None)
    mean = {name: [run.metrics[name]["strict"]["f1"] for run in runs if name in run.metrics] for name in names}
    rows: list[list[Cell | str]] = []
    for name in sorted(names, key=lambda n: (-sum(mean[n]) / len(mean[n]), n)):
        row: list[Cell | str] = [name]
        for run in runs:
            if name not in run.metrics:
                row.append("–")
                continue
            strict = run.metrics[name]["strict"]
            best = max(run.metrics[other]["strict"]["f1"] for other in names if other in run.metrics)
            mark = "*" if _is_beaten(run, name) else ""
            row.append(Cell(with_interval(strict["f1"], strict["ci95"]) + mark, is_strong=strict["f1"] == best))
        rows.append(row)
    columns = [_heading(run) for run in runs]
    return Table(["system", *columns], rows, title)


def _published(runs: Sequence[FinishedRun]) -> Table:
    """The default beside the best number that others published of a method that is not trained on the set."""
    rows: list[list[Cell | str]] = []
    anchors = load_anchors()
    for run in runs:
        found = [a for a in anchors if a["data"] == run.data["name"] and a["kind"] != "supervised"]
        if found and REFERENCE in run.metrics:
            best = max(found, key=lambda anchor: float(anchor["f1"]))
            own = f"{run.metrics[REFERENCE]['strict']['f1']:.3f}"
            rows.append([run.data["name"], own, f"{best['f1']:.3f}", best["system"], best["kind"], best["differs"]])
    columns = ["set", "default, strict F1", "published F1", "of", "kind", "what differs"]
    note = (
        "Not reproduced here; models, data and scoring differ. A set without a row has no such number. Sources and "
        "further numbers: bench/RESULTS.md."
    )
    title = "Beside the best published number of a method that is not trained on the set"
    return Table(columns, rows, title, note, words=("of", "kind", "what differs"))


def _heading(run: FinishedRun) -> str:
    """ "wnut17 (200 of 1,287 sentences, pool of 3,394)" """
    n, of = run.data.get("sentences") or 0, run.data.get("of")
    sentences = f"{n:,} of {of:,} sentences" if _is_sample(run) and of else f"{n:,} sentences"
    return f"{run.data['name']} ({sentences}" + (")" if run.pool_size is None else f", pool of {run.pool_size:,})")


def _is_beaten(run: FinishedRun, name: str) -> bool:
    """Whether the reference is significantly better than a system."""
    for test in run.comparisons:
        if test["a"] == name and test["b"] == REFERENCE:
            p = test["p"] if test.get("p_holm") is None else test["p_holm"]
            return bool(test["difference"] < 0 and p < ALPHA)
    return False


def _is_sample(run: FinishedRun) -> bool:
    return run.data.get("limit") is not None and run.data.get("sentences") != run.data.get("of")


def _chosen(runs: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[str]]:
    """One run for each set of test sentences, in order of data, and what is left out, in words.

    Runs on the same sentences with the same pool are one, in which the newest answers count (RESULTS.md says whose);
    of others the one with the largest pool stays, then the newest. Ablations and other splits than test have no place
    here.
    """
    groups: dict[tuple[Any, ...], list[FinishedRun]] = {}
    for run in merged([run for run in runs if run.data.get("split", "test") == "test" and not run.ablation]):
        groups.setdefault((run.data["name"], run.data.get("sentences"), run.data.get("seed")), []).append(run)
    chosen: list[FinishedRun] = []
    left_out: list[str] = []
    for key in sorted(groups, key=str):
        best, *others = sorted(groups[key], key=_rank, reverse=True)
        chosen.append(best)
        left_out += [
            f"{run.name} (pool of {run.pool_size}: {', '.join(run.metrics)}) is left out here; of runs on the same "
            f"sentences that with the largest pool stands, then the newest: {best.name}."
            for run in others
        ]
    return chosen, left_out


def _rank(run: FinishedRun) -> tuple[int, str]:
    return run.pool_size or 0, str(run.manifest.get("created", ""))


def _committed(folder: Path) -> list[FinishedRun]:
    return load_places([folder]) if any(folder.glob("*.json")) else []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{display_name(path)}: cannot be read ({error})") from None


def _write(path: Path, text: str) -> None:
    with OutputFile(path) as file:
        file.write(text.encode())
