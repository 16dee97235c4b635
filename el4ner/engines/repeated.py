"""Prefixes for architectures that cannot be packed: the model's own cache, copied for every continuation.

A cache of any kind (a sliding window, a recurrent state) is right behind the prefix that it was made from, so a copy of
it continues that prefix rightly. Whether this model's cache can be copied is tried on the model itself.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from el4ner.engines.packing import TOLERANCE, positions_change


class RepeatedCache:
    """Runs a whole model behind prefixes, one row at a time. usable: whether prefixes are kept; else all is run again.

    The last prefix is kept. run_tokens: tokens that went through the model so far.
    """

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self.device = device
        self.run_tokens = 0
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._held: tuple[tuple[int, ...], Any] = ((), None)
        # positions that depend on the length of the whole text would make a kept prefix wrong behind it
        self.usable = not positions_change(model.config.get_text_config())
        self.usable = self.usable and self._check(dtype)
        self.run_tokens = 0

    def _check(self, dtype: torch.dtype) -> bool:
        size = int(self.model.config.get_text_config().vocab_size)
        ids = tuple(np.random.default_rng(7).integers(min(10, size - 1), size, 8).tolist())
        try:
            self.run(ids[:5], ids[5:], 1)
            again, _ = self.run(ids[:5], ids[5:], 1)  # a continuation must not have changed what is kept
            plain, _ = self.run((), ids, 1)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
            return False
        distance = float((again.softmax(-1) - plain.softmax(-1)).abs().sum()) / 2
        return self._held[1] is not None and distance <= TOLERANCE[dtype]

    def run(self, prefix: Sequence[int], rest: Sequence[int], last: int) -> tuple[torch.Tensor, Any]:
        """Logits (last, V) f32 behind the last tokens of prefix and rest, and the cache behind them or None.

        last: at most the number of tokens in `rest`, which has one at least.
        """
        past = self._after(tuple(prefix)) if self.usable and prefix else None
        ids = list(rest) if past is not None else [*prefix, *rest]
        output = self._forward(ids, past, last)
        return output.logits[0, -last:].float(), getattr(output, "past_key_values", None)

    def follow(self, ids: Sequence[int], past: Any) -> tuple[torch.Tensor, Any]:
        """Logits (V,) f32 behind `ids`, which continue the cache `past`."""
        output = self._forward(list(ids), past, 1)
        return output.logits[0, -1].float(), getattr(output, "past_key_values", None)

    def _after(self, prefix: tuple[int, ...]) -> Any:
        """A copy of the cache behind a prefix."""
        if self._held[0] != prefix:
            self._held = ((), None)  # the old one's memory is free before the new one is made
            output = self._forward(list(prefix), None, 1)
            self._held = (prefix, getattr(output, "past_key_values", None))
        return copy.deepcopy(self._held[1])

    def _forward(self, ids: list[int], past: Any, last: int) -> Any:
        keywords: dict[str, Any] = {"logits_to_keep": last} if self._keeps else {}
        if past is not None:
            keywords["past_key_values"] = past
        self.run_tokens += len(ids)
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=True, **keywords)
