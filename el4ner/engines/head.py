"""The output head of a causal model on chosen rows, with what some architectures do to the logits afterwards."""

from __future__ import annotations

from typing import Any

import torch

from el4ner.errors import EngineError

_CHUNK_BYTES = 64 << 20


class Head:
    """Logits of hidden states (after the final norm), for all tokens or only for some columns.

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

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (R, D) -> (R, V) f32."""
        return self._finish(torch.nn.functional.linear(hidden, self.weight, self.bias))

    def columns(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """hidden (R, D), tokens (R,) -> the logit of each row's own token (R,) f32; costs R x D, not R x V x D."""
        products = (hidden.float() * self.weight[tokens].float()).sum(-1)
        if self.bias is not None:
            products = products + self.bias[tokens].float()
        # the model rounds its logits to its own dtype before anything else happens to them
        return self._finish(products.to(hidden.dtype))

    def log_normalisers(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (R, D) -> log of the sum of exp over the vocabulary (R,) f32, in chunks of rows."""
        rows = max(1, _CHUNK_BYTES // (4 * self.weight.shape[0]))
        return torch.cat([torch.logsumexp(self.logits(part), dim=-1) for part in hidden.split(rows)])
