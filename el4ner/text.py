"""Words, parts of speech and noun phrases of a text, always as code-point offsets into it. Pure: no model, no network.

A word unit is a run of letters, digits, marks and underscores, or one grapheme of anything else that is not space.
Runs stop at punctuation ("don|'|t", "U|.|S|.", "NF|-|kappaB"): finer units lose no entity boundary. Scripts that do
not put spaces where entities end (Chinese, Japanese, Korean, Thai, Lao, Khmer, Burmese ...) give one unit per
grapheme, for the same reason: in Korean a particle is glued to the name before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import regex  # type: ignore[import-untyped]

from el4ner.records import Span

_UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
    r"\p{Tai_Tham}\p{New_Tai_Lue}\p{Tai_Viet}\p{Javanese}\p{Balinese}\u30fc\uff70"
)
# U+200C and U+200D join letters inside Persian and Indic words; no gap may open there.
_RUN = rf"(?:[[\p{{L}}\p{{N}}_]--[{_UNSPACED}]][\p{{M}}\u200c\u200d]*+)++"
_WORD = regex.compile(rf"(?V1){_RUN}|(?![\s\p{{Cc}}\p{{Cf}}\p{{Z}}])\X")
# A run of units without space between them that is written as one word: "U.S.", "don't", "NF-kappaB", "AT&T".
_GLUED = regex.compile(rf"(?V1){_RUN}(?:[.,'\u2019&/+\-\u2010\u2011]{_RUN})*+")
_WORDLIKE = regex.compile(r"(?V1)[\p{L}\p{N}]")
_UNSPACED_CHARACTER = regex.compile(rf"(?V1)[{_UNSPACED}]")
_UNSPACED_RUN = regex.compile(r"(?V1)\p{Han}{2,12}+|[\p{Katakana}\u30fc]{2,}+|\p{Hangul}{2,12}+")


def unspaced(character: str) -> bool:
    """Whether a character belongs to a script that writes no spaces between words, or joins particles to them."""
    return _UNSPACED_CHARACTER.match(character) is not None


_HYPHENS = frozenset({"-", "\u2010", "\u2011"})  # stand alone in tokenised text: "22 - oxacalcitriol"
_MODIFIERS = frozenset({"JJ", "JJR", "JJS", "CD", "VBG", "VBN", "FW", "LS"})

PosOf = Literal["first", "max", "last"]

MAX_PHRASE_WORDS = 10
"""Longer runs of nouns come from lists and headings, not from one name; only their capitalised parts are kept."""

MAX_PART_WORDS = 4
"""Longest part of a noun phrase that is proposed beside the phrase itself."""

# fmt: off
_CONNECTORS = frozenset({
    "of", "the", "and", "for", "in", "on", "at", "to", "a", "de", "del", "della", "di", "da", "do", "dos", "du",
    "des", "la", "le", "les", "el", "los", "las", "von", "van", "der", "den", "zu", "y", "e", "et", "und", "al",
    "bin", "ibn", "n", "s",
    "&", "-", "\u2010", "\u2011", "\u2013", "'", "\u2019", ".", "/", "+", ":", "!",
})
# fmt: on


def words(text: str) -> list[Span]:
    """The word units of a text, in order, without overlap; whatever lies between two units is space or control.

    Linear time. A grapheme is never split, emoji sequences are one unit.
    """
    return [Span(*match.span()) for match in _WORD.finditer(text)]


@lru_cache(maxsize=1)
def _tagger() -> Any:
    """textblob's module of taggers by itself.

    The whole package imports nltk, and with it scikit-learn and pandas where these are installed: some seconds of every
    start and 170 MiB, of which a tagger needs nothing.
    """
    package = find_spec("textblob")
    folders = list(package.submodule_search_locations or ()) if package is not None else []
    spec = spec_from_file_location("el4ner._textblob_tagger", Path(folders[0], "_text.py")) if folders else None
    if spec is None or spec.loader is None:
        raise ImportError("textblob is not installed as files; reinstall it: pip install --force-reinstall textblob")
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FOLDER = Path(folders[0], "en")
    return module


@lru_cache(maxsize=1)
def _lexicon() -> Any:
    """The English tagger that textblob carries: a word list with suffix rules, no corpus to download."""
    tagger = _tagger()
    rules = {name: str(tagger.FOLDER / f"en-{name}.txt") for name in ("morphology", "context", "entities")}
    lexicon = tagger.Lexicon(path=str(tagger.FOLDER / "en-lexicon.txt"), language="en", **rules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # textblob leaves the closing of its file to the collector
        lexicon.load()
    return lexicon


def _unknown_tag(word: str, tag: str) -> str:
    """Repair of the tagger's guess for a word that is not in its list."""
    if not _WORDLIKE.search(word):
        return "SYM"  # the tagger calls every unknown string a noun, emoji included
    if any(character.isupper() for character in word):
        return "NNP"  # it sees names only in title case, not in "eBay", "NASDAQ" or "McDonald"
    return tag


