"""Whether a model may be run packed behind cached prefixes, decided by trying it on the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from el4ner.engines.adapters import first_line
from el4ner.engines.chat import PromptTokens
from el4ner.engines.head import Head
from el4ner.engines.loading import is_out_of_memory
from el4ner.engines.prefix_cache import PrefixCache, PrefixRunner, Row
from el4ner.engines.token_trie import TokenTrie

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest total-variation distance between next-token distributions, packed and not; rounding in half precision moves
them by a few percent, a wrong position or mask by far more."""


@dataclass(frozen=True, slots=True)
class Packing:
    """exact: packed passes equal plain ones, for prompts up to `limit` tokens (None: any). reason: one line."""

    exact: bool
    limit: int | None
    reason: str

    def allows(self, length: int) -> bool:
        """Whether a prompt of that many tokens, choices included, may be packed."""
        return self.exact and (self.limit is None or length <= self.limit)

    def __str__(self) -> str:
        if not self.exact:
            return f"unpacked ({self.reason})"
        return "packed" if self.limit is None else f"packed up to {self.limit} tokens ({self.reason})"


def check(model: Any, device: torch.device, dtype: torch.dtype) -> Packing:
    """Compare three short prompts, run packed behind a prefix in two chunks, with one plain forward pass each."""
    limit, reason = _length_limit(model.config.get_text_config())
    if limit is not None and limit < 16:
        return Packing(False, limit, reason)
    if hasattr(model.get_output_embeddings(), "base_layer"):
        return Packing(False, None, "an adapter changes the output head")
    try:
        distance = _distance(model, device, dtype)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return Packing(False, None, f"the packed pass failed: {first_line(error)}")
    if not distance <= TOLERANCE[dtype]:
        return Packing(False, None, f"packed and plain passes differ by {distance:.2g}")
    return Packing(True, limit, reason)


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


def _distance(model: Any, device: torch.device, dtype: torch.dtype) -> float:
    """Largest total-variation distance between packed and plain next-token distributions."""
    size = int(model.config.get_text_config().vocab_size)
    ids = np.random.default_rng(7).integers(min(10, size - 1), size, 16).tolist()
    shared = (tuple(ids[:4]), tuple(ids[4:9]))
    rests = [tuple(ids[9:12]), tuple(ids[9:11] + ids[12:14]), tuple(ids[14:16])]
    runner = PrefixRunner(model.base_model, device, dtype, PrefixCache(1 << 30), 64)
    # a second path of another length makes the passes padded
    prefix, _ = runner.prefixes([shared, (shared[0], (ids[0],))])
    trie = TokenTrie()
    ends = [trie.insert(rest) for rest in rests]
    rows = [Row(prefix, trie.tokens, trie.depths, trie.ancestors()), Row(None, ids[:3])]
    with torch.inference_mode():
        packed = Head(model).logits(runner.forward(rows).hidden[0, ends]).softmax(-1)
        plain = torch.cat(
            [
                model(input_ids=torch.tensor([PromptTokens(shared, rest).ids], device=device)).logits[:, -1].float()
                for rest in rests
            ]
        ).softmax(-1)
    return float((packed - plain).abs().sum(-1).max()) / 2
