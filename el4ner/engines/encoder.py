"""A sentence encoder: unit vectors of texts, and hidden states of their tokens.

The common layout (Transformer, mean pooling, optional normalisation) is run with transformers directly, because
importing sentence_transformers takes seconds; every other layout goes through sentence_transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from el4ner.conversion import quiet_transformers
from el4ner.engines.base import FloatArray, TokenStates
from el4ner.engines.batches import check_layers, even_batches, length_batches
from el4ner.engines.loading import (
    check_complete,
    choose_device,
    choose_dtype,
    load_errors,
    numbers_of,
    one_at_a_time,
    run_errors,
)
from el4ner.engines.states import cut, find_blocks, read_batch, token_states
from el4ner.engines.tokens import TextTokens
from el4ner.errors import EngineError
from el4ner.hub import loading_options
from el4ner.models import ResolvedModel, local_folder, resolve

_BATCH_TOKENS = {"cuda": 65536}

_EVEN_TOKENS = {"encode": 128, "read": 384}
_EVEN_MULTIPLE = 8
"""On a CPU texts run in batches of fixed shapes: so many tokens, rows padded to a multiple of this many."""


class SentenceEncoder:
    """A bidirectional sentence encoder (implements `engines.base.Encoder`).

    implementation: "direct" or "sentence-transformers", chosen by the layout of the model's folder unless given.
    """

    def __init__(
        self,
        source: str = "embedded:minilm",
        *,
        device: str = "auto",
        dtype: str = "auto",
        implementation: str = "auto",
    ) -> None:
        resolved = resolve(source)
        if resolved.kind in ("server", "gguf"):
            raise EngineError(f"encoder {source!r}: a {resolved.kind} cannot serve as encoder; name a folder or hub id")
        self.name = source
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        folder = _local_folder_of(resolved)
        layout = _standard_layout(folder)
        if implementation == "auto":
            implementation = "sentence-transformers" if layout is None else "direct"
        if implementation not in ("direct", "sentence-transformers"):
            raise EngineError(f"implementation={implementation!r}; choose auto, direct or sentence-transformers")
        if implementation == "direct" and layout is None:
            raise EngineError(f"encoder {source!r} does not end in mean pooling; use implementation='auto'")
        self.implementation = implementation
        with load_errors(resolved), quiet_transformers():
            self._load(str(folder), resolved)
        if layout is not None and implementation == "direct":
            self._limit = min(layout, self._positions)
        revision = resolved.identity or getattr(self.model.config, "_commit_hash", None)
        name = f"{resolved.name}@{revision[:16]}" if revision else resolved.name
        self.source = numbers_of(name, self.device, self.dtype)

    def _load(self, folder: str, resolved: ResolvedModel) -> None:
        options = loading_options(resolved)
        self._pipeline: Any = None
        if self.implementation == "direct":
            import transformers

            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **options)
            model, told = transformers.AutoModel.from_pretrained(
                folder, dtype=self.dtype, use_safetensors=True, output_loading_info=True, **options
            )
            check_complete(resolved.name, "an encoder", told, unused="pooler.")
            self.model: Any = model.to(self.device)
        else:
            from sentence_transformers import SentenceTransformer

            self._pipeline = SentenceTransformer(
                folder,
                device=str(self.device),
                model_kwargs={"dtype": self.dtype, "use_safetensors": True},
                **options,
            )
            self.model = self._pipeline[0].auto_model
            self.tokenizer = self._pipeline.tokenizer
        self.model.eval()
        if not getattr(self.tokenizer, "is_fast", False):
            raise EngineError(f"encoder {resolved.name!r} has no fast tokenizer; el4ner needs one for offsets")
        self._tokens = TextTokens(self.tokenizer)
        self._blocks = find_blocks(self.model)
        self._special = _special_frame(self.tokenizer)
        # RoBERTa-like models have two positions more than tokens; their tokenizer knows the number of tokens
        known = (getattr(self.model.config, "max_position_embeddings", 512), self.tokenizer.model_max_length)
        self._positions = int(min(known))
        self._limit = self._positions

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @one_at_a_time
    def encode(self, texts: Sequence[str]) -> FloatArray:
        """texts (N) -> unit vectors (N, D) f32. A text given several times is encoded once.

        A text longer than the encoder's own limit is cut there, as the encoder was trained.
        """
        unique = list(dict.fromkeys(texts))
        if not unique:
            return np.zeros((0, self.model.config.hidden_size), dtype=np.float32)
        with run_errors(self.name):
            vectors = self._encode_direct(unique) if self._pipeline is None else self._encode_pipeline(unique)
        row = {text: position for position, text in enumerate(unique)}
        return np.ascontiguousarray(vectors[[row[text] for text in texts]])

    def _encode_pipeline(self, texts: list[str]) -> FloatArray:
        vectors = self._pipeline.encode(
            texts, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True, batch_size=64
        )
        return np.asarray(vectors, dtype=np.float32)

    def _encode_direct(self, texts: list[str]) -> FloatArray:
        rows, _ = self._rows(texts, self._limit)
        vectors = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for batch, shape in self._batches(rows, "encode"):
            chosen = [rows[index] for index in batch]
            n_rows, longest = shape or (len(chosen), max(len(row) for row in chosen))
            ids = torch.full((n_rows, longest), self.tokenizer.pad_token_id or 0, dtype=torch.long)
            mask = torch.zeros((n_rows, longest), dtype=torch.long)
            mask[len(chosen) :, 0] = 1  # a row without any token would give NaN
            for position, row in enumerate(chosen):
                ids[position, : len(row)] = torch.tensor(row)
                mask[position, : len(row)] = 1
            ids, mask = ids.to(self.device), mask.to(self.device)
            with torch.inference_mode():
                states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (B, T, D)
                weights = mask[:, :, None].float()
                means = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
                vectors[batch] = torch.nn.functional.normalize(means, dim=1)[: len(chosen)].cpu().numpy()
        return vectors

    @one_at_a_time
    def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:
        """Hidden states of every token of every text. Texts longer than the model's positions are cut."""
        wanted = check_layers(layers, self.n_layers)
        rows, frames = self._rows(texts, self._positions)
        before = len(self._special[0])
        empty = {layer: np.zeros((0, self.model.config.hidden_size), dtype=np.float32) for layer in wanted}
        results = [TokenStates(offsets, dict(empty), None) for offsets, _ in frames]  # of texts without any token
        for batch, shape in self._batches(rows, "read"):
            with run_errors(self.name):
                chosen = [rows[index] for index in batch]
                states = read_batch(self.model, self._blocks, chosen, wanted, self.device, mask=True, shape=shape)
            for index, found in zip(batch, states, strict=True):
                offsets, truncated_at = frames[index]
                inner = {layer: array[before : before + len(offsets)] for layer, array in found.items()}
                results[index] = token_states(offsets, inner, truncated_at)
        return results

    def _batches(self, rows: list[list[int]], purpose: str) -> list[tuple[list[int], tuple[int, int] | None]]:
        """Indices of texts that run together, and the shape to pad them to."""
        lengths = [len(row) for row in rows]
        if self.device.type != "cpu":
            budget = _BATCH_TOKENS.get(self.device.type, 4096)
            return [(batch, None) for batch in length_batches(lengths, budget)]
        even = even_batches(lengths, _EVEN_MULTIPLE, _EVEN_TOKENS[purpose])
        return [(batch, (n_rows, min(tokens, self._positions))) for batch, n_rows, tokens in even]

    def _rows(self, texts: Sequence[str], limit: int) -> tuple[list[list[int]], list[tuple[Any, int | None]]]:
        """Token ids with the model's own frame ([CLS] ... [SEP]), and per text its offsets and cut."""
        before, after = self._special
        room = limit - len(before) - len(after)
        rows, frames = [], []
        for ids, offsets in self._tokens.with_offsets(texts):
            kept, kept_offsets, truncated_at = cut(ids, offsets, room)
            rows.append([*before, *kept, *after])
            frames.append((kept_offsets, truncated_at))
        return rows, frames


