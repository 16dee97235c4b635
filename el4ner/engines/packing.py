"""Whether a model may be run packed behind cached prefixes, decided by trying it on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from el4ner.engines.adapters import first_line
from el4ner.engines.attention import grouped
from el4ner.engines.chat import PromptTokens, TokenIds
from el4ner.engines.head import Head
from el4ner.engines.lanes import LaneMemory, begin_lane
from el4ner.engines.loading import is_out_of_memory
from el4ner.engines.prefix_cache import PrefixCache, PrefixRunner, Row
from el4ner.engines.token_trie import TokenTrie

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest total-variation distance between next-token distributions, packed and not; rounding in half precision moves
them by a few percent, a wrong position or mask by far more."""


@dataclass(frozen=True, slots=True)
class Packing:
    """exact: packed passes equal plain ones, for prompts up to `limit` tokens (None: any). reason: one line.

    ragged: steps of writing need no padding (ragged.py).
    """

    exact: bool
    limit: int | None
    reason: str
    ragged: bool = False

    def allows(self, length: int) -> bool:
        """Whether a prompt of that many tokens, choices included, may be packed."""
        return self.exact and (self.limit is None or length <= self.limit)

    def __str__(self) -> str:
        if not self.exact:
            return f"unpacked ({self.reason})"
        return "packed" if self.limit is None else f"packed up to {self.limit} tokens ({self.reason})"


def check(model: Any, device: torch.device, dtype: torch.dtype) -> Packing:
    """Compare three short prompts, packed behind a prefix in two chunks, and a step of writing behind them, with one
    plain forward pass each."""
    limit, reason = _length_limit(model.config.get_text_config())
    if limit is not None and limit < 16:
        return Packing(False, limit, reason)
    if hasattr(model.get_output_embeddings(), "base_layer"):
        return Packing(False, None, "an adapter changes the output head")
    fault = _fault("pass", lambda: _distance(model, device, dtype), dtype)
    if fault is not None:
        return Packing(False, None, fault)
    for ragged in (True, False) if grouped(model.base_model) else (False,):
        fault = _fault("step", lambda own=ragged: _step_distance(model, device, dtype, own), dtype)  # type: ignore[misc]
        if fault is None:
            return Packing(True, limit, reason, ragged)
    return Packing(False, None, fault or "")


def _fault(what: str, distance: Callable[[], float], dtype: torch.dtype) -> str | None:
    """Why a trial failed, None where it did not."""
    try:
        found = distance()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"the packed {what} failed: {first_line(error)}"
    return None if found <= TOLERANCE[dtype] else f"packed and plain {what} differ by {found:.2g}"


def _length_limit(config: Any) -> tuple[int | None, str]:
    """Up to which length every layer sees everything and positions do not depend on the length."""
    limits: list[tuple[int, str]] = []
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    windowed = any(kind != "full_attention" for kind in kinds) if kinds else window is not None
    if windowed:
        limits.append((int(window or 0), "attention window"))
    for parameters in positions_change(config):
        original = parameters.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limits.append((int(original or config.max_position_embeddings), "positions change beyond"))
    return min(limits) if limits else (None, "")


def positions_change(config: Any) -> list[dict[str, Any]]:
    """The parameters of rotary embeddings that depend on the length of the whole text."""
    rope = getattr(config, "rope_parameters", None) or {}
    every = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return [parameters for parameters in every if parameters.get("rope_type") in ("longrope", "dynamic")]


_SHARED, _RESTS = (4, 9), ((9, 10, 11), (9, 10, 12, 13), (14, 15))
"""Where two shared parts of the trial's prompts end, and which of its tokens follow in each."""


def _trial(model: Any) -> tuple[list[int], tuple[TokenIds, TokenIds], list[TokenIds]]:
    """Some tokens, two shared parts of them, and what follows these in three prompts."""
    size = int(model.config.get_text_config().vocab_size)
    ids = np.random.default_rng(7).integers(min(10, size - 1), size, 16).tolist()
    shared = tuple(ids[: _SHARED[0]]), tuple(ids[_SHARED[0] : _SHARED[1]])
    return ids, shared, [tuple(ids[i] for i in rest) for rest in _RESTS]


def _plain(model: Any, prompts: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Next-token distributions (R, V) f32, one forward pass each."""
    rows = [model(input_ids=torch.tensor([list(ids)], device=device)).logits[:, -1].float() for ids in prompts]
    return torch.cat(rows).softmax(-1)


def _distance(model: Any, device: torch.device, dtype: torch.dtype) -> float:
    """Largest total-variation distance between packed and plain next-token distributions."""
    ids, shared, rests = _trial(model)
    runner = PrefixRunner(model.base_model, device, dtype, PrefixCache(1 << 30), 64)
    # a second path of another length makes the passes padded
    prefix, _ = runner.prefixes([shared, (shared[0], (ids[0],))])
    trie = TokenTrie()
    ends = [trie.insert(rest) for rest in rests]
    rows = [Row(prefix, trie.tokens, trie.depths, trie.ancestors()), Row(None, ids[:3])]
    with torch.inference_mode():
        packed = Head(model).logits(runner.forward(rows).hidden[0, ends]).softmax(-1)
        plain = _plain(model, [PromptTokens(shared, rest).ids for rest in rests], device)
    return float((packed - plain).abs().sum(-1).max()) / 2


def _step_distance(model: Any, device: torch.device, dtype: torch.dtype, ragged: bool) -> float:
    """The same of a step of writing, in which one row is fed three tokens for two replies and another one token."""
    ids, shared, rests = _trial(model)
    runner = PrefixRunner(model.base_model, device, dtype, PrefixCache(1 << 30), 64, ragged=ragged)
    tries = [TokenTrie(), TokenTrie()]
    ends = [tries[0].insert(rests[0]), tries[0].insert(rests[1]), tries[1].insert(rests[2])]
    (prefix,) = runner.prefixes([shared])
    rows = [Row(own, t.tokens, t.depths, t.ancestors()) for own, t in zip((prefix, None), tries, strict=True)]
    fed = [ids[:2], ids[2:3], ids[3:4]]
    prompts = [*(PromptTokens(shared, rest).ids for rest in rests[:2]), rests[2]]
    with torch.inference_mode():
        state = runner.forward(rows, 6, most=6)
        memory = LaneMemory(state, 2)
        lanes = [begin_lane(r, rows[r], end, state, ()) for r, end in zip((0, 0, 1), ends, strict=True)]
        for lane, own in zip(lanes, fed, strict=True):
            lane.fed = list(own)
        memory.take(lanes)
        packed = Head(model).logits(runner.step(state, memory.step(lanes))).softmax(-1)
        read = [(*p, *own[:n]) for p, own in zip(prompts, fed, strict=True) for n in range(1, len(own) + 1)]
        plain = _plain(model, read, device)
    return float((packed - plain).abs().sum(-1).max()) / 2
