"""In reduced precision decisions that rounding might turn are marked and counted; in float32 there are none."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from el4ner.calibration import Calibration
from el4ner.records import Candidate, Span
from el4ner.stages.classify import Scored, close_calls
from el4ner.stages.verify import _is_close


def _team(tolerance: float = 0.02, threshold: float = 0.5, weights: Any = None) -> Any:
    return SimpleNamespace(
        tie_tolerance=tolerance, threshold=threshold, verifier_weights=weights, calibration=Calibration(), stack="any"
    )


def test_what_rounding_might_turn() -> None:
    far, near, below, tied = Span(0, 3), Span(4, 7), Span(8, 11), Span(12, 15)
    found = np.array([[0.9, 0.05, 0.05], [0.51, 0.1, 0.39], [0.485, 0.1, 0.415], [0.495, 0.505, 0.0]], dtype=np.float32)
    spans = [far, near, below, tied]
    assert close_calls(spans, found, [far, near, tied], _team()) == [near, below, tied]
    assert close_calls(spans, found, [far, near, tied], _team(threshold=0.2)) == [tied]  # two labels
    assert close_calls(spans, found, [far, near], _team(threshold=0.2)) == []  # what is left out has no label
    one_label = np.array([[0.9, 0.1]], dtype=np.float32)
    assert close_calls([far], one_label, [far], _team()) == []


def test_where_nothing_is_fitted_none_is_a_rival_too() -> None:
    span, team = Span(0, 3), _team(threshold=0.0)
    team.stack = None
    for row, is_close in (([0.495, 0.0, 0.505], True), ([0.505, 0.0, 0.495], True), ([0.6, 0.0, 0.4], False)):
        assert close_calls([span], np.array([row], np.float32), [], team) == ([span] if is_close else [])
    team.threshold = 0.9  # out of reach either way
    assert close_calls([span], np.array([[0.505, 0.0, 0.495]], np.float32), [], team) == []


def test_a_threshold_is_near_in_what_the_voters_say() -> None:
    """A calibration that stretches scores stretches what rounding does to them."""
    span = Span(0, 3)
    team = _team(threshold=0.9)
    team.calibration = Calibration(slope=3.0, shift=0.0)  # 0.675 becomes 0.9, 0.69 becomes 0.917, 0.7 becomes 0.927
    for p, is_close in ((0.675, True), (0.69, True), (0.7, False), (0.66, True), (0.65, False)):
        found = np.array([[p, 1 - p]], dtype=np.float32)
        assert close_calls([span], found, [], team) == ([span] if is_close else [])


def test_overlapping_spans_compete() -> None:
    found = np.array([[0.8, 0.1, 0.1], [0.79, 0.1, 0.11]], dtype=np.float32)
    short, long = Span(0, 3), Span(0, 9)
    assert close_calls([short, long], found, [short], _team()) == [short]
    assert close_calls([short, long], found, [short], _team(tolerance=0.005)) == []
    assert close_calls([short, Span(3, 9)], found, [short], _team()) == []  # beside each other


def test_verdicts() -> None:
    scored = Scored(Candidate(Span(0, 3), ("a",)), "x", 0.6, {})
    assert _is_close(scored, 0.51, _team())
    assert not _is_close(scored, 0.6, _team())
    assert not _is_close(scored, float("nan"), _team())
    assert not _is_close(scored, 0.51, _team(tolerance=0.0))
    unmoved = (1.0, 0.0, 0.0)  # a verifier that changes no score
    assert _is_close(scored, 0.1, _team(threshold=0.61, weights=unmoved))
    assert not _is_close(scored, 0.5, _team(threshold=0.5, weights=unmoved))


@pytest.mark.embedded
@pytest.mark.timeout(1200)  # bfloat16 on a processor that has no instructions for it, beside other work
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 0.02)])
def test_the_report_marks_them(dtype: str, tolerance: float, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from el4ner import El4ner

    stage = importlib.import_module("el4ner.stages.classify")  # the package has its function under that name
    # every decision is close, to see where it is told
    monkeypatch.setattr(stage, "close_calls", lambda spans, *_: list(spans))
    model = El4ner.from_config(
        voters=["smollm2-list", "retrieval"], device="cpu", dtype=dtype, stack={"min_sentences": 100000},
        retrieve={"k": 1}, extract={"max_new_tokens": 4}, verify={"enabled": False},
        examples=str(root / "examples" / "pools" / "jobs.jsonl"),
    )  # fmt: skip
    model.predict([{"id": "one", "text": "Ada met Bob."}])
    close = model.report()["close decisions"]
    assert close["tolerance"] == tolerance
    assert close["count"] == len(close["spans"])
    assert (close["count"] > 0) == (tolerance > 0)
    assert {span["id"] for span in close["spans"]} <= {"one"}
