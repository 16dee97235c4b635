"""What a run left behind: a folder with manifest, gold, predictions, timings and metrics, or the digest of one.

A digest is one JSON file: all numbers, none of the texts, so that it may be committed where the data may not. Of every
sentence it has the counts of correct, predicted and gold entities, so that systems of several digests can be compared.
Everything in a folder is input here and is checked as such.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from el4ner.bench.compare import Counts, compare_all, sentence_counts
from el4ner.bench.metrics import VERSION, run_metrics
from el4ner.bench.run_folder import fingerprint, predictions_file, stages_file
from el4ner.errors import InputError, UsageError
from el4ner.jsonl import read_records
from el4ner.lines import display_name, excerpt
from el4ner.metrics import Pair, pair_records, read_predicted

REFERENCE = "default"
"""The system that others are compared with, where a run has it; else the best one."""


@dataclass(frozen=True)
class FinishedRun:
    """One run. metrics, timings: by system. pairs: gold beside prediction by system, empty for a digest.

    comparisons: each system against the reference, as `Comparison.to_dict`. counts: `sentence_counts` by system.
    unfinished: systems whose predictions are missing or incomplete, and how many there are; they have no metrics.
    ablation: rows of `el4ner-bench ablate`, where the run is one. notes: what readers must be told besides.
    """

    name: str
    manifest: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    timings: Mapping[str, Mapping[str, Any]]
    comparisons: Sequence[Mapping[str, Any]]
    pairs: Mapping[str, Sequence[Pair]] = field(default_factory=dict)
    unfinished: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, Counts] = field(default_factory=dict)
    ablation: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    @property
    def data(self) -> Mapping[str, Any]:
        """The manifest's facts about the evaluated sentences."""
        found: Mapping[str, Any] = self.manifest["data"]
        return found

    @property
    def pool_size(self) -> int | None:
        """Sentences of the pool, where the manifest says so."""
        size = (self.manifest.get("pool") or {}).get("sentences")
        return size if isinstance(size, int) else None

    @property
    def commands(self) -> list[str]:
        """The command lines that its answers come from, each once, in order."""
        own = [words for name in self.metrics for words in self.entry(name).get("commands") or ()]
        lines = [
            shlex.join(map(str, words)) for words in own or [self.manifest.get("command")] if isinstance(words, list)
        ]
        return list(dict.fromkeys(lines))

    def entry(self, system: str) -> Mapping[str, Any]:
        """What the manifest says of a system; empty where it does not know it."""
        found: Mapping[str, Any] = self.manifest["systems"].get(system, {})
        return found

    def settings(self, system: str) -> Mapping[str, Any]:
        """A system's settings; empty where the manifest has none."""
        found = self.entry(system).get("settings")
        return found if isinstance(found, Mapping) else {}

    def target_precision(self, system: str) -> float | None:
        """The precision that a system aims at; None for one whose threshold is the best for F1."""
        target = self.settings(system).get("target_precision")
        return float(target) if isinstance(target, (int, float)) else None

    def digest(self) -> dict[str, Any]:
        """All numbers without texts, plain data for JSON; measured ones rounded to 6 decimals.

        Of an ablation's many systems the strict scores only, and no counts.
        """
        content = {
            "manifest": dict(self.manifest),
            "metrics": {"systems": rounded(dict(self.metrics))},
            "timings": rounded(dict(self.timings)),
            "comparisons": rounded(list(self.comparisons)),
        }
        if self.ablation:
            short = {name: {key: m[key] for key in ("version", "strict")} for name, m in self.metrics.items()}
            return content | {"metrics": {"systems": rounded(short)}, "ablation": rounded(list(self.ablation))}
        gold: list[int] = next((rows[:, 2].tolist() for rows in self.counts.values()), [])
        systems = {name: {"correct": rows[:, 0].tolist(), "predicted": rows[:, 1].tolist()}
                   for name, rows in self.counts.items()}  # fmt: skip
        return content | {"counts": {"gold": gold, "systems": systems}}


def rounded(value: Any) -> Any:
    """Plain data with floats rounded to 6 decimals."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def load_run(path: Path) -> FinishedRun:
    """A run's folder or digest. Raises InputError naming the file if one is missing or malformed."""
    if path.is_file():
        return _from_digest(path)
    manifest = _object(path / "manifest.json")
    _check_manifest(manifest, path / "manifest.json")
    gold = read_gold_file(path / "gold.jsonl")
    stored = _object(path / "metrics.json").get("systems", {}) if (path / "metrics.json").is_file() else {}
    timings = _object(path / "timings.json") if (path / "timings.json").is_file() else {}
    ablation = _object(path / "ablation.json").get("rows", ()) if (path / "ablation.json").is_file() else ()
    metrics, pairs, unfinished = {}, {}, {}
    for name in manifest["systems"]:
        predicted = system_predictions(path, name)
        if len(predicted) < len(gold):
            unfinished[name] = len(predicted)
            continue
        pairs[name] = _paired(gold, predicted, path)
        metrics[name] = stored.get(name) or {}
        if (metrics[name].get("version"), metrics[name].get("of")) != (VERSION, fingerprint(path, name)):
            metrics[name] = _computed(path, name, manifest, gold, predicted)
    counts = {name: sentence_counts(found) for name, found in pairs.items()}
    run = FinishedRun(
        path.resolve().name, manifest, metrics, timings, (), pairs, unfinished, counts, list(ablation)
    )  # fmt: skip
    return run if ablation else compared(run)


