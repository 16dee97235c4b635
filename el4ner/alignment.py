"""Surfaces that a model wrote, found again in the text. Pure; offsets are always those of the original text.

Three attempts, the strictest first: verbatim; case folded character by character, with a map back to the original
offsets (folding changes lengths: "İ" becomes two characters, "ß" becomes "ss"); word by word, ignoring space,
punctuation, accents and compatibility forms. What still is not found is not in the text; that is data, not an error.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from el4ner.records import Span
from el4ner.text import occurrences, words

AlignmentStatus = Literal["exact", "folded", "tokens", "absent"]


@dataclass(frozen=True, slots=True)
class Alignment:
    """Every place where a surface stands in a text, and how literally. No spans if and only if "absent"."""

    spans: tuple[Span, ...]
    status: AlignmentStatus


class Aligner:
    """Finds surfaces in one text. Building it is linear in the text.

    units: the word units of the text, `words(text)` if not given; a found span starts and ends at unit boundaries.
    """

    def __init__(self, text: str, units: Sequence[Span] | None = None) -> None:
        self.text = text
        self.units = tuple(words(text) if units is None else units)
        self._folded, self._origin = _fold(text)
        self._keys: list[tuple[str, Span]] = [
            (key, unit) for unit in self.units if (key := _key(text[unit.start : unit.end]))
        ]

    def align(self, surface: str) -> Alignment:
        """All occurrences of a surface by the strictest attempt that finds any."""
        surface = surface.strip()
        if not surface:
            return Alignment((), "absent")
        if exact := occurrences(self.text, surface, self.units):
            return Alignment(tuple(exact), "exact")
        if folded := self._find_folded(surface):
            return Alignment(folded, "folded")
        if tokens := self._find_tokens(surface):
            return Alignment(tokens, "tokens")
        return Alignment((), "absent")

    def _find_folded(self, surface: str) -> tuple[Span, ...]:
        needle, _ = _fold(surface)
        starts = {unit.start for unit in self.units}
        ends = {unit.end for unit in self.units}
        found: list[Span] = []
        at = self._folded.find(needle)
        while at >= 0:
            start, end = self._origin[at], self._origin[at + len(needle)]
            # Only where the folded match begins and ends with whole characters of the original.
            whole = (at == 0 or self._origin[at - 1] != start) and self._origin[at + len(needle) - 1] != end
            if whole and start in starts and end in ends:
                found.append(Span(start, end))
            at = self._folded.find(needle, at + 1)
        return tuple(found)

    def _find_tokens(self, surface: str) -> tuple[Span, ...]:
        wanted = [key for unit in words(surface) if (key := _key(surface[unit.start : unit.end]))]
        if not wanted:
            return ()
        n = len(wanted)
        return tuple(
            Span(self._keys[i][1].start, self._keys[i + n - 1][1].end)
            for i in range(len(self._keys) - n + 1)
            if self._keys[i][0] == wanted[0] and all(self._keys[i + j][0] == wanted[j] for j in range(1, n))
        )


def align(text: str, surfaces: Iterable[str], units: Sequence[Span] | None = None) -> list[Alignment]:
    """One alignment per surface."""
    aligner = Aligner(text, units)
    return [aligner.align(surface) for surface in surfaces]


def _fold(text: str) -> tuple[str, list[int]]:
    """The text case folded character by character, and for each folded character (and the end) its original offset."""
    pieces: list[str] = []
    origin: list[int] = []
    for offset, character in enumerate(text):
        folded = character.casefold()
        pieces.append(folded)
        origin.extend([offset] * len(folded))
    origin.append(len(text))
    return "".join(pieces), origin


def _key(unit: str) -> str:
    """What a word unit is compared by: case, accents above and below, and compatibility forms folded away.

    Empty for punctuation. Marks that are letters of their own (Indic vowels, Arabic points, Japanese voicing) stay:
    they have other combining classes than 202, 220 and 230.
    """
    plain = unicodedata.normalize("NFKD", unit.casefold())
    if not any(character.isalnum() for character in plain):
        return ""
    return "".join(character for character in plain if unicodedata.combining(character) not in (202, 220, 230))
