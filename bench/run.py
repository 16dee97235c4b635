"""`el4ner-bench run`: systems on data, chunk by chunk into a folder that a killed run goes on with.

Every system gets the same sentences, the same pool and the same budget of demonstrations. Tuning belongs on dev or the
pool; a test split is read once.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from el4ner.bench._harness import machine
from el4ner.bench.evaluation_data import DataRequest, EvaluationData, load_evaluation_data, record_of
from el4ner.bench.metrics import run_metrics
from el4ner.bench.peak_memory import peak_mib, reset_peak
from el4ner.bench.run_folder import RunFolder, fingerprint
from el4ner.bench.system import System, Workbench
from el4ner.bench.systems import make_system
from el4ner.cache import content_key
from el4ner.config import make_config
from el4ner.errors import ConfigError
from el4ner.records import Sentence

Progress = Callable[[str], None]


@dataclass(frozen=True)
class RunRequest:
    """What `el4ner-bench run` is asked.

    k: demonstrations a prompt may show. settings: for el4ner's own systems, and what baselines share with them (models,
    device, precision, overlap). options: baseline -> its own options. chunk: sentences predicted between two writes.
    share: systems answer from memory what another one asked; their speed is then not reported.
    """

    data: DataRequest
    systems: Sequence[str]
    out: Path
    k: int = 4
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chunk: int = 32
    share: bool = False
    command: Sequence[str] = field(default_factory=lambda: ("el4ner-bench", *sys.argv[1:]))


def run(request: RunRequest, progress: Progress, refused: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs what is missing, writes everything, returns the content of `metrics.json`.

    refused: as of `run_systems`. Raises UsageError if the folder holds a run of other data or settings, and whatever a
    system raises on preparation.
    """
    data = load_evaluation_data(request.data)
    base = {**request.settings, "seed": request.data.seed}
    bench = Workbench(make_config(base), request.k, request.data.seed, remember=request.share)
    unknown = sorted(set(request.options) - set(request.systems))
    if unknown:
        raise ConfigError(f"--option {unknown[0]}...: {unknown[0]} is not among --systems {', '.join(request.systems)}")
    systems = [make_system(name, bench, request.settings, request.options) for name in request.systems]
    return run_systems(request, data, bench, systems, progress, refused)