def _computed(path: Path, name: str, manifest: Mapping[str, Any], gold: Any, predicted: Any) -> dict[str, Any]:
    """A system's scores from the files in a run's folder."""
    left_out = "left_out_in_turn" in (manifest.get("pool") or {})  # every sentence was in some pool
    pool = None if left_out else _records(path / "pool.jsonl")
    found = run_metrics(gold, predicted, pool, _records(stages_file(path, name)), seed=manifest.get("seed") or 0)
    return {"of": fingerprint(path, name), **found}


def compared(run: FinishedRun) -> FinishedRun:
    """The run with each system tested against the reference, those at another operating point left out."""
    rivals = {name: rows for name, rows in run.counts.items() if run.target_precision(name) is None}
    against = REFERENCE if REFERENCE in rivals else None
    found = [c.to_dict() for c in compare_all(rivals, against)] if rivals else []
    return replace(run, comparisons=found)


def _from_digest(path: Path) -> FinishedRun:
    found = _object(path)
    if not {"manifest", "metrics", "timings"} <= set(found):
        raise InputError(f"{display_name(path)}: is no digest of a run; write one with el4ner-bench report --keep")
    _check_manifest(found["manifest"], path)
    try:
        metrics = found["metrics"]["systems"]
        if any(own.get("version") != VERSION for own in metrics.values()):
            raise InputError(f"{display_name(path)}: has metrics of another version; write it anew with report --keep")
        kept = found.get("counts") or {"gold": [], "systems": {}}
        counts = {
            name: np.array([own["correct"], own["predicted"], kept["gold"]], dtype=np.int64).T
            for name, own in kept["systems"].items()
        }
        for own in metrics.values():
            float(own["strict"]["f1"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{display_name(path)}: is a damaged digest ({type(error).__name__}: {error}); write it anew with "
            "report --keep"
        ) from None
    return FinishedRun(
        path.stem, found["manifest"], metrics, found["timings"], found.get("comparisons", []), counts=counts,
        ablation=found.get("ablation", ()),
    )  # fmt: skip


def system_predictions(folder: Path, name: str) -> list[dict[str, Any]]:
    """A system's records in a run's folder; none if there is no file yet. Raises InputError for a malformed one."""
    path = predictions_file(folder, name)
    return read_predicted(path) if _has_lines(path) else []


def read_gold_file(path: Path) -> list[dict[str, Any]]:
    """Gold records. Raises InputError if a record or an entity is malformed, or there are none."""
    gold = read_predicted(path)
    if not gold:
        raise InputError(f"{display_name(path)}: has no sentences; give the evaluated ones")
    return gold


def _paired(gold: Sequence[Any], predicted: Sequence[Any], path: Path) -> list[Pair]:
    try:
        return pair_records(gold, predicted)
    except ValueError as error:
        raise InputError(f"{display_name(path / 'gold.jsonl')}: {error}") from None


def _records(path: Path) -> list[dict[str, Any]] | None:
    """A file's records; None if it is not there or has none."""
    return [record for _, record in read_records(path)] if _has_lines(path) else None


def _has_lines(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{display_name(path)}: cannot be read ({error}); is this the folder of a run?") from None
    if not isinstance(found, dict):
        raise InputError(f"{display_name(path)}: is no JSON object; is this the folder of a run?")
    return found


def _check_manifest(manifest: Any, path: Path) -> None:
    """Raises InputError unless a manifest has what every table needs."""
    data, systems = (
        (manifest.get(key) for key in ("data", "systems")) if isinstance(manifest, Mapping) else (None, None)
    )
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str) or not isinstance(systems, Mapping):
        raise InputError(
            f'{display_name(path)}: lacks "data" with a "name", or "systems"; is this the folder of a run?'
        )
    for name, entry in systems.items():
        if not isinstance(entry, Mapping) or any(mark in name for mark in "/\\\0"):
            raise InputError(f"{display_name(path)}: {excerpt(name)} is no system; names have no slashes")


def answers_of(place: str, gold: Path | None) -> tuple[str, list[Pair]]:
    """A system's name and its answers beside gold. place: a predictions file (then `gold`), or DIR:NAME of a run.

    Raises UsageError if it is neither, or if a file comes without gold.
    """
    folder, colon, name = place.partition(":")
    if Path(place).is_file():
        if gold is None:
            raise UsageError(f"{place}: is a predictions file; say what it is scored against: --gold FILE")
        return place, _paired(read_gold_file(gold), read_predicted(place), gold)
    if not colon or not (Path(folder) / "manifest.json").is_file():
        raise UsageError(f"{place}: is neither a predictions file nor DIR:NAME with the folder of a run")
    systems = _object(Path(folder) / "manifest.json").get("systems", {})
    if name not in systems:
        raise UsageError(f"{folder}: has no system {name!r}; there are {', '.join(sorted(systems)) or 'none'}")
    gold_records = read_gold_file(gold or Path(folder) / "gold.jsonl")
    return name, _paired(gold_records, system_predictions(Path(folder), name), Path(folder))
