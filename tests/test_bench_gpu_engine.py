"""The script for a card runs end to end without one, with tiny models of the same architectures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("embedded")]


def test_the_dry_run_measures_everything(root: Path, tmp_path: Path) -> None:
    bash, commands = shutil.which("bash"), Path(sys.executable).parent
    if bash is None or not (commands / "el4ner-bench").exists():
        pytest.skip("needs bash and the installed commands")
    lines = (root / "examples" / "pools" / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:6]) + "\n", encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("\n".join(lines[6:8]) + "\n", encoding="utf-8")
    rows_file = tmp_path / "rows.jsonl"
    own = {"DEVICE": "cpu", "SIZES": "tiny", "ROWS": str(rows_file), "DATA": str(tmp_path), "BIN": str(commands)}
    done = subprocess.run(
        [bash, str(root / "bench" / "gpu_engine.sh")],
        env={**os.environ, **own},
        capture_output=True, text=True, check=False, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    names = ("tiny-qwen2", "tiny-phi3", "tiny-glm4")
    plan = rows[0]
    assert (plan["what"], plan["mode"]) == ("plan", "resident")
    assert [model["members"] for model in plan["models"]] == [[name] for name in names]
    choices = [row for row in rows if row["what"] == "choose"]
    assert len(choices) == 2 * 3 * 3  # by the shape and by sentences, three models, three ways
    assert {row["status"] for row in choices} == {"ok"}
    assert all(row["tokens_over_distinct"] <= 1.05 for row in choices if row["side"] == "engine")
    whole = {row["side"]: row for row in rows if row["what"] == "pipeline"}
    assert set(whole) == {"engine", "plain"}
    assert whole["engine"]["asked"] == [*names, "retrieval"]
    assert all(row["timing"]["repeats"] == 1 for row in whole.values())
    assert f"written: {rows_file}" in done.stdout
