"""Models of published shapes with random weights: speed and memory do not depend on what the weights say.

They are made from a configuration written here, on the device where they run, and read with the embedded model's
tokenizer. What such a model answers means nothing; that two ways of running it give the same answer still does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from el4ner.engines import load_engine
from el4ner.errors import ConfigError
from el4ner.models import local_folder, resolve

PREFIX = "random:"

SHAPES: Mapping[str, Mapping[str, Any]] = {
    # 8 layers of width 512: about 29 million parameters beside the vocabulary; minutes on any machine
    "small": {
        "model_type": "qwen2", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 49152, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    # for tests: seconds
    "tiny": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    # the architectures below, for a dry run of what is measured with them
    "tiny-qwen2": {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "tiny-phi3": {
        "model_type": "phi3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152, "max_position_embeddings": 4096,
        "sliding_window": None, "tie_word_embeddings": False,
    },
    "tiny-glm4": {
        "model_type": "glm4", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 49152,
        "max_position_embeddings": 4096, "attention_bias": False, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    # as published by Qwen for Qwen2.5-14B-Instruct
    "qwen2.5-14b": {
        "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    # as published by Microsoft for Phi-4
    "phi-4-14b": {
        "model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352, "max_position_embeddings": 16384,
        "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0, "partial_rotary_factor": 1.0},
        "sliding_window": None, "tie_word_embeddings": False,
    },
    # as published by Z.ai for GLM-4-9B-0414
    "glm-4-9b": {
        "model_type": "glm4", "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552,
        "max_position_embeddings": 32768, "attention_bias": False, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}  # fmt: skip


def is_random(source: str) -> bool:
    """Whether a source names one of these models: `random:NAME`."""
    return source.startswith(PREFIX)


def shape_config(source: str) -> Any:
    """The transformers configuration of `random:NAME`. Raises ConfigError for an unknown name."""
    import transformers

    name = source.removeprefix(PREFIX)
    if name not in SHAPES:
        raise ConfigError(f"model {source!r}; choose from {', '.join(PREFIX + known for known in SHAPES)}")
    settings = dict(SHAPES[name])
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return transformers.AutoConfig.for_model(settings.pop("model_type"), **settings, **ends)


def check_source(source: str) -> None:
    """Whether there can be such a model, before any is loaded. Raises ConfigError."""
    if is_random(source):
        shape_config(source)
    else:
        resolve(source)


def bench_engine(source: str, *, device: str, dtype: str, chat: bool, **options: Any) -> Any:
    """The engine of a source, `random:NAME` among them. Raises ConfigError and what `load_engine` raises."""
    if not is_random(source):
        return load_engine(source, device=device, dtype=dtype, chat=chat, **options)
    import torch
    import transformers

    from el4ner.engines.attention import install
    from el4ner.engines.loading import LoadedModel, choose_device, choose_dtype
    from el4ner.engines.transformers import TransformersEngine

    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype, torch_device)
    torch.manual_seed(0)
    with torch.device(torch_device):
        model = transformers.AutoModelForCausalLM.from_config(shape_config(source), dtype=torch_dtype).eval()
    model.requires_grad_(False)
    if torch_device.type == "cpu":
        install(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(local_folder(resolve("embedded:smollm2")))
    loaded = LoadedModel(model, tokenizer, source, torch_device, torch_dtype)
    return TransformersEngine(source, source, chat=chat, loaded=loaded, **options)
