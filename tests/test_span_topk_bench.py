"""span_topk beside its rivals: who answers wrongly is not timed, and rows say what was answered."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from el4ner.bench import ops, rivals_span_topk, span_sides
from el4ner.bench._harness import OverBudgetError, within
from el4ner.bench.cli import group
from el4ner.bench.rivals import crash
from el4ner.bench.rivals_span_topk import rows, table
from el4ner.bench.span_oracle import agreement, agreement_but_ties, oracle
from el4ner.bench.span_pools import SpanInput, real, synthetic
from el4ner.bench.span_sides import SENTENCES, Side, exactly
from el4ner.errors import InputError
from el4ner.kernels import SpanPool, available_backends, span_topk

FACTS = {"cpu": "A CPU", "commit": None, "versions": {"torch": "2"}}


def small(name: str = "clustered") -> SpanInput:
    return synthetic(name, queries=6, sentences=60, width=16, seed=1)


@pytest.mark.parametrize("name", ["clustered", "random"])
def test_the_oracle_is_the_reference(name: str) -> None:
    data = small(name)
    expected = span_topk(data.queries, data.offsets, data.weights, data.pool, 20, backend="ref")
    share, gap = exactly(oracle(data, 20), expected)
    assert share == 1.0
    assert gap <= 1.2e-7  # two orders of float64 sums, each rounded once


def test_the_oracle_knows_empty_sentences_and_queries() -> None:
    data = small()
    offsets = np.concatenate([[0, 0], data.pool.offsets[1:], data.pool.offsets[-1:]])
    empty = replace(data, pool=SpanPool.pack(data.pool.vectors, offsets), offsets=np.concatenate([[0], data.offsets]))
    expected = span_topk(empty.queries, empty.offsets, empty.weights, empty.pool, 70, backend="ref")
    assert np.array_equal(oracle(empty, 70)[0], expected[0])


def test_ties_may_be_ordered_otherwise_and_nothing_else() -> None:
    data = small()
    vectors, offsets = data.pool.vectors, data.pool.offsets
    twice = np.concatenate([offsets, offsets[-1] + offsets[1:]])  # every sentence stands there twice
    tied = replace(data, pool=SpanPool.pack(np.concatenate([vectors, vectors]), twice))
    expected = oracle(tied, 3)
    n = data.pool.sentences
    ids = np.where(expected[0] < 0, -1, (expected[0] + n) % (2 * n))  # the other copy of each
    assert agreement((ids, expected[1]), expected)[0] < 1
    assert agreement_but_ties(tied, (ids, expected[1]), expected, 1e-6) == 1.0
    worst = np.argmin(oracle(tied, 2 * n)[1][0])
    ids[0, 0] = oracle(tied, 2 * n)[0][0, worst]
    assert agreement_but_ties(tied, (ids, expected[1]), expected, 1e-6) < 1.0


def test_a_rival_that_crashes_is_told_from_one_that_raises() -> None:
    assert crash(os.abort) == f"crashes with signal {signal.SIGABRT}"
    assert crash(partial(int, "no number")) is None
    broken = Side("a rival", SENTENCES, os.abort, lambda r: (1.0, 0.0), 0.0, fragile=True)
    assert rivals_span_topk._check(broken)["status"] == "unavailable"
    well = replace(broken, run=partial(int, "1"))
    assert rivals_span_topk._check(well)["status"] == "ok"
    after = rivals_span_topk._check(well, crashed="crashed with signal 11 while it was timed")
    assert (after["status"], after["reason"]) == ("unavailable", "crashed with signal 11 while it was timed")
    assert rivals_span_topk._check(replace(well, fragile=False), crashed="crashed")["status"] == "ok"


def test_an_input_whose_process_crashes_is_measured_without_fragile_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "--data" not in command:  # what asks for the commit
            return subprocess.CompletedProcess(command, 1, "")
        calls.append(command)
        return subprocess.CompletedProcess(command, -11 if "--crashed" not in command else 0, '{"side": "ours"}\n')

    monkeypatch.setattr(rivals_span_topk.subprocess, "run", run)
    assert list(rivals_span_topk.measure(size="small", repeats=1, seed=0)) == [{"side": "ours"}]
    assert [command[-1] for command in calls][1] == "crashed with signal 11 while it was timed"


def test_large_pools_are_those_where_faiss_proposes(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[str] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "--data" in command:
            inputs.append(command[command.index("--data") + 1])
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(rivals_span_topk.subprocess, "run", run)
    monkeypatch.setenv("EL4NER_DATA", "somewhere")
    assert list(rivals_span_topk.measure(size="large", repeats=1, seed=0)) == []
    monkeypatch.delenv("EL4NER_DATA")
    assert list(rivals_span_topk.measure(size="large", repeats=1, seed=0)) == []
    assert inputs == ["clustered", "random", "genia", "clustered", "random"]


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
def test_every_side_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EL4NER_ISA", "")
    monkeypatch.setenv("EL4NER_THREADS", "1")
    measured = list(rows(small(), k=20, repeats=1, seed=1, facts=FACTS))
    assert [row["reason"] for row in measured] == [None] * len(measured)
    for row in measured:
        assert row["status"] == "ok"
        assert row["timing"]["median_s"] > 0
        assert row["agreement"] > 0.9
        assert 0 < row["part_timed"] <= 1
    names = [row["side"] for row in measured]
    assert any("segment_reduce" in name for name in names)
    if available_backends("span_topk")["native"] is None:
        assert 0 <= measured[0]["certified"] <= 1
        assert measured[0]["times_ours"] == 1
    text = table(measured)
    for name in names:
        assert name in text
    assert ops.table(measured).startswith("span_topk, clustered: queries 6")
    both = ops.table([*measured, *({**row, "data": "random"} for row in measured)])
    assert both.startswith(text)
    assert "\n\nspan_topk, random: queries 6" in both


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
def test_a_part_of_the_queries_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of ours and FAISS's candidates answer all queries, the definition and everybody else three."""
    monkeypatch.setenv("EL4NER_ISA", "")
    monkeypatch.setenv("EL4NER_THREADS", "1")
    monkeypatch.setattr(span_sides, "LARGE", 100)
    data = small()
    measured = list(rows(data, k=20, repeats=1, seed=1, facts=FACTS, sample=3))
    assert [row["reason"] for row in measured] == [None] * len(measured)
    assert {row["checked_queries"] for row in measured} == {3}
    whole = [row["side"] for row in measured if row["part_timed"] == 1]
    assert len(whole) == (2 if importlib.util.find_spec("faiss") else 1)
    assert whole[0] == measured[0]["side"]
    picks = np.sort(np.random.default_rng(1).choice(6, 3, replace=False))
    spans = np.diff(data.offsets)[picks].sum()
    assert {row["part_timed"] for row in measured if "torch" in row["side"]} == {spans / len(data.queries)}
    if importlib.util.find_spec("faiss"):
        found = measured[1]
        assert found["recall"] == found["agreement"] == 1.0  # 300 spans: all are proposed
        assert found["recall_over"] == "all 6 queries"
        faster = measured[0]["timing"]["median_s"] / found["timing"]["median_s"]
        assert found["speedup_over_exact"] == pytest.approx(faster, abs=0.005)
        assert f"recall 1.0000 over all 6 queries, {found['speedup_over_exact']} times as fast" in table(measured)
    assert [row["side"] for row in rows(data, k=20, repeats=1, seed=1, facts=FACTS, only=["bucketed"])] == [
        "torch fp32 bucketed by length", "torch bf16 bucketed by length"
    ]  # fmt: skip


