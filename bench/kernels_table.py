"""The README's table of the kernels against their rivals, made from rows of `el4ner-bench kernels`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from el4ner.bench.report_markdown import render_table
from el4ner.bench.report_model import Table
from el4ner.errors import InputError

BEGIN, END = "<!-- kernels -->", "<!-- /kernels -->"

_COLUMNS = ("what", "ours", "s (least..most)", "times as fast as", "where")


def kernels_section(path: Path) -> str:
    """The table of a file of rows: a line a run, the fastest of ours against every rival.

    What FAISS's candidates give has a line of its own, against ours. A run is an operation on an input of a size, on
    one machine and commit. Raises InputError for a line that is no such row.
    """
    runs: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    lines: list[list[str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            if row["status"] == "ok" and row["timing"] is not None:
                runs.setdefault((_what(row), _where(row)), []).append(row)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path.name}:{number}: is no row of a kernel ({error})") from error
    for (what, where), rows in sorted(runs.items(), key=lambda run: run[0]):
        lines += _lines(what, where, rows)
    table = Table(_COLUMNS, lines, names=2, words=("times as fast as", "where"))
    return (
        "\nAnswers checked first, then timed in turns: CPU seconds of one thread, median and in parentheses least and\n"
        "most (of wall time where CPU time has no spread). Ours is the fastest of our backends in that run. All rows,\n"
        f"with the rivals' times: `bench/results/kernels.jsonl`.\n\n{render_table(table)}"
    )


def _lines(what: str, where: str, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    own = [row for row in rows if not _is_rival(row) and "recall" not in row]
    if not own:
        return []
    ours = min(own, key=_seconds)
    rivals = [f"{_side(row)} {_seconds(row) / _seconds(ours):.1f}" for row in rows if _is_rival(row)]
    found = [[what, _side(ours), _time(ours), "; ".join(rivals) or "–", where]]
    for row in (row for row in rows if "recall" in row):  # answers less: no match for rivals that answer exactly
        side = f"{_side(row)} (recall {row['recall']:.3f})"
        found.append([what, side, _time(row), f"{_side(ours)}, ours {_seconds(ours) / _seconds(row):.1f}", where])
    return found


def _what(row: Mapping[str, Any]) -> str:
    shape = " x ".join(f"{row['shape'][key]:,}" for key in _SHAPES[row["op"]] if key in row["shape"])
    data = f", {row['data']}" if "data" in row else ""
    return f"{row['op']}{data}, {shape}"


_SHAPES = {
    "span_topk": ("queries", "sentences", "pool_spans", "width"),
    "choice_logprobs": ("rows", "width", "vocabulary"),
    "vote": ("members", "spans", "labels"),
    "span_scores": ("tokens", "max_length", "labels"),
    "best_flat": ("tokens", "max_length", "labels"),
}


def _where(row: Mapping[str, Any]) -> str:
    machine = row["machine"]
    return f"{machine['cpu']}, torch {machine['versions']['torch']}, commit {machine['commit'][:7]}"


def _is_rival(row: Mapping[str, Any]) -> bool:
    return bool(row["rival"]) if "rival" in row else not str(row["side"]).startswith("el4ner")


def _side(row: Mapping[str, Any]) -> str:
    return str(row["side"] if "side" in row else row["backend"]).removeprefix("el4ner ")


def _seconds(row: Mapping[str, Any]) -> float:
    timing = row["timing"]
    return float(timing.get("cpu_median_s", timing["median_s"]))


def _time(row: Mapping[str, Any]) -> str:
    timing = row["timing"]
    return f"{_seconds(row):.3g} ({timing['min_s']:.3g}..{timing['max_s']:.3g})"
