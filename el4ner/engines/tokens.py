"""Text to token ids, as data: what looks like a control token in a document stays plain text.

A tokenizer that puts a space before every text it is given (SentencePiece's dummy prefix) would put one before every
segment of a prompt; segments are therefore tokenised behind a newline whose own tokens are then dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from el4ner.engines.base import IntArray
from el4ner.errors import EngineError

_ANCHOR = "\n"


class TextTokens:
    """Tokenises text as inert data with one fast tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Tokens added to the vocabulary that are not marked special (such as <think>) would still be recognised in
        # a text; whitespace ones (runs of spaces or tabs) are ordinary text.
        self._added = frozenset(
            token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if not token.special and len(token.content.strip()) > 1
        )
        self._anchor: tuple[int, ...] = ()
        if len(self._plain(["x"])[0][0]) > 0 and self._adds_prefix():
            self._anchor = tuple(self._plain([_ANCHOR])[0][0])

    def _adds_prefix(self) -> bool:
        first = self.tokenizer.convert_ids_to_tokens(self._plain(["x"])[0][0][:1])[0]
        return str(first)[:1] in {"\u2581", "\u0120"} or str(first) == "\u2581"

    def segment(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt segment: no tokens added around it, control strings inert."""
        if not text:
            return ()
        if self._anchor:
            ids, _ = self._inert(_ANCHOR + text)
            if tuple(ids[: len(self._anchor)]) == self._anchor:
                return tuple(ids[len(self._anchor) :])
        return tuple(self._inert(text)[0])

    def with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], IntArray]]:
        """Per text its token ids (T) and code-point offsets (T, 2) i64."""
        found = []
        for text, (ids, offsets) in zip(texts, self._plain(texts), strict=True):
            if not self._added.isdisjoint(ids):
                ids, offsets = self._inert(text)
            found.append((ids, np.asarray(offsets, dtype=np.int64).reshape(-1, 2)))
        return found

    def _plain(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _inert(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of one text without any added token: each is cut after its first character."""
        (ids, offsets) = self._plain([text])[0]
        if self._added.isdisjoint(ids):
            return ids, offsets
        start, end = next(offset for i, offset in zip(ids, offsets, strict=True) if i in self._added)
        # an added token may swallow spaces around its own text; cut inside that text
        inside = end - len(text[start:end].lstrip()) + 1
        if not 0 < inside < len(text):
            raise EngineError(f"the tokenizer makes a control token of {text[start:end]!r}, which cannot be split")
        left_ids, left_offsets = self._inert(text[:inside])
        right_ids, right_offsets = self._inert(text[inside:])
        return left_ids + right_ids, left_offsets + [(s + inside, e + inside) for s, e in right_offsets]
