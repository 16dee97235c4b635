"""What the reading and the tagging voter see of a word: states of a language model, of an encoder, and its shape.

A causal model sees nothing to the right of a word, so the text is written twice and the second copy is read: there
every word is read with the whole sentence before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from el4ner.config import ReadingConfig
from el4ner.engines.base import Encoder, Engine, FloatArray, IntArray, TokenStates
from el4ner.records import Span
from el4ner.text import words

FEATURE_VERSION = 3
"""Part of every cache key; raised whenever the same text would get other features."""

_GROUP = 2048
"""Characters read at a time: with the embedded models the states of a token take 14 KiB, and of a text written twice
there are twice as many."""

SHAPE_NAMES = (
    "starts upper", "all upper", "all lower", "has digit", "all digits", "symbol", "at sign", "hash sign",
    "one character", "eight or more characters", "first word", "upper inside", "after symbol", "after at or hash",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WordFeatures:
    """One text, word by word.

    units (W): the words that were read. values (W, D) f32. widths: of the layers whose states come first in `values`,
    in order; what is left are shapes. truncated_at: as in TokenStates.
    """

    units: tuple[Span, ...]
    values: FloatArray
    widths: tuple[int, ...]
    truncated_at: int | None = None


def shapes(text: str, units: Sequence[Span]) -> FloatArray:
    """Plain properties of every word, 0 or 1: (W, len(SHAPE_NAMES)) f32."""
    rows = np.zeros((len(units), len(SHAPE_NAMES)), dtype=np.float32)
    before = " "
    for row, unit in zip(rows, units, strict=True):
        word = text[unit.start : unit.end]
        row[:] = (
            word[0].isupper(),
            len(word) > 1 and word.isupper(),
            word.islower(),
            any(character.isdigit() for character in word),
            word.isdigit(),
            not any(character.isalnum() for character in word),
            word == "@",
            word == "#",
            len(word) == 1,
            len(word) >= 8,
            before == " ",
            any(character.isupper() for character in word[1:]),
            not any(character.isalnum() for character in before),
            before in ("@", "#"),
        )
        before = word
    return rows


def pool_tokens(units: Sequence[Span], offsets: IntArray, states: FloatArray) -> FloatArray:
    """Mean of the token states that touch each word: (W, D) f32.

    offsets (T, 2) i64 ascending, states (T, D) f32. A word that no token touches gets zeros.
    """
    means = np.zeros((len(units), states.shape[1]), dtype=np.float32)
    if not len(offsets):
        return means
    starts, ends = offsets[:, 0], offsets[:, 1]
    first = np.searchsorted(ends, [unit.start for unit in units], side="right")
    stop = np.searchsorted(starts, [unit.end for unit in units], side="left")
    for mean, low, high in zip(means, first, stop, strict=True):
        if high > low:
            mean[:] = states[low:high].mean(axis=0)
    return means


class FeatureReader:
    """Reads texts into word features.

    key: what the features depend on, for caches. engine: a model whose hidden states can be read.
    """

    def __init__(self, engine: Engine, encoder: Encoder | None, config: ReadingConfig) -> None:
        self._engine = engine
        self._encoder = encoder if config.encoder_depths else None
        self._config = config
        self._layers = sorted({max(1, round(share * engine.n_layers)) for share in config.depths})
        depth = self._encoder.n_layers if self._encoder is not None else 0
        self._encoder_layers = sorted({max(1, round(share * depth)) for share in config.encoder_depths})
        encoder_source = self._encoder.source if self._encoder is not None else None
        self.key = [
            "features", FEATURE_VERSION, engine.source, self._layers, encoder_source, self._encoder_layers,
            config.twice, config.shapes, config.max_text_tokens,
        ]  # fmt: skip

    def read(self, texts: Sequence[str]) -> list[WordFeatures]:
        """The features of every text. The text is read up to the shortest of what the readers can take."""
        found = dict(self.each(texts))
        return [found[index] for index in range(len(texts))]

    def each(self, texts: Sequence[str]) -> Iterator[tuple[int, WordFeatures]]:
        """(index, features) of every text, short ones first: for who does not keep the features of all at once."""
        for group in _groups(texts):
            shown = [texts[index] for index in group]
            states = [self._read_model(shown)]
            if self._encoder is not None:
                states.append(self._encoder.read(shown, self._encoder_layers))
            for index, text, *read in zip(group, shown, *states, strict=True):
                yield index, self._combine(text, read)

    def _read_model(self, texts: Sequence[str]) -> list[TokenStates]:
        if not self._config.twice:
            return self._engine.read(texts, self._layers)
        # a text that would not fit twice is cut first, so that both copies end at the same place
        cut_at = self._cuts(texts)
        shown = [text if end is None else text[:end] for text, end in zip(texts, cut_at, strict=True)]
        states = self._engine.read([f"{text}\n{text}" for text in shown], self._layers)
        return [_second_copy(found, len(text) + 1, end) for found, text, end in zip(states, shown, cut_at, strict=True)]

    def _cuts(self, texts: Sequence[str]) -> list[int | None]:
        """Code points up to which each text is read; None for all of it."""
        limit = min(self._config.max_text_tokens, self._engine.max_tokens // 2 - 2)
        counts = self._engine.count_tokens([(text,) for text in texts if len(text) > limit])
        long = dict(zip((index for index, text in enumerate(texts) if len(text) > limit), counts, strict=True))
        cuts: list[int | None] = []
        for index, text in enumerate(texts):
            if long.get(index, 0) <= limit:
                cuts.append(None)
                continue
            units = words(text)
            low, high = 0, len(units)
            while low < high:
                middle = (low + high + 1) // 2
                if self._engine.count_tokens([(text[: units[middle - 1].end],)])[0] <= limit:
                    low = middle
                else:
                    high = middle - 1
            cuts.append(units[low - 1].end if low else 0)
        return cuts

    def _combine(self, text: str, read: Sequence[TokenStates]) -> WordFeatures:
        ends = [states.truncated_at for states in read if states.truncated_at is not None]
        end = min(ends, default=None)
        units = [unit for unit in words(text) if end is None or unit.end <= end]
        parts: list[FloatArray] = []
        for states in read:
            parts += [pool_tokens(units, states.offsets, states.states[layer]) for layer in sorted(states.states)]
        widths = tuple(part.shape[1] for part in parts)
        if self._config.shapes:
            parts.append(shapes(text, units))
        return WordFeatures(tuple(units), np.concatenate(parts, axis=1), widths, end)


def _groups(texts: Sequence[str]) -> Iterator[list[int]]:
    """Indices of texts that are read at once: of similar length, which run together, and of `_GROUP` characters in all.

    A longer text is a group of its own.
    """
    group: list[int] = []
    size = 0
    for index in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        if group and size + len(texts[index]) > _GROUP:
            yield group
            group, size = [], 0
        group.append(index)
        size += len(texts[index])
    if group:
        yield group


def _second_copy(found: TokenStates, base: int, end: int | None) -> TokenStates:
    """The states over the second copy, with offsets into the text; `end` is where the text was cut before.

    A text of few characters that are many tokens each is not cut before, and the model may read less of the copy.
    """
    if found.truncated_at is not None:
        read = max(found.truncated_at - base, 0)
        end = read if end is None else min(read, end)
    kept = found.offsets[:, 0] >= base
    return TokenStates(found.offsets[kept] - base, {layer: array[kept] for layer, array in found.states.items()}, end)
