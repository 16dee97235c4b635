"""Grouped attention against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from el4ner.engines import attention  # noqa: E402
from el4ner.engines.attention import NAME, grouped_attention  # noqa: E402
from el4ner.engines.ragged import Causal, Layout, current, shaped  # noqa: E402


def _inputs(length: int, heads: int, groups: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    rows, columns = 3, 11
    query = torch.randn(rows, heads, length, width, generator=generator)
    key, value = (torch.randn(rows, groups, columns, width, generator=generator) for _ in range(2))
    sees = torch.rand(rows, 1, length, columns, generator=generator) < 0.6
    sees[..., 0] = True
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    return query.to(dtype), key.to(dtype), value.to(dtype), mask


def _formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> np.ndarray:
    """softmax(Q K' scale, where seen) V, head by head; head h reads the keys of group h // (H / G)."""
    share = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(share, dim=1) for part in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    scores = scores.masked_fill(mask < -1e30, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).numpy()


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize(("heads", "groups", "width"), [(6, 2, 64), (4, 4, 24), (8, 1, 40)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 0.05)])
@pytest.mark.parametrize("fused", [True, False])
def test_grouped_attention_equals_the_formula(
    length: int, heads: int, groups: int, width: int, dtype: str, tolerance: float, fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(attention, "fused_in_bfloat16", lambda: fused)
    query, key, value, mask = _inputs(length, heads, groups, width, getattr(torch, dtype))
    module = torch.nn.Module()
    for scaling in (None, 0.3):
        found, weights = grouped_attention(module, query, key, value, mask, scaling=scaling)
        expected = _formula(query, key, value, mask, width**-0.5 if scaling is None else scaling)
        assert weights is None
        assert found.shape == (3, length, heads, width)
        np.testing.assert_allclose(found.double().numpy(), expected, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 0.05)])
def test_tokens_of_rows_that_are_fed_unequally_are_laid_out(
    dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "fused_in_bfloat16", lambda: False)
    query, key, value, mask = _inputs(4, 6, 2, 16, getattr(torch, dtype))
    layout = Layout(torch.tensor([2, 0, 2, 2, 0, 1]), torch.tensor([0, 0, 1, 3, 1, 2]), (3, 4))
    tokens = layout.gather(query.transpose(1, 2)).transpose(0, 1)[None]  # (1, H, N, D)
    with shaped(layout):
        found, _ = grouped_attention(torch.nn.Module(), tokens, key, value, mask)
    assert current() is None
    expected = _formula(query, key, value, mask, 0.25)[layout.rows.numpy(), layout.slots.numpy()]
    np.testing.assert_allclose(found[0].double().numpy(), expected, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 0.05)])
@pytest.mark.parametrize(("length", "start"), [(1, 10), (7, 4), (11, 0)])
def test_a_causal_pass_looks_no_further_than_its_tokens(
    length: int, start: int, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "fused_in_bfloat16", lambda: False)
    monkeypatch.setattr(attention, "_BLOCK", 3)
    query, key, value, mask = _inputs(length, 6, 2, 16, getattr(torch, dtype))
    hidden = torch.arange(11) > start + torch.arange(length)[:, None]
    mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    seen: list[int] = []
    inner = attention._by_groups
    monkeypatch.setattr(attention, "_by_groups", lambda q, k, *rest: (seen.append(k.shape[2]), inner(q, k, *rest))[1])
    with shaped(Causal(start)):
        found, _ = grouped_attention(torch.nn.Module(), query, key, value, mask)
    np.testing.assert_allclose(found.double().numpy(), _formula(query, key, value, mask, 0.25), atol=tolerance)
    assert seen == [min(start + end, start + length) for end in range(3, length + 3, 3)]


def test_without_a_mask_it_is_causal() -> None:
    query, key, value, _ = _inputs(11, 6, 2, 16, torch.float32)
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    found, _ = grouped_attention(module, query, key, value, None, is_causal=True)
    causal = torch.zeros(3, 1, 11, 11).masked_fill_(~torch.tril(torch.ones(11, 11, dtype=torch.bool)), -3e38)
    np.testing.assert_allclose(found.numpy(), _formula(query, key, value, causal, 0.25), atol=1e-6)


def test_models_on_a_cpu_use_it(embedded: None) -> None:
    from el4ner.engines import load_engine

    engine = load_engine("embedded:smollm2", device="cpu")
    assert engine.model.config._attn_implementation == NAME  # type: ignore[attr-defined]
    assert engine.packing.exact  # type: ignore[attr-defined]
