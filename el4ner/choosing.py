"""Who of the voters that write nothing is asked: each set of them is stacked on the pool, and the smallest that is as
good as the best is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

from el4ner.crossfit import Examined, cross_fit
from el4ner.examining import narrowed
from el4ner.operating import Decided, best_threshold, fewest
from el4ner.stages.team import Team
from el4ner.voters.stacking import Stack

if TYPE_CHECKING:
    from el4ner.preparation import Preparation

_COMBINED = 4
"""Cheap voters of which every combination is stacked; each costs as many fits as there are folds, and one."""


def choose(preparation: Preparation, team: Team, examined: Examined) -> Examined:
    """The stack of the voters that write nothing, who of them is worth asking, and the threshold.

    Returns the pool as those see it who are asked.
    """
    if not examined.votes:
        return examined
    options: dict[tuple[str, ...], tuple[float, float, Stack]] = {}
    decided: dict[tuple[str, ...], Decided] = {}
    names = tuple(examined.votes)
    sizes: Sequence[int] = (len(names),)
    if preparation.config.voters == "auto":  # of many voters not all combinations
        sizes = range(len(names), 0, -1) if len(names) <= _COMBINED else (len(names), len(names) - 1, 1)
    for voters in (subset for size in sizes for subset in combinations(names, size)):
        preparation.progress(f"stacking {', '.join(voters)}")
        stack, shares = cross_fit(team, examined, voters)
        decided[voters] = examined.decided(shares, preparation.config.overlap)
        f1, threshold = best_threshold(decided[voters])
        options[voters] = (f1, threshold, stack)
        preparation.facts[f"cross-validated F1 of {' + '.join(voters)}"] = round(f1, 4)
    reads = {voter.name: f"model {id(voter.reader)}" for voter in team.readers}
    best, lead, error = fewest({voters: (decided[voters], options[voters][1]) for voters in options}, reads)
    seen = narrowed(preparation, team, examined, best)
    if seen.stacked is not None and not {voter.name for voter in team.probers} & {*best}:
        # drawn sentences were stacked for the probing voters' sake; the others have votes on all
        seen = replace(seen, stacked=None)
    if seen is not examined:
        stack, shares = cross_fit(team, seen, best)
        decided[best] = seen.decided(shares, preparation.config.overlap)
        options[best] = (*best_threshold(decided[best]), stack)
        preparation.facts[f"cross-validated F1 of {' + '.join(best)}"] = round(options[best][0], 4)
    for name in names:
        if name not in best:
            preparation.notes.append(f"voter {name} brings nothing on the pool and is not asked")
    if lead > 0:
        preparation.notes.append(
            f"more voters would gain {lead:.3f} in F1 on the pool, standard error {error:.3f}: too little"
        )
    for voter in team.readers:
        if voter.name not in best:
            voter.forget()
    f1, _, team.base = options[best]
    team.stack, team.asked = team.base, best
    preparation.facts["cross-validated F1"] = round(f1, 4)
    preparation.points = preparation.calibrate(team, decided[best]).points(preparation.threshold)
    return seen
