"""What the default aims at, and how far it is: against every baseline, and by what its scores are worth.

Goals, over all sets: the default beats every baseline on the same models (the fine-tuned one on three sets at least),
significantly on four; its scores have an ECE below 0.05 and a Brier skill above 0; at a target precision of 0.9 what is
kept is right in a share of 0.87 at least, with at least 50 entities kept and a recall of at least 0.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from el4ner.bench.compare import show_p
from el4ner.bench.finished_run import REFERENCE, FinishedRun
from el4ner.bench.report_model import Block, Row, Section, Table
from el4ner.bench.report_scores import with_interval

ALPHA = 0.05
"""A difference counts as significant below this p, corrected after Holm."""
FINE_TUNED = "fine-tuned"
PUBLISHED = "paper"
_ECE, _MARGIN, _ENTITIES, _RECALL = 0.05, 0.03, 50, 0.1
_ALONE = ("reading-voter", "tagging-voter", "probing-voter", "retrieval-voter", "members")
"""Voters of the default alone, and its prompted members together; `member:NAME` is one of these."""


class Against(NamedTuple):
    """The default against a baseline: F1 of the default minus the baseline's, and p after Holm."""

    baseline: str
    difference: float
    interval: tuple[float, float]
    p: float

    def words(self) -> str:
        """ "kate +0.310 [+0.250, +0.370], p < 0.001" """
        low, high = self.interval
        return f"{self.baseline} {self.difference:+.3f} [{low:+.3f}, {high:+.3f}], {show_p(self.p)}"


def is_baseline(run: FinishedRun, system: str) -> bool:
    """Whether a system is one that the default is to beat: another method, or one of its own voters alone."""
    is_other = run.entry(system).get("kind") == "baseline" or system == PUBLISHED
    return is_other or (is_own_part(system) and run.target_precision(system) is None)


def is_own_part(system: str) -> bool:
    """Whether a system is a voter of the default alone, or its prompted members."""
    return system in _ALONE or system.startswith("member:")


def against_baselines(runs: Iterable[FinishedRun]) -> dict[str, Against]:
    """The default against each baseline; of one in several runs that on the most sentences counts."""
    found: dict[str, Against] = {}
    for run in sorted(runs, key=lambda one: int(one.data.get("sentences") or 0)):
        for row in run.comparisons:
            if row["b"] == REFERENCE and is_baseline(run, row["a"]):
                low, high = row["ci95"]
                p = row["p"] if row.get("p_holm") is None else row["p_holm"]
                found[row["a"]] = Against(row["a"], 0.0 - row["difference"], (0.0 - high, 0.0 - low), p)
    return found


