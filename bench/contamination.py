"""What a pool and the sentences it is tested on share: exact copies are dropped from the pool, near copies counted."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from el4ner.records import Demonstration
from el4ner.text import words

NEAR = 0.8
"""Jaccard similarity of two sentences' sets of words from which on they count as near copies."""


class NearCopy(NamedTuple):
    """A pool sentence and the tested sentence most like it, by position, with the similarity of their sets of words."""

    pool: int
    tested: int
    similarity: float


def folded(text: str) -> str:
    """A text by which copies are found: case folded, every run of white space one space."""
    return " ".join(text.casefold().split())


def without_copies(
    pool: Iterable[Demonstration], tested: Iterable[Demonstration]
) -> tuple[list[Demonstration], list[Demonstration]]:
    """The pool's sentences that are not tested, and those that are, in the pool's order."""
    known = {folded(d.text) for d in tested}
    kept: list[Demonstration] = []
    dropped: list[Demonstration] = []
    for demonstration in pool:
        (dropped if folded(demonstration.text) in known else kept).append(demonstration)
    return kept, dropped


def word_set(text: str) -> frozenset[str]:
    """The words of a text, case folded; punctuation and symbols count as words."""
    return frozenset(text[unit.start : unit.end].casefold() for unit in words(text))


def near_copies(pool: Sequence[Demonstration], tested: Sequence[Demonstration], least: float = NEAR) -> list[NearCopy]:
    """Pool sentences with a near copy among the tested ones: |A and B| / |A or B| >= least over their sets of words.

    Exact, without comparing all pairs: two sets that are so alike share one of the rarest n - ceil(least n) + 1 words
    of each (prefix filter; Chaudhuri, Ganti and Kaushik 2006, Bayardo, Ma and Srikant 2007), and their sizes differ by
    the factor `least` at most. Sentences without words are left out. Raises ValueError unless 0 < least <= 1.
    """
    if not 0 < least <= 1:
        raise ValueError(f"least={least}; use a share above 0 and up to 1")
    pool_sets = [word_set(d.text) for d in pool]
    tested_sets = [word_set(d.text) for d in tested]
    frequency = Counter(word for own in (*pool_sets, *tested_sets) for word in own)

    def prefix(own: frozenset[str]) -> list[str]:
        rarest_first = sorted(own, key=lambda word: (frequency[word], word))
        return rarest_first[: len(own) - math.ceil(least * len(own) - 1e-9) + 1]

    holders: dict[str, list[int]] = defaultdict(list)
    for position, own in enumerate(tested_sets):
        for word in prefix(own) if own else ():
            holders[word].append(position)
    found = []
    for position, own in enumerate(pool_sets):
        best: NearCopy | None = None
        for other in sorted({t for word in (prefix(own) if own else ()) for t in holders.get(word, ())}):
            theirs = tested_sets[other]
            if min(len(own), len(theirs)) < least * max(len(own), len(theirs)) - 1e-9:
                continue
            common = len(own & theirs)
            similarity = common / (len(own) + len(theirs) - common)
            if similarity >= least - 1e-9 and (best is None or similarity > best.similarity):
                best = NearCopy(position, other, similarity)
        if best is not None:
            found.append(best)
    return found
