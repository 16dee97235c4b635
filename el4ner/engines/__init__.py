"""Engines answer batches: generate text, score choices, read hidden states. Models load when they are asked for."""

from __future__ import annotations

from typing import Any

from el4ner.engines.base import (
    Choose,
    Completion,
    Encoder,
    Engine,
    FloatArray,
    Generate,
    IntArray,
    Prompt,
    SubstringList,
    TokenStates,
)
from el4ner.engines.server import ServerSettings

__all__ = [
    "Choose",
    "Completion",
    "Encoder",
    "Engine",
    "FloatArray",
    "Generate",
    "IntArray",
    "Prompt",
    "ServerSettings",
    "SubstringList",
    "TokenStates",
    "load_encoder",
    "load_engine",
]


def load_engine(
    source: str, *, name: str | None = None, device: str = "auto", dtype: str = "auto", **options: Any
) -> Engine:
    """The engine for a source: `embedded:NAME`, a model folder, a .gguf file, a Hugging Face id, or a model behind a
    server (`openai:MODEL@URL`, `openai:MODEL`, or the URL of one that serves one model).

    name: the member's name, by default the source. device: auto, cpu, cuda, cuda:N or mps. dtype: auto, float32,
    bfloat16 or float16. options go to `TransformersEngine`. Engines of one source, device and dtype share one model.
    Servers have neither device nor dtype of ours; options go to `OpenAIEngine`.
    Raises ModelNotFoundError if there is no such model, EngineError if it cannot be loaded.
    """
    from el4ner.models import resolve

    if resolve(source).kind == "server":
        from el4ner.engines.openai import OpenAIEngine

        return OpenAIEngine(name or source, source, **options)
    from el4ner.engines.transformers import TransformersEngine

    return TransformersEngine(name or source, source, device=device, dtype=dtype, **options)


def load_encoder(source: str = "embedded:minilm", *, device: str = "auto", dtype: str = "auto") -> Encoder:
    """The sentence encoder for a source. Raises as `load_engine` does."""
    from el4ner.engines.encoder import SentenceEncoder

    return SentenceEncoder(source, device=device, dtype=dtype)
