"""el4ner-bench: rows are complete, wrong backends are not timed, usage errors are named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from el4ner.bench import ops
from el4ner.bench._harness import commit, interleave
from el4ner.bench.cli import group
from el4ner.kernels import _dispatch
from el4ner.kernels.vote import vote_ref


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.SIZES["small"], "vote", {"members": 2, "spans": 5, "labels": 3})


def test_rows_are_complete() -> None:
    done = CliRunner().invoke(group, ["kernels", "--op", "vote", "--repeats", "2"])
    assert done.exit_code == 0, done.output
    rows = {row["backend"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert set(rows) == set(_dispatch.BACKENDS)
    for row in rows.values():
        assert row["shape"] == {"members": 2, "spans": 5, "labels": 3}
        assert {"cpu", "cores", "versions", "threads", "commit"} <= set(row["machine"])
        assert (row["timing"] is not None) == (row["status"] == "ok") == (row["reason"] is None)
    timing = rows["ref"]["timing"]
    assert 0 < timing["min_s"] <= timing["median_s"] <= timing["max_s"]
    assert timing["repeats"] == 2


def test_a_wrong_backend_is_not_timed_and_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        winners, scores, margins = vote_ref(*arguments)
        return winners + 1, scores, margins

    monkeypatch.setitem(_dispatch._OPERATIONS["vote"], "numba", wrong)
    done = CliRunner().invoke(group, ["kernels", "--op", "vote", "--repeats", "1"])
    row = next(row for row in map(json.loads, done.stdout.splitlines()) if row["backend"] == "numba")
    assert (done.exit_code, row["status"], row["timing"]) == (1, "wrong", None)
    assert "differs from ref" in row["reason"]


def test_unknown_operation_is_a_usage_error() -> None:
    done = CliRunner().invoke(group, ["kernels", "--op", "fly"])
    assert done.exit_code == 2
    assert "fly; allowed: best_flat" in done.output


def test_sides_take_turns() -> None:
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b", "a", "b", "b", "a"]  # one warm-up each, then turns that rotate
    assert timings["a"].repeats == 2
    with pytest.raises(ValueError, match="at least 1"):
        interleave({}, repeats=0)


def test_commit_is_a_revision_or_nothing() -> None:
    revision = commit()
    assert revision is None or len(revision.removesuffix("+changes")) >= 12
