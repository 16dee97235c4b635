"""The engine benchmark: all sides answer the same, a side that does not is not timed, tokens are counted truly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from el4ner.bench import engine as engine_bench
from el4ner.bench import engine_table
from el4ner.bench.cli import group
from el4ner.bench.engine_requests import shape_requests
from el4ner.bench.random_models import SHAPES, bench_engine, shape_config
from el4ner.bench.rivals_engine import Tokenised
from el4ner.errors import ConfigError, InputError

pytestmark = pytest.mark.usefixtures("embedded")  # random models read with the embedded model's tokenizer

OPTIONS = ["engine", "--source", "random:tiny", "--sentences", "1", "--spans", "1", "--blocks", "2"]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return bench_engine("random:tiny", device="cpu", dtype="float32", chat=False)


def test_sides_agree_and_rows_are_complete(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(group, [*OPTIONS, "--loop-requests", "1", "--json", str(out)])
    assert done.exit_code == 0, done.output
    rows = {row["side"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["loop", "batch", "engine"]
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["engine"]["tokens_over_distinct"] <= 1.05
    assert rows["engine"]["tokens_run"] < rows["batch"]["tokens_run"]
    assert (rows["loop"]["answered"], rows["batch"]["answered"]) == (1, rows["batch"]["questions"])
    for row in rows.values():
        assert row["timing"]["repeats"] == 2
        assert {"cpu", "versions", "commit"} <= set(row["machine"])
        assert row["distinct_tokens"] <= row["full_tokens"]
        assert row["peak_extra_mib"] is None or row["peak_extra_mib"] >= 0


def test_several_models_take_turns_and_an_unknown_one_is_said_before_any_runs(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    common = ["engine", "--shape", "--spans", "1", "--sides", "engine", "--blocks", "1", "--json", str(out)]
    done = CliRunner().invoke(group, [*common, "--source", "random:tiny", "--source", "random:tiny-phi3"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["model"].split(" ")[0].split("@")[0] for row in rows] == ["random:tiny", "random:tiny-phi3"]
    out.write_text("")
    failed = CliRunner().invoke(group, [*common, "--source", "random:tiny", "--source", "random:unknown"])
    assert isinstance(failed.exception, ConfigError)
    assert out.read_text() == ""


def test_a_wrong_answer_is_not_timed(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine_bench.score_in_batches
    monkeypatch.setattr(engine_bench, "score_in_batches", lambda *args: [row + 0.1 for row in right(*args)])
    asked = shape_requests(tiny, prefix_tokens=20, spans=1)
    rows = list(engine_bench.measure_engine(tiny, asked, sides=("batch", "engine"), blocks=1))
    assert [row["status"] for row in rows] == ["wrong", "wrong"]  # who of them is, nobody knows
    assert all(row["timing"] is None for row in rows)
    assert "nothing was timed" in engine_bench.engine_table(rows)


def test_what_the_loop_does_not_answer_is_compared_too(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine_bench.score_in_batches

    def wrong_at_the_end(*args: Any) -> list[Any]:
        first, *others = right(*args)
        return [first, *(row + 0.1 for row in others)]

    monkeypatch.setattr(engine_bench, "score_in_batches", wrong_at_the_end)
    asked = shape_requests(tiny, prefix_tokens=20, spans=1)
    rows = list(engine_bench.measure_engine(tiny, asked, blocks=1, loop_requests=1))
    assert {row["side"]: row["status"] for row in rows} == {"loop": "ok", "batch": "wrong", "engine": "wrong"}
    assert all(row["timing"] is None for row in rows)


def test_the_shape_of_the_goal(tiny: Any) -> None:
    asked = shape_requests(tiny, prefix_tokens=700, spans=6)
    assert len(asked.requests) == 12
    prefix = {request.prompt[:2] for request in asked.requests}
    assert len(prefix) == 1
    assert 690 <= len(tiny.prompt_ids(next(iter(prefix)))) <= 702
    assert all(len(tiny.choice_ids(choice)) == 1 for request in asked.requests for choice in request.choices)
    (row,) = engine_bench.measure_engine(tiny, asked, sides=("engine",), blocks=1)
    assert row["tokens_over_distinct"] == 1.0
    assert row["token_ratio"] > 9


def test_runs_in_any_order_stand_with_their_own_rivals(root: Path, tmp_path: Path) -> None:
    path = root / "bench" / "results" / "engine.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    runs: list[list[str]] = []
    for kind in ("choose", "pipeline"):
        own = [row for row in rows if row["what"] == kind]
        first = next(i for i, row in enumerate(own) if row["side"] == ("engine" if kind == "choose" else "plain"))
        runs.append([json.dumps(row) for row in own[: first + 1]])
    tables = []
    for order in (runs, runs[::-1]):
        (tmp_path / "rows.jsonl").write_text("\n".join(line for run in order for line in run) + "\n", encoding="utf-8")
        section = engine_table.speed_section(tmp_path / "rows.jsonl")
        tables.append(
            sorted(line for line in section.splitlines() if line.startswith("| choices of") or "whole" in line)
        )
    assert tables[0] == tables[1]
    assert len(tables[0]) == len(runs[0])  # every rival once, and the plain script


def test_the_readme_has_the_table_of_the_committed_rows(root: Path, tmp_path: Path) -> None:
    section = engine_table.speed_section(root / "bench" / "results" / "engine.jsonl")
    text = (root / "README.md").read_text(encoding="utf-8")
    assert f"{engine_table.BEGIN}\n{section}{engine_table.END}" in text  # made by el4ner-bench report --write-results
    assert "whole pipeline" in section
    (tmp_path / "rows.jsonl").write_text('{"what": "choose", "side": "engine"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:1: is no row"):
        engine_table.speed_section(tmp_path / "rows.jsonl")


def test_distinct_tokens_by_hand() -> None:
    questions = [
        Tokenised((1, 2, 3), ((4,), (5, 6))),  # 1 2 3 5
        Tokenised((1, 2, 7), ((4,),)),  # 7
    ]
    assert engine_bench.distinct_tokens(questions) == 5
    assert engine_bench.plain_tokens(questions) == 3 + 4 + 3


def test_nan_is_no_agreement() -> None:
    assert engine_bench._difference([np.array([np.nan])], [np.array([0.0])]) == float("inf")


def test_published_shapes_have_their_size() -> None:
    import torch
    import transformers

    billions = {"qwen2.5-14b": 14.8, "phi-4-14b": 14.7, "glm-4-9b": 9.4}
    for name, expected in billions.items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(shape_config(f"random:{name}"))
        size = engine_bench.parameters(model)["total"] / 1e9
        assert size == pytest.approx(expected, abs=0.1), name
    assert set(billions) < set(SHAPES)


def test_unknown_names_are_usage_errors() -> None:
    with pytest.raises(ConfigError, match="random:tiny"):
        shape_config("random:huge")
    done = CliRunner().invoke(group, [*OPTIONS, "--sides", "magic"])
    assert done.exit_code == 2
    assert "magic" in done.output
