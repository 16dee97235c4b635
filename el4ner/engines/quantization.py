"""Loading weights in 4 or 8 bits, through what transformers offers (bitsandbytes)."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from el4ner.errors import EngineError

if TYPE_CHECKING:
    import torch

BITS: dict[str, float] = {"8bit": 8.0, "4bit": 4.5}
"""Bits of a quantised weight, with the scale that 64 weights share in 4 bits."""


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    """What `from_pretrained` takes as quantization_config, None for "none".

    4 bits are NormalFloat with a scale for 64 weights, multiplied in `dtype`. Raises EngineError for an unknown name,
    or where bitsandbytes is not installed.
    """
    if quantization == "none":
        return None
    if quantization not in BITS:
        raise EngineError(f"quantization={quantization!r} is unknown; choose none, 8bit or 4bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EngineError(
            f"quantization={quantization!r} needs bitsandbytes, which is not installed; "
            "run: pip install 'el4ner[quantization]', or choose none"
        )
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
