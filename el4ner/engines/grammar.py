"""Constrained decoding: lists of verbatim substrings of a text, by llguidance.

An item is a run of whole chunks of the text: words, single punctuation marks, single characters of scripts that write
no spaces between words. It begins and ends with something other than white space, holds no line break, and does not
contain the separator, so that splitting a reply at the separator always gives back its items. (A text that contains the
separator can still be quoted on either side of it.)
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.engines.base import SubstringList
from el4ner.errors import EngineError
from el4ner.text import unspaced

_JOINER = "\u200d"


def text_chunks(text: str) -> list[str]:
    """The chunks of a text, in order; joined they are the text.

    Combining marks, variation selectors, joiners and what a joiner joins stay with the character before them.
    """
    chunks: list[str] = []
    previous = ""
    for character in text:
        kind = _kind(character)
        joined = bool(chunks) and (kind == "extend" or chunks[-1].endswith(_JOINER))
        if chunks and (joined or (kind == previous and kind in ("word", "space"))):
            chunks[-1] += character
        else:
            chunks.append(character)
        if not (joined and kind == "extend"):
            previous = kind
    return chunks


def _kind(character: str) -> str:
    if unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf") or "\U0001f3fb" <= character <= "\U0001f3ff":
        return "extend"
    if character.isspace():
        return "space"
    if unspaced(character):
        return "character"
    return "word" if character.isalnum() or character == "_" else "mark"


def substring_list_grammar(grammar: SubstringList, leading_space: bool) -> str:
    """The Lark grammar of a reply. leading_space: one space may stand before it, as a model without chat template
    writes behind a colon. Raises EngineError if separator or empty word cannot work."""
    if not grammar.separator.strip() or "\n" in grammar.separator + grammar.empty or not grammar.empty.strip():
        raise EngineError(
            f"separator={grammar.separator!r}, empty={grammar.empty!r}: both need a visible character and no line break"
        )
    rest = max(0, grammar.max_items - 1)
    listed = f"ITEM (SEPARATOR ITEM){{0,{rest}}} | " if grammar.text.strip() and grammar.max_items > 0 else ""
    # one terminal for a space and what follows would hide the item's own start from the lexer
    space = '" "? ' if leading_space else ""
    lines = [f'start: {space}({listed}EMPTY) "\\n"', f"EMPTY: {json.dumps(grammar.empty)}"]
    if listed:
        separator = re.sub(r"([^\w\s])", r"\\\1", grammar.separator)
        chunks = json.dumps(text_chunks(grammar.text))
        lines += [
            f"SEPARATOR: {json.dumps(grammar.separator)}",
            f"ITEM: PIECE & /[^\\s]([^\\r\\n]*[^\\s])?/ & ~/(.|\\n)*{separator}(.|\\n)*/",
            f'PIECE: %regex {{"substring_chunks": {chunks}}}',
        ]
    return "\n".join(lines) + "\n"


class GrammarTokens:
    """llguidance's view of one tokenizer. Building it takes about a second, so it is kept with the model."""

    def __init__(self, tokenizer: Any, n_vocab: int, end_tokens: tuple[int, ...]) -> None:
        import llguidance.hf

        self.n_vocab = n_vocab
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=n_vocab, eos_token=list(end_tokens) or None
            )
        except Exception as error:  # a tokenizer that llguidance cannot read fails in its own ways
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise EngineError(
                f"llguidance cannot use this tokenizer ({reason}); turn grounded extraction off"
            ) from error

    def matcher(self, grammar: SubstringList, leading_space: bool) -> RowGrammar:
        """A fresh matcher for one reply. Raises EngineError if the grammar cannot be built."""
        import llguidance

        matcher = llguidance.LLMatcher(self._tokenizer, substring_list_grammar(grammar, leading_space), log_level=0)
        return RowGrammar(matcher, self.n_vocab, grammar)


def allowed_tokens(grammars: Sequence[RowGrammar]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Tokens that continue any of B replies, ascending (T,), and which of them continue each, (B, T).

    Raises EngineError if there is a reply that nothing continues.
    """
    bits = np.stack([grammar.bits() for grammar in grammars])
    if not bits.any(axis=1).all():
        raise EngineError("constrained decoding failed (no token continues a reply); turn grounded extraction off")
    tokens = np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(bits), bitorder="little"))
    return tokens, (bits[:, tokens >> 3] >> (tokens & 7).astype(np.uint8) & 1).astype(bool)


class RowGrammar:
    """The state of one reply that is bound to `grammar`: which tokens may come next."""

    def __init__(self, matcher: Any, n_vocab: int, grammar: SubstringList) -> None:
        self.grammar = grammar
        self._matcher = matcher
        self._mask: NDArray[np.int32] = np.zeros((1, (n_vocab + 31) // 32), dtype=np.int32)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = str(self._matcher.get_error()).strip().partition("\n")[0]
            raise EngineError(f"constrained decoding failed ({reason}); turn grounded extraction off for this text")

    def bits(self) -> NDArray[np.uint8]:
        """Four bytes (u8) for every 32 tokens, a bit for each, the lowest first, set where it continues the reply.

        Bits behind the last token are not set. Holds until the next call.
        """
        import llguidance.numpy

        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        self._check()
        bits: NDArray[np.uint8] = self._mask.view(np.uint8)[0]
        return bits

    def consume(self, token: int) -> None:
        """Take the token that was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def valid(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, one after the other, may come next."""
        return int(self._matcher.validate_tokens(list(tokens)))

    def restart(self) -> None:
        """Go back to the beginning of the reply."""
        self._matcher.reset()
        self._check()

    @property
    def finished(self) -> bool:
        """Whether the reply is complete."""
        return bool(self._matcher.is_stopped())