def run_systems(
    request: RunRequest, data: EvaluationData, bench: Workbench, systems: Sequence[System], progress: Progress,
    refused: dict[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`run` for systems that are made already.

    refused: takes the names of systems whose settings do not suit the pool, with the reason, and the others still run;
    None lets such a ConfigError end the run. Raises ConfigError too if two systems have one name, UsageError if another
    run writes into the folder.
    """
    names = [system.name for system in systems]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"--systems: {repeated[0]} is named twice; name it once")
    folder = RunFolder(request.out)
    with folder.held():
        return _run_into(folder, request, data, bench, systems, progress, refused)


def _run_into(
    folder: RunFolder, request: RunRequest, data: EvaluationData, bench: Workbench, systems: Sequence[System],
    progress: Progress, refused: dict[str, str] | None,
) -> dict[str, Any]:  # fmt: skip
    facts = {"k": request.k, "seed": request.data.seed, "command": shown_command(request.command), **_machine()}
    folder.open(data, facts)
    for system in systems:  # before hours are spent on the first
        settings = dict(system.settings)
        entry = {"settings": settings, "settings_hash": content_key(settings), "kind": system.kind}
        folder.begin_system(system.name, entry)
    scored: dict[str, Any] = {}
    for system in systems:
        try:
            _run_one(request, data, bench, system, folder, progress)
        except ConfigError as error:
            folder.note(system.name, refused=str(error))
            if refused is None:
                raise
            refused[system.name] = str(error)
            progress(f"{system.name}: not run, {error}")
            continue
        _score(data, folder, scored, request.data.seed)
        folder.write_metrics({"systems": scored})
    return {"systems": scored}


def shown_command(words: Sequence[str]) -> list[str]:
    """A command line without keys and the folders of this machine: of every absolute path its last part."""
    first, *others = words
    shown = [Path(first).name]
    for word in others:
        own = re.sub(r"(^|[=,])(/[^=,]*)", lambda found: found[1] + Path(found[2]).name, word)
        shown.append(re.sub(r"(api_key\W+).*", r"\1***", own, flags=re.DOTALL))
    return shown


def _machine() -> dict[str, Any]:
    facts = machine()
    versions = {"python": facts.pop("python"), **facts.pop("versions")}
    return {"versions": versions, "commit": facts.pop("commit"), "hardware": facts}


def _run_one(
    request: RunRequest, data: EvaluationData, bench: Workbench, system: System, folder: RunFolder, progress: Progress
) -> None:
    """Predicts the sentences that the folder lacks, part by part, chunk by chunk."""
    gold = [record_of(d) for d in data.gold]
    done = folder.answered(system.name, gold)
    if done == len(gold):
        progress(f"{system.name}: all {done:,} sentences are in the folder already")
        return
    folder.note_origin(system.name, fresh=not done)
    timing = Timing.resumed(folder.timings.get(system.name), done)
    bench.forget()
    reset_peak()
    timing.held = peak_mib() if timing.held is None else timing.held
    for part in data.parts:
        begin = max(part.begin, done)
        if begin >= part.end:
            continue
        system.load()
        began = time.perf_counter()
        system.prepare(part.pool, lambda message: progress(f"{system.name}: {message}"))
        timing.preparation_s += time.perf_counter() - began
        folder.note_models(system.name, system.models())
        folder.note(system.name, parameters=system.parameters())
        for at in range(begin, part.end, request.chunk):
            chunk = [Sentence(d.id, d.text) for d in data.gold[at : min(at + request.chunk, part.end)]]
            remembered = bench.answered
            began = time.perf_counter()
            predictions = system.predict(chunk)
            timing.prediction_s += time.perf_counter() - began
            timing.add(len(chunk), [p.usage for p in predictions], bench.answered > remembered)
            folder.append(system.name, [p.to_dict() for p in predictions], system.stages(), timing.to_dict())
            progress(f"{system.name}: {at + len(chunk):,} of {len(gold):,} sentences")
        folder.note(system.name, report=system.report())


@dataclass
class Timing:
    """What a system cost so far. sentences: those whose time is known; shared: some answers came from memory. held: MiB
    that the process held before, models of the systems before it among them; the peak includes them."""

    preparation_s: float = 0.0
    prediction_s: float = 0.0
    sentences: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    peak: int | None = None
    shared: bool = False
    held: int | None = None

    @classmethod
    def resumed(cls, before: Mapping[str, Any] | None, done: int) -> Timing:
        """Goes on from what `timings.json` says, nothing if no answer is there."""
        if before is None or not done:
            return cls()
        return cls(
            before["preparation_s"], before["prediction_s"], before["sentences"], before["prompt_tokens"],
            before["generated_tokens"], before["peak_memory_mib"], before["shared"], before["memory_before_mib"],
        )  # fmt: skip

    def add(self, sentences: int, usage: Sequence[Any], shared: bool) -> None:
        """Counts a chunk."""
        self.sentences += sentences
        self.prompt_tokens += sum(own.prompt_tokens for own in usage)
        self.generated_tokens += sum(own.generated_tokens for own in usage)
        self.shared = self.shared or shared
        now = peak_mib()
        self.peak = now if self.peak is None or now is None else max(self.peak, now)

    def to_dict(self) -> dict[str, Any]:
        """The entry of `timings.json`; no speed where answers came from memory."""
        speed = None if self.shared else round(self.sentences / max(self.prediction_s, 1e-9), 3)
        return {
            "preparation_s": round(self.preparation_s, 3), "prediction_s": round(self.prediction_s, 3),
            "sentences_per_s": speed, "prompt_tokens": self.prompt_tokens, "generated_tokens": self.generated_tokens,
            "peak_memory_mib": self.peak, "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "memory_before_mib": self.held, "sentences": self.sentences, "shared": self.shared,
        }  # fmt: skip


def _score(data: EvaluationData, folder: RunFolder, scored: dict[str, Any], seed: int) -> None:
    """Adds the scores of systems that have answered every sentence, and are not scored yet."""
    gold = [record_of(d) for d in data.gold]
    # left out in turn, every sentence has been in some pool: seen and unseen would mean nothing
    pool = None if data.left_out else [record_of(d) for d in data.pool.sentences]
    for name in folder.manifest["systems"]:
        predictions = folder.predictions(name) if name not in scored else []
        if len(predictions) == len(gold):
            found = run_metrics(gold, predictions, pool, folder.stages(name), seed=seed)
            scored[name] = {"of": fingerprint(folder.path, name), **found}


def strict_row(name: str, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> dict[str, Any]:
    """One line of output about a system."""
    strict = metrics["systems"][name]["strict"]
    return {"system": name, **{key: strict[key] for key in ("precision", "recall", "f1", "ci95")}, **timings[name]}
