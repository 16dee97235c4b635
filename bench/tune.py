"""`el4ner-bench tune`: the options of baselines chosen on dev, or on a held-out part of the pool; never on test.

One option after the other, in the order of the grid: every value is tried beside what is chosen so far, and the one
with the best strict F1 stays, of equal ones the first. What was chosen is written as a file that `run --options` takes,
so that a baseline is frozen before the test split is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from el4ner.bench.evaluation_data import load_tuning_data
from el4ner.bench.run import Progress, RunRequest, run_systems
from el4ner.bench.system import System, Workbench
from el4ner.bench.systems import BASELINES, make_system
from el4ner.config import make_config
from el4ner.errors import ConfigError, InputError, UsageError
from el4ner.jsonl import json_text
from el4ner.output import OutputFile

Grid = Mapping[str, Mapping[str, Sequence[Any]]]
FILE = "tuned.json"

_WORDING = ("pairs", "arrows", "types")
_KS = (1, 2, 4, 8, 16)


def default_grid(budget: int) -> dict[str, dict[str, tuple[Any, ...]]]:
    """What is tried where nothing is said, system by system; numbers of demonstrations up to the budget."""
    ks = tuple(sorted({budget, *(k for k in _KS if k < budget)}, reverse=True))
    shown = {"k": ks, "only_with_entities": (False, True)}
    return {
        "zero-shot": {"wording": _WORDING},
        "kate": {"wording": _WORDING, **shown},
        "deer": {"wording": _WORDING, **shown, "reflect": (True, False), "context": (0.3, 0.0, 1.0)},
        "gpt-ner": {"k": ks, "positives": (0.5, 1.0), "keep": (0.5, 0.2, 0.8)},
        "dictionary": {"folded": (False, True), "least_share": (0.5, 0.0, 0.25, 0.75)},
        "fine-tuned": {"rate": (1e-4, 5e-5, 2e-4), "twice": (True, False)},
    }


def tune(request: RunRequest, grid: Grid, progress: Progress) -> dict[str, Any]:
    """Tries the values of a grid and writes `tuned.json` beside what `run` writes; returns its content.

    request.options: fixed options of the systems, beside those that are tried. A killed tuning goes on in its folder.
    Raises UsageError for a test split, ConfigError for what a baseline does not have.
    """
    source = Path(request.data.source)
    if request.data.split == "test" or (source.is_file() and source.name.partition(".")[0] == "test"):
        raise UsageError("a test split: options are tuned on dev or on train (the pool), never on test")
    for name in grid:
        if name not in BASELINES:
            raise ConfigError(f"{name}: only baselines are tuned here; choose from {', '.join(BASELINES)}")
    data = load_tuning_data(request.data)
    config = make_config({**request.settings, "seed": request.data.seed})
    bench = Workbench(config, request.k, request.data.seed, remember=request.share)
    tried: list[dict[str, Any]] = []
    options: dict[str, dict[str, Any]] = {}
    for name, own in grid.items():
        chosen = dict(request.options.get(name, {}))
        for key, values in own.items():
            candidates = [{**chosen, key: value} for value in values]
            systems = [_candidate(name, candidate, bench) for candidate in candidates]
            scored = run_systems(request, data, bench, systems, progress)["systems"]
            scores = [scored[system.name]["strict"]["f1"] for system in systems]
            tried += [
                {"system": name, "option": key, "options": candidate, "f1": f1}
                for candidate, f1 in zip(candidates, scores, strict=True)
            ]
            chosen = candidates[scores.index(max(scores))]
            progress(f"{name}: {key}={chosen[key]!r}, F1 {max(scores):.3f}")
        options[name] = chosen
    facts = {
        "name": data.name, "split": data.split, "sentences": len(data.gold), "seed": data.seed, "sha256": data.sha256,
        "pool_sentences": len(data.pool.sentences), "k": request.k,
    }  # fmt: skip
    content = {"version": 1, "tuned_on": facts, "options": options, "tried": tried}
    with OutputFile(request.out / FILE) as file:
        file.write(json_text(content).encode())
    return content


def _candidate(name: str, options: Mapping[str, Any], bench: Workbench) -> System:
    """A baseline with options, called by both."""
    system = make_system(name, bench, {}, {name: options})
    shown = (f"{key}={value}".replace("/", "-") for key, value in sorted(options.items()))
    system.name = "@".join([name, *shown])  # names its files too
    return system


def tuned_options(content: Any, origin: str) -> dict[str, dict[str, Any]]:
    """The options of every system in the content of such a file. Raises InputError if there are none."""
    options = content.get("options") if isinstance(content, Mapping) else None
    if not isinstance(options, Mapping) or not all(isinstance(own, Mapping) for own in options.values()):
        raise InputError(f"{origin}: holds no options; give the {FILE} that el4ner-bench tune wrote")
    return {name: dict(own) for name, own in options.items()}
