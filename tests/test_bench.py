"""el4ner-bench: rows are complete, wrong backends are not timed, usage errors are named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from el4ner.bench import ops
from el4ner.bench._harness import commit, interleave
from el4ner.bench.cli import group
from el4ner.bench.cli import main as bench_main
from el4ner.bench.cli_options import assigned
from el4ner.kernels import _dispatch
from el4ner.kernels.vote import vote_ref


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.SIZES["small"], "vote", {"members": 2, "spans": 5, "labels": 3})


def test_rows_are_complete() -> None:
    done = CliRunner().invoke(group, ["kernels", "--op", "vote", "--repeats", "2", "--json", "-"])
    assert done.exit_code == 0, done.output
    rows = {row["backend"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert {name for name, row in rows.items() if not row["rival"]} == set(_dispatch.BACKENDS)
    assert any(row["rival"] and row["status"] == "ok" for row in rows.values())
    for row in rows.values():
        assert row["shape"] == {"members": 2, "spans": 5, "labels": 3}
        assert {"cpu", "cores", "versions", "threads", "commit"} <= set(row["machine"])
        assert (row["timing"] is not None) == (row["status"] == "ok") == (row["reason"] is None)
    timing = rows["ref"]["timing"]
    assert 0 < timing["min_s"] <= timing["median_s"] <= timing["max_s"]
    assert timing["repeats"] == 2


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "measure", interrupted)
    done = CliRunner().invoke(group, ["kernels", "--op", "vote"])
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")


def test_an_unexpected_error_is_one_line_unless_debugging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr(ops, "measure", broken)
    monkeypatch.setattr(sys, "argv", ["el4ner-bench", "kernels", "--op", "vote"])
    monkeypatch.delenv("EL4NER_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        bench_main()
    assert ended.value.code == 1
    hint = "run with EL4NER_DEBUG=1 for the traceback"
    assert capsys.readouterr().err == f"error: unexpected ZeroDivisionError: by nothing; {hint}\n"
    monkeypatch.setenv("EL4NER_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        bench_main()


def test_a_wrong_backend_is_not_timed_and_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        winners, scores, margins = vote_ref(*arguments)
        return winners + 1, scores, margins

    monkeypatch.setitem(_dispatch._OPERATIONS["vote"], "numba", wrong)
    done = CliRunner().invoke(group, ["kernels", "--op", "vote", "--repeats", "1", "--json", "-"])
    row = next(row for row in map(json.loads, done.stdout.splitlines()) if row["backend"] == "numba")
    assert (done.exit_code, row["status"], row["timing"]) == (1, "wrong", None)
    assert "differs from ref" in row["reason"]


def test_a_wrong_rival_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from el4ner.bench import ops
    from el4ner.bench.rivals import Rival

    def crash() -> Any:
        raise RuntimeError("no such operator\ndetails")

    def wrong(op: str, case: Any, device: str) -> Any:
        yield Rival("off", lambda: tuple(a + a.dtype.type(1) for a in case.run("ref")), 1e-6, "none")
        yield Rival("less", lambda: case.run("ref")[:1], None, "gives winners only")
        yield Rival("lacking", crash, 1e-6, "none")
        yield Rival("lacking more", crash, None, "gives nothing")
        yield Rival("absent", lambda: (), 0.0, "", unavailable="not installed")

    monkeypatch.setattr(ops, "rivals", wrong)
    done = CliRunner().invoke(group, ["kernels", "--op", "vote", "--backend", "numba", "--repeats", "1", "--json", "-"])
    rows = {row["backend"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.exit_code == 0  # a rival's fault is not ours
    assert {name: (row["status"], row["timing"] is None) for name, row in rows.items()} == {
        "numba": ("ok", False),
        "off": ("wrong", True),
        "less": ("ok", False),
        "lacking": ("wrong", True),
        "lacking more": ("wrong", True),
        "absent": ("unavailable", True),
    }
    assert rows["lacking"]["reason"] == rows["lacking more"]["reason"] == "RuntimeError: no such operator"
    assert rows["absent"]["reason"] == "not installed"


def test_large_sizes_are_checked_on_a_sample_and_against_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong span outside the sample is found, since sides are compared over the whole size."""
    monkeypatch.setitem(ops.SAMPLED, "vote", 2)
    rows = {row["backend"]: row for row in ops.measure("vote", size="small", repeats=1, seed=0)}
    assert "would take minutes" in rows["ref"]["reason"]
    assert rows["numba"]["status"] == "ok"

    def off_by_one_span(*arguments: Any) -> Any:
        winners, scores, margins = vote_ref(*arguments)
        if len(winners) == 5:
            scores[~np.isin(np.arange(5), ops._expected(ops.make_case("vote", "small", 0, "cpu"), 0)[0])] += 0.1
        return winners, scores, margins

    monkeypatch.setitem(_dispatch._OPERATIONS["vote"], "numba", off_by_one_span)
    rows = {row["backend"]: row for row in ops.measure("vote", size="small", repeats=1, seed=0)}
    if rows["native"]["status"] == "ok":  # without a compiler there is nothing to compare with
        assert rows["numba"]["status"] == "wrong"
    picks, expected = ops._expected(ops.make_case("span_topk", "small", 0, "cpu"), 0)
    assert picks is None or len(picks) == len(expected[0])