def _local_folder_of(resolved: ResolvedModel) -> Path:
    """The local folder; a hub id's files are fetched where they are not in the local cache."""
    if resolved.kind == "folder":
        return Path(local_folder(resolved))
    from huggingface_hub import snapshot_download

    with load_errors(resolved), quiet_transformers():
        patterns = ["*.json", "*.safetensors", "*.txt", "tokenizer.model"]
        return Path(snapshot_download(resolved.location, revision=resolved.identity, allow_patterns=patterns))


def _standard_layout(folder: Path) -> int | None:
    """The token limit of a folder laid out as Transformer, mean Pooling [, Normalize]; None for anything else."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0]["path"]:
            return None
        pooling = json.loads((folder / modules[1]["path"] / "config.json").read_text(encoding="utf-8"))
        switched_on = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True}
        settings = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
        general = folder / "config_sentence_transformers.json"
        prompts = json.loads(general.read_text(encoding="utf-8")) if general.exists() else {}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    limit = settings.get("max_seq_length")
    plain = switched_on == {"pooling_mode_mean_tokens"} and not prompts.get("default_prompt_name")
    return int(limit) if plain and limit and not settings.get("do_lower_case") else None


def _special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids a tokenizer puts before and after a single text."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(framed) - len(inner) + 1):
        if framed[start : start + len(inner)] == inner:
            return list(framed[:start]), list(framed[start + len(inner) :])
    raise EngineError(f"{type(tokenizer).__name__} changes a text when it adds its special tokens; not supported")
