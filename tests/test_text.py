"""Words, tags, phrases and alignment: offsets are right on every script, whatever case folding does."""

from __future__ import annotations

import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from el4ner.alignment import Aligner, align
from el4ner.records import Span
from el4ner.text import noun_phrases, occurrences, pos_tags, pos_weight, span_weight, words

FAMILY = "\U0001f468‍\U0001f469‍\U0001f467"

UNITS = [
    ("", []),
    (" \t\n  ", []),
    ("Ada met Bob.", ["Ada", "met", "Bob", "."]),
    ("don't U.S. NF-kappaB", ["don", "'", "t", "U", ".", "S", ".", "NF", "-", "kappaB"]),
    ("snake_case 3.5%", ["snake_case", "3", ".", "5", "%"]),
    (f"go{FAMILY}now 🇩🇪🇫🇷", ["go", FAMILY, "now", "🇩🇪", "🇫🇷"]),
    ("e\u0301te\u0301 n\u0303", ["e\u0301te\u0301", "n\u0303"]),
    ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
    ("می‌خواهم", ["می‌خواهم"]),
    ("我在北京。", ["我", "在", "北", "京", "。"]),
    ("スーパー2号", ["ス", "ー", "パ", "ー", "2", "号"]),
    ("서울에서", ["서", "울", "에", "서"]),
    ("ที่กำ", ["ที่", "กำ"]),
    ("İstanbul", ["İstanbul"]),
    ("a\u200bb\u00a0c", ["a", "b", "c"]),
    ("x\ud800y", ["x", "\ud800", "y"]),
]


@pytest.mark.parametrize(("text", "expected"), UNITS)
def test_words(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in words(text)] == expected


@given(st.text())
def test_words_cover_everything_but_space_and_controls(text: str) -> None:
    units = words(text)
    at = 0
    for start, end in units:
        assert at <= start < end <= len(text)
        between = text[at:start]
        at = end
        assert all(c.isspace() or unicodedata.category(c) in {"Cc", "Cf", "Zs", "Zl", "Zp"} for c in between)
    assert not any(c.isalnum() for c in text[at:])


def test_words_is_linear_and_fast() -> None:
    text = "The Bush administration blamed trial lawyers in Köln, don't they? 😂 " * 500
    seconds = []
    for times in (1, 8):
        taken = []
        for _ in range(3):  # the best of three: other work on the core's other half slows this thread too
            begin = time.thread_time()
            found = words(text * times)
            taken.append(time.thread_time() - begin)
        assert len(found) / min(taken) > 20_000
        seconds.append(min(taken))
    assert seconds[1] < 8 * 4 * max(seconds[0], 0.01)  # quadratic would be 64


def test_words_takes_hostile_runs() -> None:
    for text in ("'" * 50_000, "a'" * 25_000, "\u0301" * 50_000, "‍" * 50_000, "a" * 200_000, "." * 50_000):
        begin = time.thread_time()  # a busy machine makes no difference
        words(text)
        assert time.thread_time() - begin < 2


def tags_of(text: str) -> dict[str, str]:
    units = words(text)
    return {text[unit.start : unit.end]: tag for unit, tag in zip(units, pos_tags(text, units), strict=True)}


def test_pos_tags_map_onto_units() -> None:
    tags = tags_of("She visited the U.S. with trial lawyers of eBay 😂 #")
    assert tags["She"] == "PRP"
    assert tags["U"] == tags["S"] == "NNP"
    assert tags["lawyers"] == "NNS"
    assert tags["eBay"] == "NNP"
    assert tags["😂"] == "SYM"
    assert [pos_weight(tags[word]) for word in ("U", "lawyers", "She", "visited", "😂")] == [4, 2, 1, 0, 0]


def test_the_tagger_is_textblobs_without_the_package_around_it(tmp_path: Path) -> None:
    """textblob imports nltk, and that scikit-learn and pandas: seconds of every start. A tagger needs none of it."""
    code = """
import sys
from el4ner import text
tokens = "Sadly , the old Ada Lovelace flew to Geneva in May 1843 , purring NFkappaB-ly at 3 dogs' homes !".split()
own = text._tagger().find_tags(list(tokens), lexicon=text._lexicon(), language="en")
print([name for name in ("textblob", "nltk", "sklearn", "pandas") if name in sys.modules])
from textblob._text import find_tags
from textblob.en import lexicon
print(own == find_tags(list(tokens), lexicon=lexicon, language="en"), dict(lexicon) == dict(text._lexicon()))
"""
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[]", "True True"], done.stderr


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_every_unit_has_a_tag(text: str) -> None:
    units = words(text)
    assert len(pos_tags(text, units)) == len(units)


