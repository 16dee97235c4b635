"""Small random models of many architectures, with a tokenizer of one token per byte: made in a moment, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{{ '<|start|>' }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tiny_tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token per byte, two special tokens, and one added token that is not marked special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    inner.add_tokens([AddedToken("<think>", special=False)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", bos_token="<|start|>")
    tokenizer.chat_template = template
    return tokenizer


SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {},
    "phi3": {"sliding_window": None},
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 256, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.5},
    "gpt2": {"n_inner": 48},
}


def save_tiny(folder: Path, kind: str, template: str | None = TEMPLATE, **extra: Any) -> str:
    """A model of an architecture in a folder; the folder. extra: settings of its configuration."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **ARCHITECTURES.get(kind, {}), **extra})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # fresh weights are so small that every architecture looks alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return str(folder)