def test_tables_and_files(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    for _ in range(2):  # rows are appended
        done = CliRunner().invoke(
            group, ["kernels", "--op", "vote", "--threads", "1", "--repeats", "1", "--json", str(out)]
        )
        assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 * (len(_dispatch.BACKENDS) + 2)
    assert "vote (small, cpu): members=2 spans=5 labels=3" in done.stdout
    assert "1 threads" in done.stdout
    timed = next(row for row in rows if row["backend"] == "ref")
    assert timed["ratio"]["min"] <= timed["ratio"]["median"] <= timed["ratio"]["max"]
    assert timed["roofline"]["share"] >= 0
    for wrong in (["--sizes", "huge"], ["--backend", "gpu"]):
        done = CliRunner().invoke(group, ["kernels", *wrong])
        assert done.exit_code == 2
        assert "allowed:" in done.output


def test_unknown_operation_is_a_usage_error() -> None:
    done = CliRunner().invoke(group, ["kernels", "--op", "fly"])
    assert done.exit_code == 2
    assert "fly; allowed: best_flat" in done.output


@pytest.mark.parametrize("command", ["kernels", "engine", "pipeline"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(command: str, tmp_path: Path) -> None:
    refused = CliRunner().invoke(group, [command, "--json", str(tmp_path / "missing" / "rows.jsonl")])
    assert refused.exit_code == 2
    assert "cannot be written (No such file or directory)" in refused.output


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "retrieve.k=5"], "all systems may show as many demonstrations; use --k"),
        (["--set", "a=["], "'a=[': not YAML ("),
        (["--set", "a={b: 1, b: 2}"], 'key "b" stands twice'),
        (["--set", "a=1", "--set", "a.b=2"], "'a.b=2': a has a value already"),
        (["--set", "a.b=2", "--set", "a=1"], "'a=1': parts of a are set already"),
        (["--set", "a..b=2"], "write NAME=VALUE"),
        (["--set", "=2"], "write NAME=VALUE"),
        (["--systems", " "], "' ' names nothing; write names, separated by commas"),
        (["--systems", ","], "',' names nothing"),
    ],
)
def test_wrong_options_of_run_are_usage_errors(options: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(group, ["run", "--data", "nowhere", "--out", str(tmp_path / "out"), *options])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    empty = CliRunner().invoke(group, ["kernels", "--sizes", " "])
    assert (empty.exit_code, "names nothing" in empty.output) == (2, True)


def test_assignments_nest() -> None:
    given = ("a.b=1", "a.c=[x, 2]", "d=true", "a.b=3")
    assert assigned(given) == {"a": {"b": 3, "c": ["x", 2]}, "d": True}