def _by_set(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Runs on test sentences that have the default, by data set; of each only those with the largest pool.

    Ablations are left out.
    """
    sets: dict[str, list[FinishedRun]] = {}
    for run in runs:
        if REFERENCE in run.metrics and run.data.get("split", "test") == "test" and not run.ablation:
            sets.setdefault(run.data["name"], []).append(run)
    largest = {name: max(run.pool_size or 0 for run in group) for name, group in sets.items()}
    return {name: [run for run in group if (run.pool_size or 0) == largest[name]] for name, group in sets.items()}


def goals_section(runs: Sequence[FinishedRun]) -> Section | None:
    """Both tables; None where no run has the default on a test split."""
    tables = goals_tables(runs)
    return Section("The default against its goals", tables) if tables else None


def goals_tables(runs: Sequence[FinishedRun]) -> list[Table]:
    """The default against the baselines, and what its scores are worth, a row for each data set."""
    sets = _by_set(runs)
    tests = {name: own for name, group in sets.items() if (own := against_baselines(group))}
    tables: list[Table] = []
    if tests:
        was_tuned = any(FINE_TUNED in own for own in tests.values())
        columns = ["set", f"other methods beaten (p < {ALPHA})", f"own parts alone beaten (p < {ALPHA})",
                   "closest, default minus it [95%]", *([FINE_TUNED] if was_tuned else [])]  # fmt: skip
        note = (
            "Strict F1; p after Holm. Each on the most sentences that it and the default answered. Own parts: voters "
            f"and members alone. {_reached(tests)}"
        )
        rows = [_baselines_row(name, own)[: len(columns)] for name, own in tests.items()]
        tables.append(Table(columns, rows, "The default against the baselines", note, names=len(columns)))
    scores = [row for name, group in sets.items() if (row := _scores_row(name, group)) is not None]
    if scores:
        columns = ["set", "goals missed", "sentences", "entities", "ECE", "Brier skill", "at target precision",
                   "precision [95%]", "recall [95%]", "entities kept"]  # fmt: skip
        note = (
            f"Goals: ECE below {_ECE}, Brier skill above 0; at a target precision of 0.9 a precision of 0.87, "
            f"{_ENTITIES} entities and a recall of {_RECALL} at least."
        )
        tables.append(Table(columns, scores, "What the default's scores are worth", note, names=2))
    return tables


def _baselines_row(name: str, tests: Mapping[str, Against]) -> Row:
    others = [test for test in tests.values() if test.baseline != FINE_TUNED]
    closest = min(others, key=lambda test: test.difference, default=None)
    tuned = tests.get(FINE_TUNED)
    return [
        name,
        _beaten([test for test in others if not is_own_part(test.baseline)]),
        _beaten([test for test in others if is_own_part(test.baseline)]),
        "–" if closest is None else closest.words(),
        "–" if tuned is None else tuned.words().removeprefix(f"{FINE_TUNED} "),
    ]


def _beaten(tests: Sequence[Against]) -> str:
    """ "3 of 4 (2)": how many the default beats, and in parentheses how many of them significantly."""
    beaten = [test for test in tests if test.difference > 0]
    return f"{len(beaten)} of {len(tests)} ({sum(test.p < ALPHA for test in beaten)})" if tests else "–"


def _reached(tests: Mapping[str, Mapping[str, Against]]) -> str:
    """On how many of the sets the goals about baselines are reached."""
    others = [[t for t in own.values() if t.baseline != FINE_TUNED] for own in tests.values()]
    every = sum(1 for own in others if own and all(t.difference > 0 for t in own))
    surely = sum(1 for own in others if own and all(t.difference > 0 and t.p < ALPHA for t in own))
    tuned = [own[FINE_TUNED].difference > 0 for own in tests.values() if FINE_TUNED in own]
    said = f"beaten on {every} of {len(tests)} sets, with p < {ALPHA} on {surely}"
    if not tuned:
        return f"All that were measured are {said}; {FINE_TUNED} is not measured yet."
    return f"All that were measured but {FINE_TUNED} are {said}; {FINE_TUNED} on {sum(tuned)} of {len(tuned)}."


def _scores_row(name: str, runs: Sequence[FinishedRun]) -> Row | None:
    """From the run on the most sentences, and the operating point on the most."""
    run = max(runs, key=lambda one: int(one.data.get("sentences") or 0))
    found = run.metrics[REFERENCE]["calibration"]
    points = [(other, system) for other in runs for system in other.metrics
              if other.target_precision(system) is not None and system.startswith(f"{REFERENCE}@")]  # fmt: skip
    if found is None:
        return None
    skill = "–" if found["brier_skill"] is None else f"{found['brier_skill']:+.3f}"
    missed = [] if found["ece"] < _ECE else [f"ECE {found['ece']:.3f}"]
    if found["brier_skill"] is None or found["brier_skill"] <= 0:
        missed.append(f"Brier skill {skill}")
    cells = ["–"] * 4
    if points:
        other, system = max(points, key=lambda one: int(one[0].data.get("sentences") or 0))
        cells = _point_cells(other, system)
        missed += missed_at(other, system)
    else:
        missed.append("no target precision measured")
    about = [f"{run.data.get('sentences') or 0:,}", f"{found['entities']:,}", f"{found['ece']:.3f}", skill]
    return [name, ", ".join(missed) or "none", *about, *cells]


def _point_cells(run: FinishedRun, system: str) -> list[str]:
    """Target, precision, recall, entities kept."""
    strict = run.metrics[system]["strict"]
    return [
        f"{run.target_precision(system):g}",
        with_interval(strict["precision"], strict["precision_ci95"]),
        with_interval(strict["recall"], strict["recall_ci95"]),
        f"{strict['predicted']:,}",
    ]


def missed_at(run: FinishedRun, system: str) -> list[str]:
    """What an operating point misses of its goals, in words."""
    strict, target = run.metrics[system]["strict"], run.target_precision(system) or 0.0
    goals = (
        (strict["precision"] >= target - _MARGIN, f"precision {strict['precision']:.3f}"),
        (strict["predicted"] >= _ENTITIES, f"{strict['predicted']:,} entities"),
        (strict["recall"] >= _RECALL, f"recall {strict['recall']:.3f}"),
    )
    return [words for is_met, words in goals if not is_met]


def operating_section(run: FinishedRun) -> Section | None:
    """Systems at a target precision: what the pool promised and what the test data say; None without such a system."""
    names = [name for name in run.metrics if run.target_precision(name) is not None]
    refused = [
        f"{name} was not run: {run.entry(name)['refused']}."
        for name in run.manifest["systems"]
        if run.target_precision(name) is not None and run.entry(name).get("refused")
    ]
    if not names and not refused:
        return None
    rows = [[name, ", ".join(missed_at(run, name)) or "none", *_promise(run, name), *_point_cells(run, name)[1:]]
            for name in names]  # fmt: skip
    columns = ["system", "goals missed", "target", "least score", "pool: precision − s.e.", "pool: recall",
               "precision [95%]", "recall [95%]", "entities kept"]  # fmt: skip
    note = (
        "What --target-precision keeps. Pool: out of fold; the precision is a standard error below what was seen. "
        f"Goals: at most {_MARGIN} below the target, {_ENTITIES} entities and a recall of {_RECALL} at least."
    )
    blocks: list[Block] = [Table(columns, rows, note=note, names=2)] if rows else []
    return Section("At a target precision", [*blocks, *refused], level=3)


def _promise(run: FinishedRun, system: str) -> list[str]:
    """Target, least score, and what the pool promised, as far as the manifest says."""
    fitted = (run.entry(system).get("report") or {}).get("fitted") or {}
    point: Mapping[str, Any] = fitted.get("operating point") or {}
    expected = point.get("expected on texts like the pool") or {}
    values = point.get("threshold"), expected.get("precision, a standard error below"), expected.get("recall")
    return [f"{run.target_precision(system):g}", *("–" if value is None else f"{value:.3f}" for value in values)]
