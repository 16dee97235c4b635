"""Runs on the same sentences with the same pool as one: systems that were measured one after the other stand together.

The same: equal hashes of the evaluated sentences and of the pool, equal budget of demonstrations and seed. Ablations,
and digests without counts of every sentence, which cannot be compared with others, stay by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from el4ner.bench.finished_run import FinishedRun, compared


def merged(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The runs, those on the same sentences and pool united, each in the place of its first."""
    groups: dict[tuple[Any, ...], list[FinishedRun]] = {}
    for number, run in enumerate(runs):
        pool = run.manifest.get("pool") or {}
        hashes = run.data.get("sha256"), pool.get("sha256")
        can = all(hashes) and set(run.counts) == set(run.metrics) and not run.ablation
        key = (*hashes, run.manifest.get("k"), run.manifest.get("seed")) if can else (number,)
        groups.setdefault(key, []).append(run)
    return [group[0] if len(group) == 1 else _united(group) for group in groups.values()]


def _united(group: Sequence[FinishedRun]) -> FinishedRun:
    """One run with the systems of all; of a system in several the newest answers, and a note about the others."""
    owner: dict[str, FinishedRun] = {}
    notes: list[str] = [note for run in group for note in run.notes]
    for run in sorted(group, key=lambda one: str(one.manifest.get("created", ""))):
        for name in run.metrics:
            if name in owner:
                same = owner[name].entry(name).get("settings_hash") == run.entry(name).get("settings_hash")
                why = "measured again" if same else "measured again with other settings"
                notes.append(f"{name} of {owner[name].name} is left out: {why} in {run.name}.")
            owner[name] = run
    holders = {name: run for run in reversed(group) for name in run.manifest["systems"]} | owner
    systems = {
        name: {"commands": [run.manifest.get("command")], **run.entry(name)}
        for name, run in sorted(holders.items(), key=lambda item: group.index(item[1]))
    }
    first = group[0]
    return compared(
        replace(
            first,
            name=" + ".join(run.name for run in group),
            manifest={**first.manifest, "systems": systems},
            metrics={name: run.metrics[name] for name, run in owner.items()},
            timings={name: run.timings[name] for name, run in owner.items() if name in run.timings},
            counts={name: run.counts[name] for name, run in owner.items()},
            pairs={name: run.pairs[name] for name, run in owner.items() if name in run.pairs},
            unfinished={n: done for run in group for n, done in run.unfinished.items() if n not in owner},
            notes=notes,
        )
    )
