"""The output head of a causal model on chosen rows, with what some architectures do to the logits afterwards."""

from __future__ import annotations

from typing import Any, Literal

import torch

from el4ner.engines.base import FloatArray, IntArray
from el4ner.errors import EngineError
from el4ner.kernels import choice_logprobs


class Head:
    """Logits of hidden states (after the final norm), or log-probabilities of some tokens only.

    Knows soft-capping (`final_logit_softcapping`), Granite's `logits_scaling` (a divisor) and Cohere's `logit_scale` (a
    factor). Whether that is all the model does is checked against the model itself (see `packing.check`).
    """

    def __init__(self, model: Any) -> None:
        layer = model.get_output_embeddings()
        if layer is None or not hasattr(layer, "weight"):
            raise EngineError(f"{type(model).__name__} has no output embedding matrix")
        self.weight: torch.Tensor = layer.weight  # (V, D)
        self.bias: torch.Tensor | None = getattr(layer, "bias", None)
        config = model.config.get_text_config()
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._factor = 1.0
        if getattr(config, "logits_scaling", None):
            self._factor = 1.0 / float(config.logits_scaling)
        elif getattr(config, "logit_scale", None):
            self._factor = float(config.logit_scale)

    def _finish(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        if self._factor != 1.0:
            logits = logits * self._factor
        if self._cap:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits

    def logits(self, hidden: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """hidden (R, D) -> (R, V) f32; of some tokens (T,) i64 only, (R, T)."""
        weight, bias = self.weight, self.bias
        if tokens is not None:
            tokens = tokens.to(weight.device)
            weight, bias = weight[tokens], None if bias is None else bias[tokens]
        return self._finish(torch.nn.functional.linear(hidden, weight, bias))

    def widest(self) -> float:
        """The largest norm of a token's weights: no logit, but for a bias, is further from 0 than that times the norm
        of the hidden state."""
        return abs(self._factor) * float(self.weight.norm(dim=-1).max())

    def log_probabilities(
        self, hidden: torch.Tensor, tokens: IntArray, normalise: Literal["vocab", "choices"]
    ) -> FloatArray:
        """hidden (R, D), tokens (R, C) i64, padded with -1 -> (R, C) f32, by `el4ner.kernels.choice_logprobs`."""
        return choice_logprobs(
            hidden, self.weight, tokens, normalise, bias=self.bias, soft_cap=self._cap, scale=self._factor,
            backend="auto",
        )  # fmt: skip