def test_span_weight_names_the_word_that_decides() -> None:
    text = "the Rhine river it"
    units = words(text)
    tags = pos_tags(text, units)
    span = Span(0, 15)
    assert span_weight(span, units, tags) == 4
    assert span_weight(span, units, tags, "first") == 0
    assert span_weight(span, units, tags, "last") == 2
    assert span_weight(Span(3, 4), units, tags) == 0


PHRASES = [
    ("The Bush administration blamed trial lawyers.", {"Bush administration", "trial lawyers"}),
    ("He left the Bank of the West in London-based hands.", {"Bank of the West", "London"}),
    ("Ben & Jerry's sells ice cream", {"Ben & Jerry", "Ben & Jerry's", "ice cream"}),
    ("movies with bruce willis", {"bruce willis"}),
    ("the U.S. dollar and Apple Inc. shares", {"U.S.", "Apple Inc.", "Apple Inc"}),
    ("bought the phase 4 report", {"phase 4", "phase 4 report"}),
    ("他在北京大学。", {"他在北京大学"}),
    ("Поехали в Москву", {"Москву"}),
]


@pytest.mark.parametrize(("text", "expected"), PHRASES)
def test_noun_phrases(text: str, expected: set[str]) -> None:
    assert expected <= {text[start:end] for start, end in noun_phrases(text)}


@given(st.text(max_size=80))
@settings(max_examples=60, deadline=None)
def test_noun_phrases_are_sorted_and_inside(text: str) -> None:
    spans = noun_phrases(text)
    assert spans == sorted(set(spans))
    assert all(0 <= start < end <= len(text) and text[start:end].strip() for start, end in spans)


def test_occurrences_stand_at_word_boundaries() -> None:
    text = "art Art party art, İart art"
    assert occurrences(text, "art", words(text)) == [Span(0, 3), Span(14, 17), Span(24, 27)]
    assert occurrences("a a a", "a a", words("a a a")) == [Span(0, 3), Span(2, 5)]
    assert occurrences("a", "", words("a")) == []
    assert occurrences(f"x{FAMILY}", "\U0001f468", words(f"x{FAMILY}")) == []


ALIGNED = [
    ("Ada met Ada", "Ada", "exact", [(0, 3), (8, 11)]),
    ("İstanbul and IZMIR", "izmir", "folded", [(13, 18)]),
    ("İİİ Köln", "köln", "folded", [(4, 8)]),
    ("die Straße hier", "STRASSE", "folded", [(4, 10)]),
    ("İstanbul", "istanbul", "tokens", [(0, 8)]),
    ("the U.S. Army", "US Army", "absent", []),
    ("the U. S. Army", "u.s. army", "tokens", [(4, 14)]),
    ("don’t stop", "Don't  stop!", "tokens", [(0, 10)]),
    ("Cafe\u0301 Zu\u0308rich", "Café Zurich", "tokens", [(0, 13)]),
    ("ﬁne ﬁne", "f", "absent", []),
    ("das Maß", "mas", "absent", []),  # "ß" folds to two letters, of which half is no character
    ("ßa", "sa", "absent", []),
    ("party", "art", "absent", []),
    ("我在北京", "北京", "exact", [(2, 4)]),
    (f"hi {FAMILY} Bob", " Bob ", "exact", [(9, 12)]),
    ("x ! y", "!?", "absent", []),
    ("x", "  ", "absent", []),
]


@pytest.mark.parametrize(("text", "surface", "status", "spans"), ALIGNED)
def test_align(text: str, surface: str, status: str, spans: list[tuple[int, int]]) -> None:
    [found] = align(text, [surface])
    assert (found.status, list(found.spans)) == (status, spans)


@given(st.text(max_size=40), st.data())
@settings(deadline=None)
def test_align_finds_what_is_there_whatever_its_case(text: str, data: st.DataObject) -> None:
    units = words(text)
    if not units:
        return
    i = data.draw(st.integers(0, len(units) - 1))
    j = data.draw(st.integers(i, len(units) - 1))
    span = Span(units[i].start, units[j].end)
    surface = text[span.start : span.end]
    aligner = Aligner(text)
    exact = aligner.align(surface)
    # A unit may itself begin or end with a character that str.strip removes; none does in ordinary text.
    if surface == surface.strip():
        assert exact.status == "exact"
        assert span in exact.spans
    for found in (exact, aligner.align(surface.casefold()), aligner.align(surface.upper())):
        assert (not found.spans) == (found.status == "absent")
        for start, end in found.spans:
            assert {unit.start for unit in units} >= {start}
            assert {unit.end for unit in units} >= {end}
