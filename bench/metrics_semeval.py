"""The four schemes of SemEval-2013 task 9.1 on sets of labelled spans, nested ones included.

A prediction meets at most one gold entity. Predictions that match one exactly are placed first; each other prediction,
in order of the text, takes the first gold entity left that it overlaps (scheme "type": of its own label, the one with
the nearest boundaries; else the first). What a meeting counts as:

    scheme    same span, same label   same span, other label   overlap, same label   overlap, other label
    strict    correct                 incorrect                incorrect             incorrect
    exact     correct                 correct                  incorrect             incorrect
    partial   correct                 correct                  partial               partial
    type      correct                 incorrect                correct               incorrect

A prediction without gold entity is spurious, a gold entity without prediction missed. With
credit = correct + partial / 2:

    precision = credit / (correct + incorrect + partial + spurious)
    recall    = credit / (correct + incorrect + partial + missed)

Sources: Segura-Bedmar et al. 2013 (SemEval-2013 task 9); D. Batista, "Named-Entity evaluation metrics based on
entity-level", as nervaluate implements it. nervaluate takes predictions as they come, so an inexact one can rob an
exact one of its gold entity where predictions overlap each other; on flat data both give the same counts (tested).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from el4ner.bench.resampling import Resampling
from el4ner.metrics import Pair

Triple = tuple[int, int, str]

SCHEMES = ("strict", "exact", "partial", "type")
OUTCOMES = ("correct", "incorrect", "partial", "missed", "spurious")

_SAME: dict[str, Callable[[Triple, Triple], bool]] = {
    "strict": lambda one, other: one == other,
    "exact": lambda one, other: one[:2] == other[:2],
    "partial": lambda one, other: one[:2] == other[:2],
    "type": lambda one, other: one == other,
}
"""When a prediction matches a gold entity exactly, so that it is placed before the others."""


def overlaps(one: Triple, other: Triple) -> bool:
    """Whether two half-open spans share a character."""
    return one[0] < other[1] and other[0] < one[1]


def outcomes(gold: Sequence[Triple], found: Sequence[Triple], scheme: str) -> tuple[int, int, int, int, int]:
    """Counts of one sentence in the order of OUTCOMES. gold, found: distinct triples in any order."""
    left = sorted(gold)
    same = _SAME[scheme]
    correct = incorrect = partial = spurious = 0
    waiting = []
    for claim in sorted(found):
        match = next((one for one in left if same(claim, one)), None)
        if match is None:
            waiting.append(claim)
        else:
            left.remove(match)
            correct += 1
    for claim in waiting:
        met = [one for one in left if overlaps(claim, one)]
        if not met:
            spurious += 1
            continue
        alike = [one for one in met if one[2] == claim[2]] if scheme == "type" else []
        if alike:
            left.remove(min(alike, key=lambda one: abs(one[0] - claim[0]) + abs(one[1] - claim[1])))
            correct += 1
        else:
            left.remove(met[0])
            partial += scheme == "partial"
            incorrect += scheme != "partial"
    return correct, incorrect, partial, len(left), spurious


def semeval(pairs: Sequence[Pair], resampling: Resampling) -> dict[str, Any]:
    """Each scheme's counts, precision, recall and F1 with interval. Claims that are not valid are spurious."""
    result: dict[str, Any] = {}
    for scheme in SCHEMES:
        counts = np.array([_counts(pair, scheme) for pair in pairs], dtype=np.int64)
        correct, incorrect, partial, missed, spurious = counts.T
        met = correct + incorrect + partial
        credit: NDArray[Any] = correct + 0.5 * partial
        score = resampling.score(np.stack([credit, met + spurious, met + missed], axis=1))
        total = dict(zip(OUTCOMES, (int(value) for value in counts.sum(axis=0)), strict=True))
        result[scheme] = {name: score[name] for name in ("precision", "recall", "f1", "ci95")} | total
    return result


def _counts(pair: Pair, scheme: str) -> tuple[int, int, int, int, int]:
    found = pair.found
    correct, incorrect, partial, missed, spurious = outcomes(pair.gold, sorted(found), scheme)
    return correct, incorrect, partial, missed, spurious + len(pair.claims) - len(found)
