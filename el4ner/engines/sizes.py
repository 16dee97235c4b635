"""How much memory a model takes, from its configuration alone: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from el4ner.conversion import copy_folder, is_intact, quiet_transformers
from el4ner.engines.quantization import BITS
from el4ner.errors import EngineError, ModelNotFoundError
from el4ner.hub import loading_options
from el4ner.models import ResolvedModel

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ModelSize:
    """parameters: weights in all. linear: those in the blocks' matrices, which quantisation makes smaller.

    layers, kv_width: blocks, and numbers of keys and values that one token takes in one of them. hidden, widest,
    vocabulary: width of a state, of the widest inner layer, of the head. positions: longest text in tokens.
    """

    parameters: int
    linear: int
    layers: int
    kv_width: int
    hidden: int
    widest: int
    vocabulary: int
    positions: int

    def weight_bytes(self, dtype: torch.dtype, quantization: str = "none") -> int:
        """Weights in memory. Quantised: the blocks' matrices in fewer bits, embedding and head as they are."""
        if quantization == "none":
            return self.parameters * dtype.itemsize
        return int((self.parameters - self.linear) * dtype.itemsize + self.linear * BITS[quantization] / 8)

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Keys and values of one token."""
        return self.layers * self.kv_width * dtype.itemsize


def size_of(resolved: ResolvedModel) -> ModelSize:
    """The size of a model that is here, or whose configuration the hub gives. Raises EngineError without one."""
    return size_of_config(model_config(resolved))


def model_config(resolved: ResolvedModel) -> Any:
    """The transformers configuration of a folder, a hub model or a GGUF file, whose metadata are read.

    Raises EngineError where that fails, ModelNotFoundError for a hub model that is neither cached nor fetched.
    """
    import transformers

    options = loading_options(resolved)
    location = resolved.location
    if resolved.kind == "gguf":
        assert resolved.identity is not None  # resolve() computes it for every GGUF file
        copy = copy_folder(resolved.identity)
        if is_intact(copy):
            location = str(copy)
        else:
            folder, _, name = location.rpartition("/")
            location, options["gguf_file"] = folder or ".", name
    try:
        with quiet_transformers():
            return transformers.AutoConfig.from_pretrained(location, **options)
    except Exception as error:  # a file or server can be wrong in many ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        failed = ModelNotFoundError if resolved.kind == "hub" and isinstance(error, OSError) else EngineError
        raise failed(f"model {resolved.name!r}: its configuration cannot be read ({reason})") from error


def encoder_parameters(resolved: ResolvedModel) -> int:
    """Weights of a sentence encoder's transformer. Raises EngineError where there is no configuration."""
    import torch
    import transformers

    config = model_config(resolved)
    with torch.device("meta"), quiet_transformers():
        model = transformers.AutoModel.from_config(config)
    return sum(p.numel() for p in model.parameters())


def size_of_config(config: Any) -> ModelSize:
    """The size of a model with this configuration, built without memory ("meta" device)."""
    import torch
    import transformers

    from el4ner.engines.states import find_blocks

    with torch.device("meta"), quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    blocks = find_blocks(model.base_model)
    linear = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, torch.nn.Linear))
    widths = [m.weight.shape[0] for m in blocks.modules() if isinstance(m, torch.nn.Linear)]
    queries = getattr(text, "num_attention_heads", None)  # None: a recurrent model, whose state does not grow
    heads = getattr(text, "num_key_value_heads", None) or queries or 0
    width = getattr(text, "head_dim", None) or (text.hidden_size // queries if queries else 0)
    return ModelSize(
        # parameters() lists a matrix that embedding and head share once
        parameters=sum(p.numel() for p in model.parameters()),
        linear=linear,
        layers=int(text.num_hidden_layers),
        kv_width=2 * int(heads) * int(width),
        hidden=int(text.hidden_size),
        widest=max([int(text.hidden_size), *widths]),
        vocabulary=int(text.vocab_size),
        positions=int(getattr(text, "max_position_embeddings", 0) or 0),
    )
