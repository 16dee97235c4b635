"""Triton without a GPU: kernels in the interpreter agree with the references; compiled kernels do not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from el4ner.kernels import available_backends

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    "not installed" in (available_backends("vote")["triton"] or ""), reason="triton is not installed"
)


def run(script: str, arguments: list[str], folder: Path, interpret: bool) -> str:
    """In a process of its own: TRITON_INTERPRET is read when triton is imported."""
    env = {**os.environ, "PYTHONSAFEPATH": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
    env.pop("TRITON_INTERPRET", None)
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("op", ["vote", "span_scores", "choice_logprobs", "span_topk", "cases"])
def test_interpreted_kernels_equal_the_references(op: str, tmp_path: Path) -> None:
    assert run("triton_kernels.py", [op], tmp_path, interpret=True) == "agrees"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every kernel, as it is launched, compiled for 9.0 and 8.0: registers, spills, shared memory, instructions."""
    rows: list[dict[str, Any]] = json.loads(
        run("triton_compile.py", [], tmp_path_factory.mktemp("aot"), interpret=False)
    )
    return rows


@pytest.mark.slow
def test_compiled_kernels_do_not_spill(compiled: list[dict[str, Any]]) -> None:
    assert {(row["capability"], row["name"]) for row in compiled} >= {
        (capability, name)
        for capability in (80, 90)
        for name in ("vote soft", "vote hard", "span_scores", "screen", "rescore", "log-sum-exp bf16")
    }
    for row in compiled:
        assert row["spills"] == 0, row
        # What a block may have: 227 KB from 9.0 on, 99 KB on the smallest cards of 8.x.
        assert row["shared"] <= (227 if row["capability"] == 90 else 99) * 1024, row


@pytest.mark.slow
def test_products_use_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    """On 9.0 asynchronous products (wgmma) of tiles that the copy engine (TMA) brings; on 8.0 mma."""
    for row in compiled:
        if row["name"] in ("screen", "log-sum-exp bf16"):
            wanted = ("wgmma", "tma") if row["capability"] == 90 else ("mma",)
            assert all(row[name] > 0 for name in wanted), row
