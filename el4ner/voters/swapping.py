"""Copies of pool sentences with other names in them, to fit on.

A read-out that has met a name in one sentence only may learn the name instead of what makes it one. In a copy most
mentions give way to others of the same label (mention replacement: Dai and Adel 2020, An Analysis of Simple Data
Augmentation for Named Entity Recognition, arXiv:2010.11683).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from el4ner.pool import Pool
from el4ner.records import Demonstration, LabelledSpan

_SHARE = 0.8
"""Of the mentions of a copy, those that give way."""


@dataclass(frozen=True, slots=True)
class _Mention:
    """An entity that lies in no other, as a text of its own; inner: it and what lies in it, in offsets of this text."""

    text: str
    inner: tuple[LabelledSpan, ...]


def copies_within(pool: Pool, most: int) -> int:
    """How many copies of each sentence make no more than `most` in all: 4 at most, none where it would be one."""
    copies = min(4, most // max(1, sum(bool(d.entities) for d in pool.sentences)))
    return copies if copies > 1 else 0


def swapped(pool: Pool, copies: int, seed: int = 0) -> tuple[list[Demonstration], list[int]]:
    """Copies of the pool's sentences with mentions swapped, and of which sentence each one is.

    A mention comes from a sentence of the same fold, so that what is fitted without a fold has met none of its names.
    There is no copy of a sentence without entities or with entities that cross, nor one in which nothing changed.
    """
    outer = [_outer(sentence) for sentence in pool.sentences]
    found: list[Demonstration] = []
    origins: list[int] = []
    known: dict[tuple[int, str], list[_Mention]] = defaultdict(list)
    for fold, sentence, own in zip(pool.folds, pool.sentences, outer, strict=True):
        for span, inner in own or ():
            known[fold, span.label].append(_mention(sentence, span, inner))
    for s, (sentence, own) in enumerate(zip(pool.sentences, outer, strict=True)):
        for copy in range(copies if own else 0):
            draw = random.Random(f"{seed} {copy} {pool.digests[s]}")
            changed = _copy(sentence, own or [], pool.folds[s], known, draw)
            if changed.text != sentence.text:
                found.append(changed)
                origins.append(s)
    return found, origins


def _outer(sentence: Demonstration) -> list[tuple[LabelledSpan, list[LabelledSpan]]] | None:
    """The entities that lie in no other, in order, each with what lies in it; None if two of them cross."""
    groups: list[tuple[LabelledSpan, list[LabelledSpan]]] = []
    for entity in sorted(sentence.entities, key=lambda e: (e.start, -e.end)):
        if not groups or entity.start >= groups[-1][0].end:
            groups.append((entity, []))
        elif entity.end <= groups[-1][0].end:
            groups[-1][1].append(entity)
        else:
            return None
    return groups


def _mention(sentence: Demonstration, span: LabelledSpan, inner: Sequence[LabelledSpan]) -> _Mention:
    own = [LabelledSpan(e.start - span.start, e.end - span.start, e.label) for e in (span, *inner)]
    return _Mention(sentence.text[span.start : span.end], tuple(own))


def _copy(
    sentence: Demonstration,
    outer: Sequence[tuple[LabelledSpan, list[LabelledSpan]]],
    fold: int,
    known: dict[tuple[int, str], list[_Mention]],
    draw: random.Random,
) -> Demonstration:
    """The sentence with mentions drawn from the known ones of its fold."""
    pieces: list[str] = []
    entities: list[LabelledSpan] = []
    length = end = 0
    for span, inner in outer:
        mention = _mention(sentence, span, inner)
        if draw.random() < _SHARE:
            mention = draw.choice(known[fold, span.label])
        between = sentence.text[end : span.start]
        length += len(between)
        entities += [LabelledSpan(length + e.start, length + e.end, e.label) for e in mention.inner]
        pieces += [between, mention.text]
        length += len(mention.text)
        end = span.end
    return Demonstration(sentence.id, "".join([*pieces, sentence.text[end:]]), tuple(entities))