def test_a_part_has_the_spans_of_its_queries() -> None:
    data = small()
    part = data.only(np.array([1, 4]))
    assert part.pool is data.pool
    for n, b in enumerate((1, 4)):
        own, whole = slice(part.offsets[n], part.offsets[n + 1]), slice(data.offsets[b], data.offsets[b + 1])
        assert np.array_equal(part.queries[own], data.queries[whole])
        assert np.array_equal(part.weights[own], data.weights[whole])
    assert part.offsets[-1] == len(part.queries) == len(part.weights)
    expected = oracle(data, 5)
    assert np.array_equal(oracle(part, 5)[0], expected[0][[1, 4]])


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_rival_that_takes_too_long_is_dropped_and_says_so() -> None:
    slow = Side("a rival", SENTENCES, partial(spin, 30), lambda r: (1.0, 0.0), 0.0, part=0.25)
    began = time.process_time()
    told = rivals_span_topk._check(slow, call_s=0.05)
    assert time.process_time() - began < 10  # it was stopped
    assert told["status"] == "dropped"
    assert told["reason"] == "one call takes more than 0.05 CPU seconds for 25.0% of the work; --budget allows more"
    ours = replace(slow, name="el4ner anything", run=partial(spin, 0.1))
    assert rivals_span_topk._check(ours, call_s=0.05)["status"] == "ok"
    text = table([{"side": "a rival", "data": "d", "shape": {"k": 1}, "machine": FACTS, "timing": None, **told}])
    assert "dropped: one call takes more than 0.05 CPU seconds" in text


def test_the_budget_holds_where_no_signal_can_come() -> None:
    """Outside the main thread, and with calls that do not come back to Python: afterwards."""
    seen: list[BaseException] = []

    def call() -> None:
        try:
            with within(0.01):
                spin(0.05)
        except OverBudgetError as error:
            seen.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert [str(error) for error in seen] == ["0.01 CPU seconds"]
    with within(30), within(None):
        spin(0.01)