def _tag(tokens: list[str]) -> list[str]:
    find_tags, lexicon = _tagger().find_tags, _lexicon()
    tags: list[str] = []
    for token, (_, tag) in zip(tokens, find_tags(list(tokens), lexicon=lexicon, language="en"), strict=True):
        if token.isdecimal():
            tags.append("CD")  # the lexicon reads "2" as "to" and "4" as "for", as in chats
        else:
            tags.append(tag if token in lexicon and _WORDLIKE.search(token) else _unknown_tag(token, tag))
    return tags


def _elements(text: str, units: Sequence[Span]) -> list[tuple[int, int]]:
    """Ranges of units written without space between them as one word ("U|.|S", "don|'|t"); other units alone."""
    by_start = {unit.start: index for index, unit in enumerate(units)}
    by_end = {unit.end: index for index, unit in enumerate(units)}
    ranges: list[tuple[int, int]] = []
    done = 0
    for match in _GLUED.finditer(text):
        start, end = by_start.get(match.start()), by_end.get(match.end())
        if start is None or end is None or end == start:
            continue
        ranges.extend((index, index + 1) for index in range(done, start))
        ranges.append((start, end + 1))
        done = end + 1
    ranges.extend((index, index + 1) for index in range(done, len(units)))
    return ranges


def pos_tags(text: str, units: Sequence[Span]) -> list[str]:
    """The Penn tag of every word unit, by textblob's bundled English lexicon tagger. No corpus, no network.

    A glued run that the lexicon knows ("U.S.", "don't") is looked up whole and gives all its units its tag. Words of
    other languages and scripts come out as NN, or NNP when capitalised; symbols and emoji as SYM or themselves.
    """
    lexicon = _lexicon()
    tokens: list[str] = []
    owner: list[int] = []  # unit -> token
    for start, end in _elements(text, units):
        whole = text[units[start].start : units[end - 1].end]
        known = end - start > 1 and (whole in lexicon or whole + "." in lexicon)
        pieces = [(start, end)] if known else [(index, index + 1) for index in range(start, end)]
        for first, last in pieces:
            owner.extend([len(tokens)] * (last - first))
            piece = text[units[first].start : units[last - 1].end]
            tokens.append(piece if piece in lexicon or piece + "." not in lexicon else piece + ".")
    tags = _tag(tokens)
    return [tags[index] for index in owner]


def pos_weight(tag: str) -> int:
    """Weight of a span by the part of speech of its word: proper noun 4, common noun 2, pronoun 1, otherwise 0.

    The values are known only from a re-implementation of EL4NER; the paper names the weights without giving them.
    """
    if tag.startswith("NNP"):
        return 4
    if tag.startswith("NN"):
        return 2
    return 1 if tag in {"PRP", "PRP$"} else 0


def span_weight(span: Span, units: Sequence[Span], tags: Sequence[str], pos_of: PosOf = "max") -> int:
    """Weight of a span of several words. Which word decides is not published.

    "max" (the default): the heaviest word, so that "the Rhine" weighs as a name. "first": the first word, as the
    re-implementation does. "last": the last word, where English noun phrases have their head.
    A span that covers no unit weighs 0.
    """
    weights = [
        pos_weight(tag)
        for unit, tag in zip(units, tags, strict=True)
        if unit.start < span.end and unit.end > span.start
    ]
    if not weights:
        return 0
    return {"max": max(weights), "first": weights[0], "last": weights[-1]}[pos_of]


def occurrences(text: str, surface: str, units: Sequence[Span]) -> list[Span]:
    """Every place, overlapping ones included, where `surface` stands in `text` from a unit's start to a unit's end."""
    at = text.find(surface)
    if not surface or at < 0:
        return []
    starts = {unit.start for unit in units}
    ends = {unit.end for unit in units}
    found: list[Span] = []
    while at >= 0:
        if at in starts and at + len(surface) in ends:
            found.append(Span(at, at + len(surface)))
        at = text.find(surface, at + 1)
    return found


def noun_phrases(text: str) -> list[Span]:
    """Spans that may be names or terms: candidates for recall, sorted, without repetition.

    Runs of adjectives, nouns, names and numbers that end in a noun, their shorter parts, and two runs with "of" or
    "with" between them; runs of capitalised words, also across connectors ("Bank of the West", "Ben & Jerry's"); parts
    of words written with hyphen or apostrophe ("London" of "London-based"). In scripts without spaces: runs of one of
    Han, Katakana, Hangul.
    """
    units = words(text)
    tags = pos_tags(text, units)
    elements = [_Element(text, units, tags, start, end) for start, end in _elements(text, units)]
    found: set[tuple[int, int]] = set()
    runs = list(_runs(elements, lambda element: element.nominal))
    for first, last in runs:
        _add_phrases(elements, first, last, found)
    for (first, middle), (second, last) in pairwise(runs):
        if second == middle + 1 and elements[middle].joins and last - first <= MAX_PHRASE_WORDS:
            found.add((elements[first].start, elements[last - 1].end))
    for first, last in _runs(elements, lambda element: element.capital):
        found.add((elements[first].start, elements[last - 1].end))
        found.update((element.start, element.end) for element in elements[first:last])
    _add_connected(elements, found)
    dotted = {(start, end + 1) for start, end in found if _is_abbreviation(text, units, end)}
    plain = {(start, end - 2) for start, end in found if end - start > 2 and _is_possessive(text, units, end)}
    spans = {Span(units[start].start, units[end - 1].end) for start, end in found | dotted | plain}
    spans.update(Span(*match.span()) for match in _UNSPACED_RUN.finditer(text))
    return sorted(spans)


