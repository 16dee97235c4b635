"""Libraries for CUDA beside span_topk: what they are given, with stand-ins that compute in torch what they document."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from el4ner.bench import rivals_span_topk, rivals_span_topk_cuda
from el4ner.bench.rivals import Rival
from el4ner.bench.span_oracle import agreement, oracle
from el4ner.bench.span_pools import SpanInput, synthetic
from el4ner.errors import KernelError
from el4ner.kernels import SpanPool
from el4ner.kernels._cases import CASES

torch = pytest.importorskip("torch")


def the_input(width: int = 24) -> SpanInput:
    """Empty sentences and an empty query among others; weights 1, 2 and 4."""
    data = synthetic("clustered", queries=7, sentences=60, width=width, seed=5)
    pool_offsets = np.concatenate([[0, 0], data.pool.offsets[1:], data.pool.offsets[-1:]])
    offsets = np.concatenate([data.offsets[:3], data.offsets[2:]])
    return SpanInput("case", data.queries, offsets, data.weights, SpanPool.pack(data.pool.vectors, pool_offsets))


def sums_of_maxima(queries: Any, documents: Any, begins_q: Any, begins_d: Any) -> Any:
    """score[i, j] = sum_s max_t q[s].d[t] for every query and document."""
    for begins, rows in ((begins_q, queries), (begins_d, documents)):
        assert begins.dtype == torch.int32
        assert begins[0] == 0
        assert begins[-1] == len(rows)
        assert rows.dtype == torch.float16
        assert rows.is_contiguous()
    out = torch.zeros(len(begins_q) - 1, len(begins_d) - 1)
    for i in range(len(begins_q) - 1):
        for j in range(len(begins_d) - 1):
            own, other = (
                queries[begins_q[i] : begins_q[i + 1]].float(),
                documents[begins_d[j] : begins_d[j + 1]].float(),
            )
            assert len(other)  # the libraries score empty documents 0 or minus infinity
            out[i, j] = (own @ other.T).max(dim=1).values.sum() if len(own) else 0.0
    return out


def late_interaction_stand_in(calls: list[int]) -> ModuleType:
    """Its varlen call: hard bounds on lengths, a score for every pair."""

    def maxsim_varlen(q: Any, d: Any, begins_q: Any, begins_d: Any, max_seqlen_q: int, max_seqlen_d: int) -> Any:
        assert begins_q.diff().max() <= max_seqlen_q
        assert begins_d.diff().max() <= max_seqlen_d
        calls.append(len(begins_q) - 1)
        return sums_of_maxima(q, d, begins_q, begins_d)

    module = ModuleType("late_interaction_kernels")
    module.maxsim_varlen = maxsim_varlen  # type: ignore[attr-defined]
    return module


def flash_stand_in(calls: list[int]) -> ModuleType:
    """Its packed call: one query, which has spans, and a width that it need not pad."""

    def flash_maxsim_packed(q: Any, d: Any, begins_d: Any, max_seqlen_d: int) -> Any:
        assert len(q)
        assert q.shape[1] == d.shape[1] in (16, 32, 64)
        assert begins_d.diff().max() <= max_seqlen_d
        calls.append(1)
        return sums_of_maxima(q, d, torch.tensor([0, len(q)], dtype=torch.int32), begins_d)[0]

    module = ModuleType("flash_maxsim")
    module.flash_maxsim_packed = flash_maxsim_packed  # type: ignore[attr-defined]
    return module


def sides(monkeypatch: pytest.MonkeyPatch, data: SpanInput, modules: Sequence[ModuleType | None]) -> list[Rival]:
    for name, module in zip(("late_interaction_kernels", "flash_maxsim"), modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    return list(rivals_span_topk_cuda.rivals(data, 6, "cpu"))


@pytest.mark.parametrize("width", [8, 24, 33])
@pytest.mark.parametrize("block", [1, 130, 1 << 28])
def test_weighted_scores_come_out(width: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries in blocks of 1, 2 and all; what is unweighted for the library is weighted behind it."""
    data = the_input(width)
    expected = oracle(data, 6)
    asked = np.flatnonzero(np.diff(data.offsets))
    monkeypatch.setattr(rivals_span_topk_cuda, "_SCORES", block)
    late, flash = [], []  # type: ignore[var-annotated]
    found = sides(monkeypatch, data, [late_interaction_stand_in(late), flash_stand_in(flash)])
    assert [rival.unavailable for rival in found] == [None, None]
    for rival in found:
        ids, scores = rival.run()
        share, gap = agreement((ids[asked], scores[asked]), (expected[0][asked], expected[1][asked]))
        assert share > 0.9
        assert gap < 2**-9  # halves, far inside the tolerance
        assert rival.tolerance is not None
        assert rival.tolerance >= 2**-9
        assert not np.isin(ids, [0, data.pool.sentences - 1]).any()  # the empty ones
    assert late == {1: [1] * 8, 130: [2] * 4, 1 << 28: [8]}[block]
    assert len(flash) == 7  # the empty query is not asked


def test_weights_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: other weights, other scores."""
    data = the_input()
    other = SpanInput(data.name, data.queries, data.offsets, data.weights[::-1].copy(), data.pool)
    (late, _) = sides(monkeypatch, data, [late_interaction_stand_in([]), None])
    assert agreement(late.run(), oracle(other, 6))[1] > 2**-9


def test_what_is_not_installed_or_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = flash_stand_in([])

    def flash_maxsim_packed(*_: Any, **__: Any) -> Any:
        raise MemoryError("out of resources: shared memory\nand a second line")

    broken.flash_maxsim_packed = flash_maxsim_packed  # type: ignore[attr-defined]
    missing, failing = sides(monkeypatch, the_input(), [None, broken])
    assert missing.unavailable is not None
    assert missing.unavailable.startswith("late_interaction_kernels cannot be imported (ModuleNotFoundError")
    assert "el4ner[bench-cuda]" in missing.unavailable
    assert failing.unavailable is None
    with pytest.raises(KernelError) as told:
        failing.run()
    assert str(told.value) == "flash-maxsim packed + topk: MemoryError: out of resources: shared memory"


def test_a_gpu_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["span_topk"](np.random.default_rng(0))
    monkeypatch.setattr(rivals_span_topk, "torch_ways", lambda *_: [])
    for name in ("late_interaction_kernels", "flash_maxsim"):
        monkeypatch.setitem(sys.modules, name, None)
    assert [rival.name for rival in rivals_span_topk.rivals(case, "cuda")] == list(rivals_span_topk_cuda.LIBRARIES)
    assert list(rivals_span_topk.rivals(case, "cpu")) == []
