"""The doctor reports what it ran, and says why something does not work."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from el4ner import doctor
from el4ner.doctor import BackendState, CudaDevice, Diagnosis, ModelState, diagnose, render
from el4ner.kernels import _dispatch, available_backends, operations

FACTS = Diagnosis(
    python="3.11.0",
    system="Linux",
    versions={"torch": "2.13.0", "seqeval": None},
    cpu="A CPU",
    cores=2,
    instruction_sets=("avx2",),
    cuda=(CudaDevice("A GPU", 80 * 2**30, "9.0"),),
    cuda_reason=None,
    backends=(BackendState("vote", "numba", True, None), BackendState("vote", "native", False, "not built")),
    models=(ModelState("embedded:x", None, "missing"),),
)


def test_diagnose_this_machine() -> None:
    facts = diagnose()
    assert json.loads(json.dumps(facts.to_dict()))["python"] == sys.version.split()[0]
    assert facts.versions["el4ner"]
    assert facts.cores >= 1
    assert (facts.cuda_reason is None) == bool(facts.cuda)
    works = {(state.op, state.backend) for state in facts.backends if state.works}
    for op in operations():
        usable = {(op, name) for name, reason in available_backends(op).items() if reason is None}
        assert usable <= works
    assert all((state.reason is None) == state.works for state in facts.backends)
    assert {model.name for model in facts.models} >= {"embedded:smollm2", "embedded:minilm"}
    text = render(facts)
    for section in ("versions", "devices", "kernels", "models"):
        assert f"\n{section}\n" in f"\n{text}"


def test_render() -> None:
    text = render(FACTS)
    for line in ("seqeval                 not installed", "A CPU, 2 usable cores", "80.0 GiB, compute capability 9.0"):
        assert line in text
    assert "native  no: not built" in text
    for status in ("missing", "damaged", "ok"):
        shown = render(replace(FACTS, models=(ModelState("embedded:x", None, status),)))
        assert ("`el4ner download embedded` installs what is missing or damaged" in shown) == (status != "ok")


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_native_reason", lambda: "el4ner._native is not built")
    states = {(state.op, state.backend): state for state in doctor._backends()}
    assert states["vote", "native"].reason == "el4ner._native is not built"
    assert states["vote", "numba"].works


def test_a_wrong_or_crashing_backend_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("illegal instruction\nof some kind")

    monkeypatch.setitem(_dispatch._OPERATIONS["vote"], "numba", crash)
    right = _dispatch._OPERATIONS["span_scores"]["ref"]
    monkeypatch.setitem(_dispatch._OPERATIONS["span_scores"], "numba", lambda *a: right(*a) + np.float32(1))
    states = {(state.op, state.backend): state for state in doctor._backends()}
    assert states["vote", "numba"].reason == "RuntimeError: illegal instruction of some kind"
    assert "differs from ref by 1" in str(states["span_scores", "numba"].reason)
