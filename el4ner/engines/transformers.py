"""Local causal language models, run with transformers: hidden states, exact choice scores, greedy text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from el4ner.engines.base import TokenStates
from el4ner.engines.loading import load_model, run_errors
from el4ner.engines.states import check_layers, cut, find_blocks, length_batches, read_batch, token_states
from el4ner.engines.tokens import TextTokens

_READ_TOKENS = {"cpu": 2048, "cuda": 32768}


class TransformersEngine:
    """A causal language model (implements `engines.base.Engine`).

    source: `embedded:NAME`, a model folder, a .gguf file or a Hugging Face id. Engines of one source, device and dtype
    share one model in memory. read_tokens: padded tokens per forward pass of `read`, by default 2,048 on a CPU and
    32,768 on a GPU. Raises ModelNotFoundError or EngineError if the model cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        source: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        read_tokens: int | None = None,
    ) -> None:
        self.name = name
        self._loaded = load_model(source, device, dtype)
        self.source = self._loaded.source
        self.device = self._loaded.device
        self.dtype = self._loaded.dtype
        self._config = self.model.config.get_text_config()
        self._read_tokens = read_tokens or _READ_TOKENS.get(self.device.type, 2048)
        self._text = TextTokens(self.tokenizer)

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._loaded.tokenizer

    @property
    def max_tokens(self) -> int:
        """Longest prompt plus completion: the smaller of the model's positions and the tokenizer's limit."""
        positions = getattr(self._config, "max_position_embeddings", None)
        # tokenizers without a limit of their own say about 1e30
        limits = [int(limit) for limit in (positions, self.tokenizer.model_max_length) if limit and limit < 10**9]
        return min(limits) if limits else 2048

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self._config.num_hidden_layers)

    def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:
        """Hidden states of plain texts, without template or special tokens, in float32.

        Layer n is the output of the n-th block, before the final norm also for the last one. The forward pass ends at
        the deepest layer asked for. Texts longer than `max_tokens` are cut and `truncated_at` says where.
        """
        wanted = check_layers(layers, self.n_layers)
        backbone = self.model.base_model
        blocks = find_blocks(backbone)
        rows, frames = [], []
        for ids, offsets in self._text.with_offsets(texts):
            kept, kept_offsets, truncated_at = cut(ids, offsets, self.max_tokens)
            rows.append(kept)
            frames.append((kept_offsets, truncated_at))
        empty = {layer: np.zeros((0, self._config.hidden_size), dtype=np.float32) for layer in wanted}
        results = [TokenStates(offsets, dict(empty), None) for offsets, _ in frames]
        for batch in length_batches([len(row) for row in rows], self._read_tokens):
            with run_errors(self.name):
                states = read_batch(backbone, blocks, [rows[index] for index in batch], wanted, self.device)
            for index, found in zip(batch, states, strict=True):
                results[index] = token_states(frames[index][0], found, frames[index][1])
        return results
