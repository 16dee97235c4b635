"""The script that times kernels on a card runs end to end without one, with small sizes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from el4ner.bench import ops
from el4ner.bench.cli import group
from el4ner.kernels._dispatch import BACKENDS, operations

BASH, COMMANDS = shutil.which("bash"), Path(sys.executable).parent
needs_bash = pytest.mark.skipif(BASH is None, reason="there is no bash")


@needs_bash
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_dry_run_measures_everything(root: Path, tmp_path: Path) -> None:
    """Under a minute on an idle core: tests of its own would run in it again, so one file stands for them."""
    if not (COMMANDS / "el4ner-bench").exists():
        pytest.skip("needs the installed commands")
    rows_file = tmp_path / "rows.jsonl"
    own = {"DEVICE": "cpu", "ROWS": str(rows_file), "BIN": str(COMMANDS), "TESTS": "tests/test_kernels_table.py"}
    done = subprocess.run(
        [str(BASH), str(root / "bench" / "gpu_kernels.sh")],
        env={**os.environ, **own},
        capture_output=True, text=True, check=False, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    assert {row["op"] for row in rows} == set(operations())
    assert {row["status"] for row in rows if row["backend"] == "numba"} == {"ok"}
    twice = [row["op"] for row in rows if row["backend"] == "numba" and row["op"] in ("span_topk", "choice_logprobs")]
    assert sorted(twice) == ["choice_logprobs"] * 2 + ["span_topk"] * 2
    assert "torch fp32 matmul + segment_reduce + topk" in {row["backend"] for row in rows}
    for part in ("== build", "== check", "== time", "== rows", f"written: {rows_file}"):
        assert part in done.stdout
    assert re.search(r"^vote small numba [\d.]+ ms \{", done.stdout, re.MULTILINE)


@needs_bash
@pytest.mark.parametrize("name", ["gpu_kernels.sh", "gpu_engine.sh", "gpu_common.sh"])
def test_bash_can_read_the_scripts(name: str, root: Path) -> None:
    done = subprocess.run([str(BASH), "-n", str(root / "bench" / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["gpu_kernels.sh", "gpu_engine.sh"])
def test_every_option_of_the_scripts_exists(name: str, root: Path) -> None:
    """What only a card runs, too: options of each command, and what --backend, --op and sizes are given."""
    script = (root / "bench" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    script = "\n".join(line for line in script.splitlines() if not line.lstrip().startswith("#"))
    lists = dict(re.findall(r'\b([A-Z]+)="((?:--[^"]*)?)"', script))  # variables that hold options
    calls = re.findall(r'"\$BIN/el4ner-bench" (\w+)(.*)', script)
    assert calls
    for command, words in calls:
        known = {option for parameter in group.commands[command].params for option in parameter.opts}
        own = words + " ".join(lists.get(variable, "") for variable in re.findall(r"\$(\w+)", words))
        assert not set(re.findall(r"(?<=\s)--[\w-]+", own)) - known, (command, own)
    assert set(re.findall(r"--backend (\w+)", script)) <= set(BACKENDS)
    assert {op for line in re.findall(r"for op in ([\w ]+);", script) for op in line.split()} <= set(operations())
    assert set(re.findall(r"(?:FULL|MILLION|--sizes)[= ](\w+)", script)) <= set(ops.SIZES)