def test_a_wrong_side_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = small()
    expected = oracle(data, 20)
    moved = np.roll(expected[0], 1, axis=1), expected[1]
    wrong = Side("el4ner wrong", SENTENCES, lambda: moved, lambda r: exactly(r, expected), 1.2e-7)
    off = Side(
        "torch off", SENTENCES, lambda: (expected[0], expected[1] + 1e-3), lambda r: agreement(r, expected), 5e-6
    )
    crash = Side("torch crash", SENTENCES, lambda: 1 / np.zeros(0)[1], lambda r: agreement(r, expected), 5e-6)
    monkeypatch.setattr(rivals_span_topk, "our_sides", lambda *_: [wrong, off])
    for name in ("torch_sides", "span_sides", "maxsim_sides"):
        monkeypatch.setattr(rivals_span_topk, name, lambda *_: [])
    measured = list(rows(data, k=20, repeats=1, seed=1, facts=FACTS))
    assert [(row["status"], row["timing"]) for row in measured] == [("wrong", None)] * 2
    assert "agreement 0.0" in measured[0]["reason"]
    assert "scores off by 0.001" in measured[1]["reason"]
    with pytest.raises(IndexError):
        rivals_span_topk._check(crash)  # a mistake of ours is not hidden


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
def test_the_command_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --backend: one thread, all sides, a wrong one of ours fails the run. With it: like other operations."""
    monkeypatch.setenv("EL4NER_ISA", "")  # rows() sets it
    monkeypatch.setenv("EL4NER_THREADS", "1")
    made = list(rows(small(), k=20, repeats=1, seed=1, facts=FACTS))
    monkeypatch.setattr(rivals_span_topk, "measure", lambda **_: iter(made))
    command = ["kernels", "--op", "span_topk", "--repeats", "1", "--json", "-"]
    done = CliRunner().invoke(group, command)
    assert done.exit_code == 0, done.output
    printed = {row["backend"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert list(printed) == [row["side"] for row in made]
    assert {name.startswith("el4ner") == row["rival"] for name, row in printed.items()} == {False}
    assert "span_topk, clustered: queries 6" in done.stderr
    given: dict[str, object] = {}
    monkeypatch.setattr(rivals_span_topk, "measure", lambda **words: given.update(words) or iter(made))
    chosen = ["--side", "faiss", "--side", "int8", "--input", "wnut17", "--budget", "3.5"]
    assert CliRunner().invoke(group, [*command, *chosen]).exit_code == 0
    assert (given["only"], given["names"], given["budget_s"]) == (("faiss", "int8"), ("wnut17",), 3.5)
    assert "allowed: clustered" in CliRunner().invoke(group, [*command, "--input", "wnut18"]).stderr
    made[0] |= {"status": "wrong", "reason": "off", "timing": None}
    assert CliRunner().invoke(group, command).exit_code == 1

    monkeypatch.setitem(ops.SIZES["small"], "span_topk", {"queries": 3, "sentences": 30, "width": 8, "k": 4})
    done = CliRunner().invoke(group, [*command, "--backend", "numba"])
    assert done.exit_code == 0, done.output
    printed = {row["backend"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert printed["numba"]["shape"]["sentences"] == 30
    by_torch = [row for row in printed.values() if row["rival"]]
    assert [(row["status"], row["reason"]) for row in by_torch] == [("ok", None)] * 3


def test_real_pools_need_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EL4NER_DATA", raising=False)
    with pytest.raises(InputError, match="EL4NER_DATA is not set"):
        real("wnut17", queries=3, sentences=3, seed=0)


@pytest.mark.benchmark
@pytest.mark.embedded
def test_real_pools(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EL4NER_DATA", str(data_dir))
    monkeypatch.setenv("EL4NER_CACHE", str(tmp_path))
    data = real("wnut17", queries=4, sentences=6, seed=0)
    assert (data.pool.sentences, len(data.offsets), data.pool.width) == (6, 5, 384)
    assert np.allclose(np.linalg.norm(data.pool.vectors, axis=1), 1, atol=1e-5)
    assert (data.weights > 0).all()
    again = real("wnut17", queries=4, sentences=6, seed=0)  # from the cache
    assert np.array_equal(again.queries, data.queries)


def test_an_extension_module_that_wraps_the_end_of_the_budget() -> None:
    """usearch's does, where its search is interrupted."""
    for error in (SystemError("returned a result with an exception set"), MemoryError("std::bad_alloc")):
        with pytest.raises(OverBudgetError, match="10 CPU seconds"), within(10.0):
            raise error from OverBudgetError("10 CPU seconds")
    with pytest.raises(SystemError, match="its own"), within(10.0):
        raise SystemError("its own")
