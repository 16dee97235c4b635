"""What kind of error a wrong or missing entity is, one kind each, and which labels are taken for which.

wrong_label      the span is a gold entity's, the label is not
wrong_boundary   overlaps a gold entity of the same label
wrong_both       overlaps gold entities of other labels only
spurious         overlaps no gold entity
missed           a gold entity that was not found, and that no wrong entity above stands for
duplicate        a second copy of a prediction
not_in_text      offsets or surface that the text does not have
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from el4ner.bench.metrics_semeval import Triple, overlaps
from el4ner.metrics import Claim, Pair

KINDS = ("wrong_label", "wrong_boundary", "wrong_both", "spurious", "missed", "duplicate", "not_in_text")
NOTHING = ""
"""Stands for "no entity" in the confusion between labels."""


class Mistake(NamedTuple):
    """An error of one sentence: the claim, the gold entity it is about, or both."""

    kind: str
    claim: Claim | None
    gold: Triple | None


def mistakes(pair: Pair) -> Iterator[Mistake]:
    """The errors of one sentence: claims in their order, then gold entities that were missed."""
    wanted = set(pair.gold)
    accounted = pair.found & wanted
    for claim in pair.claims:
        if claim.kind != "valid":
            yield Mistake(claim.kind, claim, None)
        elif claim.triple not in wanted:
            mistake = _wrong(claim, pair.gold)
            accounted |= {mistake.gold} if mistake.gold else set()
            yield mistake
    for one in pair.gold:
        if one not in accounted:
            yield Mistake("missed", None, one)


def _wrong(claim: Claim, gold: Sequence[Triple]) -> Mistake:
    same_span = [one for one in gold if one[:2] == claim.triple[:2]]
    if same_span:
        return Mistake("wrong_label", claim, same_span[0])
    near = sorted((one for one in gold if overlaps(one, claim.triple)), key=lambda one: _distance(one, claim.triple))
    alike = [one for one in near if one[2] == claim.label]
    if alike:
        return Mistake("wrong_boundary", claim, alike[0])
    return Mistake("wrong_both", claim, near[0]) if near else Mistake("spurious", claim, None)


def _distance(one: Triple, other: Triple) -> int:
    return abs(one[0] - other[0]) + abs(one[1] - other[1])


def error_counts(pairs: Sequence[Pair]) -> dict[str, int]:
    """How many errors of each kind there are, all kinds listed."""
    counts = Counter(mistake.kind for pair in pairs for mistake in mistakes(pair))
    return {kind: counts[kind] for kind in KINDS}


def confusion(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Rows {"gold", "predicted", "n"} on the same span; "" is no entity on exactly that span. Most frequent first.

    A gold span with the right label counts as right and with nothing else; otherwise with each label it was given.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for pair in pairs:
        wanted, found = set(pair.gold), pair.found
        counts.update((label, label) for _, _, label in wanted & found)
        missing, wrong = wanted - found, found - wanted
        met: set[Triple] = set()
        for one in missing:
            labels = [other for other in wrong if other[:2] == one[:2]]
            met.update(labels)
            counts.update((one[2], other[2]) for other in labels)
            counts.update([(one[2], NOTHING)] if not labels else [])
        counts.update((NOTHING, other[2]) for other in wrong - met)
        counts.update((NOTHING, claim.label) for claim in pair.claims if claim.kind != "valid" or pair.is_extra)
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"gold": gold, "predicted": predicted, "n": n} for (gold, predicted), n in rows]