def _is_abbreviation(text: str, units: Sequence[Span], end: int) -> bool:
    """Whether the full stop right after unit end - 1 belongs to it, as in "U.S." and "Inc."."""
    if end >= len(units) or text[units[end].start] != "." or units[end].start != units[end - 1].end:
        return False
    word = text[units[end - 1].start : units[end].end]
    inner_stop = end >= 2 and text[units[end - 2].start : units[end - 2].end] == "."
    return word in _lexicon() or (inner_stop and len(word) == 2)


def _is_possessive(text: str, units: Sequence[Span], end: int) -> bool:
    """Whether the last two of the units before `end` are an apostrophe and "s"."""
    return text[units[end - 2].start : units[end - 1].end] in {"'s", "\u2019s"}


class _Element:
    """A word as written, possibly of several units, seen as a part of a phrase. start, end: a range of units."""

    __slots__ = ("capital", "connector", "end", "head", "joins", "modifier", "nominal", "number", "parts", "start")

    def __init__(self, text: str, units: Sequence[Span], tags: Sequence[str], start: int, end: int) -> None:
        surface = text[units[start].start : units[end - 1].end]
        wordlike = [i for i in range(start, end) if _WORDLIKE.match(surface, units[i].start - units[start].start)]
        own = [tags[i] for i in wordlike]
        self.start, self.end = start, end
        unspaced = _UNSPACED_CHARACTER.match(surface) is not None
        self.head = not unspaced and any(tag.startswith("NN") or tag == "VBG" for tag in own)
        self.number = bool(own) and own[-1] == "CD"
        self.modifier = bool(own) and not unspaced and own[-1] in _MODIFIERS
        self.nominal = self.head or self.modifier or surface in _HYPHENS
        self.capital = bool(own) and not unspaced and any(c.isupper() or c.isdigit() for c in surface)
        self.joins = surface in {"of", "with"}
        self.connector = surface.casefold() in _CONNECTORS
        # "London-based" -> "London"; "Bush's" -> "Bush"; "IL-2-induced" -> "IL-2"
        self.parts = [(start, i + 1) for i in wordlike[:-1]] + [(i, end) for i in wordlike[1:-1]]


def _runs(elements: Sequence[_Element], wanted: Callable[[_Element], bool]) -> Iterator[tuple[int, int]]:
    """Maximal runs of wanted elements as ranges."""
    first: int | None = None
    for index, element in enumerate(elements):
        if wanted(element):
            first = index if first is None else first
        elif first is not None:
            yield first, index
            first = None
    if first is not None:
        yield first, len(elements)


def _add_phrases(elements: Sequence[_Element], first: int, last: int, found: set[tuple[int, int]]) -> None:
    """Phrases of one nominal run: the whole up to its last noun, and every shorter part that ends in a noun.

    The parts matter where a tagger without context glues neighbours ("movies star bruce willis").
    """

    def closes(index: int) -> bool:
        """Whether a phrase may end here: a noun, or a number behind one ("ps 4", "type I")."""
        numbered = elements[index].number and index > first and elements[index - 1].head
        return elements[index].head or numbered

    while last > first and not closes(last - 1):
        last -= 1
    for end in range(first, last):
        found.update(elements[end].parts)
        if closes(end):
            for start in range(max(first, end + 1 - MAX_PART_WORDS), end + 1):
                found.add((elements[start].start, elements[end].end))
    if 0 < last - first <= MAX_PHRASE_WORDS:
        found.add((elements[first].start, elements[last - 1].end))


def _add_connected(elements: Sequence[_Element], found: set[tuple[int, int]]) -> None:
    """Capitalised runs joined across at most two connectors each, up to three runs, as additional candidates."""
    runs = list(_runs(elements, lambda element: element.capital))
    for index, (first, _) in enumerate(runs):
        for joined in range(index + 1, min(index + 3, len(runs))):
            gap = elements[runs[joined - 1][1] : runs[joined][0]]
            if not 0 < len(gap) <= 2 or not all(element.connector for element in gap):
                break
            found.add((elements[first].start, elements[runs[joined][1] - 1].end))
