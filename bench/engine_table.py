"""The README's table of speeds, made from rows of `el4ner-bench engine` and `el4ner-bench pipeline`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from el4ner.bench.report_markdown import render_table
from el4ner.bench.report_model import Table
from el4ner.errors import InputError

BEGIN, END = "<!-- speed -->", "<!-- /speed -->"

_COLUMNS = (
    "what", "model", "against", "theirs, s", "ours, s", "ratio (least..most of the blocks)", "ratio of CPU times",
    "ratio of tokens", "where",
)  # fmt: skip


def speed_section(path: Path) -> str:
    """The table of a file of rows; a row's rivals are compared with the row of the engine behind them.

    Raises InputError for a line that is no such row.
    """
    rivals: list[Mapping[str, Any]] = []
    rows: list[list[str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            if row["side"] != "engine" and row["what"] == "choose":
                rivals.append(row)
                continue
            rows += _lines(row, rivals)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path.name}:{number}: is no row of a speed ({error})") from error
        rivals = [row] if (row["what"], row["side"]) == ("pipeline", "engine") else []
    table = Table(_COLUMNS, rows, names=3, words=("where",))
    return (
        "\nSame answers checked, timed in interleaved blocks, each a part of the sentences where a row says so: one\n"
        "thread, medians over blocks; work beside it disturbs the ratio of CPU times least. All numbers:\n"
        "`bench/results/engine.jsonl`.\n\n"
        f"{render_table(table)}"
    )


def _lines(row: Mapping[str, Any], rivals: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What a row completes: an engine's choices with the rivals before them, a plain pipeline with ours before it."""
    if row["what"] == "choose":
        what = f"choices of {row['questions']} questions"
        return [_line(what, row["model"], rival["side"], rival, row) for rival in rivals]
    if row["side"] == "engine":
        return []
    (ours,) = rivals
    what = f"whole pipeline, {row['sentences']} sentence{'s' if row['sentences'] > 1 else ''} of {row['data']}"
    if row.get("once"):
        what += f" in {len(row['timing']['samples_s'])} parts"
    asked = f"{', '.join(row['asked'])} ({row['settings']['dtype']})"
    return [_line(what, asked, "plain script", row, ours)]


def _line(what: str, model: str, against: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    machine, speedup = theirs["machine"], theirs["speedup"]
    tokens = theirs["tokens_run"] / max(ours["tokens_run"], 1)
    if theirs["what"] == "choose" and theirs["answered"] < theirs["questions"]:
        against += f", {theirs['answered']} of them"
        tokens *= theirs["questions"] / theirs["answered"]
    place = f"{machine['cpu']}, torch {machine['versions']['torch']}, commit {machine['commit'][:7]}"
    return [
        what, model, against, f"{theirs['timing']['median_s']:.2f}", f"{ours['timing']['median_s']:.2f}",
        f"{speedup['median']:.1f} ({speedup['min']:.1f}..{speedup['max']:.1f})", f"{theirs['cpu_speedup']:.1f}",
        f"{tokens:.1f}", place,
    ]  # fmt: skip
