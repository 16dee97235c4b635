"""The whole pipeline gives the same records whatever implementation of the kernels runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from el4ner.cache import cache_root
from el4ner.jsonl import read_inputs
from el4ner.kernels import _dispatch, operations
from el4ner.pipeline import El4ner
from el4ner.stages.classify import combine


def _records(root: Path, cache: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], set[str]]:
    converted = cache_root() / "converted"
    (cache / backend).mkdir()
    if converted.is_dir():  # each fits for itself, but the model need not be converted again
        (cache / backend / "converted").symlink_to(converted)
    monkeypatch.setenv("EL4NER_CACHE", str(cache / backend))
    monkeypatch.setenv("EL4NER_BACKEND", backend)
    ran: set[str] = set()
    choose = _dispatch.choose

    def watched(op: str, *arguments: Any, **keywords: Any) -> Any:
        run = choose(op, *arguments, **keywords)
        ran.add(run.__name__)
        return run

    monkeypatch.setattr(_dispatch, "choose", watched)
    model = El4ner.from_config(
        {
            "reading": {"heads": 1, "swaps": 0, "builtin": False}, "stack": {"sample": 4}, "retrieve": {"k": 2},
            "extract": {"max_new_tokens": 16}, "voters": "all", "dtype": "float32",
            "examples": str(root / "examples" / "pools" / "jobs.jsonl"),
        }
    )  # fmt: skip
    records = [p.to_dict() for p in model.predict(list(read_inputs([root / "examples" / "jobs.jsonl"]))[:2])]
    monkeypatch.setattr(_dispatch, "choose", choose)
    return records, ran


@pytest.mark.embedded
def test_records_do_not_depend_on_the_backend(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ran_plain = _records(root, tmp_path, "ref", monkeypatch)
    fast, ran_fast = _records(root, tmp_path, "auto", monkeypatch)
    # best_flat and span_scores share a file; vote is the majority of the paper preset (below)
    for op in ("span_topk", "choice_logprobs", "span_scores", "best_flat"):
        assert op in operations()
        assert f"{op}_ref" in ran_plain
        assert f"{op}_ref" not in ran_fast
        assert any(name.startswith(op) for name in ran_fast)
    assert sum(len(record["entities"]) for record in plain) > 0
    for one, other in zip(plain, fast, strict=True):
        assert _decisions(one) == _decisions(other)
        for a, b in zip(one["entities"], other["entities"], strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=2e-4)
            assert a["verified"] == pytest.approx(b["verified"], abs=2e-4)
            for voter, row in a["votes"].items():
                assert row == pytest.approx(b["votes"][voter], abs=2e-4)


def test_majorities_do_not_depend_on_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    votes = [random.integers(0, 3, (200, 5)).astype(np.float32) / 4 for _ in range(4)]  # with ties, and zeros
    votes[1][random.random(200) < 0.3] = np.nan  # abstains
    team: Any = SimpleNamespace(stack=None, config=SimpleNamespace(classify=SimpleNamespace(combine="majority")))
    fast = combine(votes, np.zeros((200, 0), np.float32), team)
    monkeypatch.setenv("EL4NER_BACKEND", "ref")
    assert np.array_equal(combine(votes, np.zeros((200, 0), np.float32), team), fast)
    assert len(set(fast.argmax(axis=1).tolist())) == 5


def _decisions(record: dict[str, Any]) -> list[Any]:
    return [(e["start"], e["end"], e["label"], e["proposed_by"], sorted(e["votes"])) for e in record["entities"]]
