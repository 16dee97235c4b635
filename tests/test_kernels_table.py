"""The README's table of kernels is made from the committed rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from el4ner.bench import kernels_table
from el4ner.errors import InputError

MACHINE = {"cpu": "Some CPU", "versions": {"torch": "2.0"}, "commit": "0123456789ab"}


def span_row(side: str, seconds: float, status: str = "ok") -> dict[str, object]:
    timing = {"median_s": seconds, "min_s": 0.9 * seconds, "max_s": 1.1 * seconds} if status == "ok" else None
    shape = {"queries": 1000, "sentences": 10, "pool_spans": 30, "width": 4}
    return {"op": "span_topk", "side": side, "data": "random", "shape": shape, "status": status, "timing": timing,
            "machine": MACHINE}  # fmt: skip


def vote_row(backend: str, rival: bool, wall: float, cpu: float) -> dict[str, object]:
    timing = {"median_s": wall, "min_s": wall, "max_s": wall, "cpu_median_s": cpu}
    return {"op": "vote", "backend": backend, "rival": rival, "shape": {"members": 2, "spans": 3, "labels": 4},
            "status": "ok", "timing": timing, "machine": MACHINE}  # fmt: skip


def approximate_row(side: str, seconds: float, recall: float) -> dict[str, object]:
    return {**span_row(side, seconds), "recall": recall}


def cells(section: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]


def test_rivals_stand_against_the_fastest_of_ours(tmp_path: Path) -> None:
    rows = [
        span_row("el4ner native int8 avx512", 0.5), span_row("el4ner numba", 2.0), span_row("faiss", 3.0),
        span_row("torch", 2.0),
        span_row("usearch", 9.0, status="unavailable"), vote_row("native", False, 9.0, 0.1),
        vote_row("numpy", True, 1.0, 0.8),
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, _, topk, vote = cells(kernels_table.kernels_section(path))
    assert topk == [
        "span_topk, random, 1,000 x 10 x 30 x 4", "native int8 avx512", "0.5 (0.45..0.55)", "faiss 6.0; torch 4.0",
        "Some CPU, torch 2.0, commit 0123456",
    ]  # fmt: skip
    assert (vote[1], vote[3]) == ("native", "numpy 8.0")  # CPU time where it is known


def test_candidates_stand_against_our_exact_side_and_rivals_do_too(tmp_path: Path) -> None:
    rows = [span_row("el4ner native", 0.5), approximate_row("el4ner with FAISS", 0.2, 0.98765), span_row("faiss", 3.0)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, _, exact, candidates = cells(kernels_table.kernels_section(path))
    assert (candidates[1], candidates[3]) == ("with FAISS (recall 0.988)", "native, ours 2.5")
    assert (exact[1], exact[3]) == ("native", "faiss 6.0")  # not against what answers less


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"op": "vote"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:1: is no row of a kernel"):
        kernels_table.kernels_section(tmp_path / "rows.jsonl")


def test_the_readme_has_the_table_of_the_committed_rows(root: Path) -> None:
    section = kernels_table.kernels_section(root / "bench" / "results" / "kernels.jsonl")
    text = (root / "README.md").read_text(encoding="utf-8")
    assert f"{kernels_table.BEGIN}\n{section}{kernels_table.END}" in text  # made by el4ner-bench report --write-results
