"""The folder that a run leaves, and how a killed run goes on.

    manifest.json           what was run: data, pool, versions, hardware, commit; of each system settings, their hash,
                            models, commands and commits that its answers come from, what was decided on the pool (of
                            the last part, where parts are left out in turn), or why it was refused
    gold.jsonl              the evaluated sentences, in order; pool.jsonl: the pool that was used
    contamination.json      ids of dropped copies and of near copies
    predictions/NAME.jsonl  one record per gold sentence, in order, appended chunk by chunk
    stages/NAME.jsonl       spans after each stage, where a system is el4ner's own
    timings.json            seconds, tokens, memory (before a system and at most)
    metrics.json            scores, each with the fingerprint of the files that they were computed from
    .lock                   held by the run that writes here

A run may be started again with the same folder: it goes on where it was. What was asked for with other settings or
other data is refused, since it would mix answers to different questions. What was fitted on the same pool before comes
from the cache, and preparation_s is short then; with EL4NER_CACHE an empty folder it is fitted anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from el4ner.bench.evaluation_data import EvaluationData, record_of
from el4ner.errors import InputError, UsageError
from el4ner.jsonl import dump_line, json_text, read_records
from el4ner.lines import display_name
from el4ner.output import OutputFile

VERSION = 1
_LOCK = ".lock"
_FIXED = ("version", "data", "pool", "k", "seed")
"""Keys of a manifest that must not change when a run goes on."""


def file_name(system: str) -> str:
    """A system's name as a file name: ":" becomes "."."""
    return system.replace(":", ".")


def predictions_file(folder: Path, system: str) -> Path:
    """Where a system's records are in a run's folder."""
    return folder / "predictions" / f"{file_name(system)}.jsonl"


def stages_file(folder: Path, system: str) -> Path:
    """Where a system's spans after each stage are in a run's folder."""
    return folder / "stages" / f"{file_name(system)}.jsonl"


def fingerprint(folder: Path, system: str) -> str:
    """SHA-256 of all that a system's scores are computed from: gold, pool, its records and stages."""
    total = hashlib.sha256()
    own = predictions_file(folder, system), stages_file(folder, system)
    for path in (folder / "gold.jsonl", folder / "pool.jsonl", *own):
        total.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
    return total.hexdigest()


def read_json(path: Path, remedy: str = "give another --out folder") -> Any:
    """A JSON file's content. Raises InputError, with the remedy, if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{display_name(path)}: cannot be read ({error}); {remedy}") from None


class RunFolder:
    """One run's folder. Raises UsageError if it holds a run of other data or settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = {}
        self.timings: dict[str, Any] = {}
        self._origin: dict[str, Any] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block no other run writes here. Raises UsageError if one does already.

        The lock file stays: whoever has opened it must not hold another one than who comes later.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / _LOCK).open("a") as file:
            if not _locked(file):
                raise UsageError(
                    f"{display_name(self.path)}: another run is writing here; wait for it, or give another --out"
                )
            yield

    def open(self, data: EvaluationData, facts: Mapping[str, Any]) -> None:
        """Begin a run, or go on with one. facts: what else the manifest says; k and seed among it."""
        manifest = {"version": VERSION, **_data_facts(data), "systems": {}, **facts}
        self._origin = {"commits": facts["commit"], "commands": facts["command"]}
        found = self.path / "manifest.json"
        if found.is_file():
            before = read_json(found)
            self._same(before, manifest)
            self.manifest = before
            timings = self.path / "timings.json"
            self.timings = read_json(timings) if timings.is_file() else {}
            return
        if self.path.is_dir() and any(path.name != _LOCK for path in self.path.iterdir()):
            raise UsageError(f"{display_name(self.path)}: holds other files and no manifest.json; give another --out")
        for folder in ("predictions", "stages"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        self.manifest = {**manifest, "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        _write(self.path / "gold.jsonl", b"".join(dump_line(record_of(d)) for d in data.gold))
        _write(self.path / "pool.jsonl", b"".join(dump_line(_pool_record(d)) for d in data.pool.sentences))
        contamination = {"dropped": [d.id for d in data.dropped], "near": [list(pair) for pair in data.near]}
        _write(self.path / "contamination.json", json_text(contamination).encode())
        self._save_manifest()

    def _same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in _FIXED:
            if before.get(key) != now[key]:
                difference = _difference(before.get(key), now[key])
                raise UsageError(
                    f"{display_name(self.path)}: holds a run with another {key} ({difference}); "
                    "repeat it with the same options, or give another --out folder"
                )

    def begin_system(self, name: str, entry: Mapping[str, Any]) -> None:
        """Note a system's settings. Raises UsageError if the folder has answers of it under other ones."""
        before = self.manifest["systems"].get(name)
        if before is not None and before["settings_hash"] != entry["settings_hash"]:
            raise UsageError(
                f"{display_name(self.path)}: holds answers of {name} under other settings "
                f"({_difference(before['settings'], entry['settings'])}); give another --out folder"
            )
        if before is None:
            self.manifest["systems"][name] = {**entry, "models": {}}
            self._save_manifest()

    def note_models(self, name: str, models: Mapping[str, str]) -> None:
        """Note the revisions that were loaded. Raises UsageError if earlier answers come from other ones."""
        entry = self.manifest["systems"][name]
        entry.pop("refused", None)
        if entry["models"] and entry["models"] != dict(models):
            raise UsageError(
                f"{display_name(self.path)}: holds answers of {name} from other models "
                f"({_difference(entry['models'], dict(models))}); give another --out folder"
            )
        self.note(name, models=dict(models))

    def note_origin(self, name: str, *, fresh: bool) -> None:
        """Note command and commit of the answers to come, beside those of earlier ones; fresh: there are none."""
        entry = self.manifest["systems"][name]
        if fresh:
            entry |= {"models": {}} | {key: [] for key in self._origin}
        for key, value in self._origin.items():
            entry[key] = [*entry.get(key, []), *([] if value in entry.get(key, []) else [value])]
        self._save_manifest()

    def note(self, name: str, **facts: Any) -> None:
        """Note more about a system."""
        self.manifest["systems"][name] |= facts
        self._save_manifest()

    # Answers

    def answered(self, name: str, gold: Sequence[Mapping[str, Any]]) -> int:
        """How many sentences a system has answered; a line that was cut when a run was killed is removed.

        Raises UsageError if an answer is not about the sentence in its place.
        """
        path, staged = predictions_file(self.path, name), stages_file(self.path, name)
        files = [path, staged] if staged.is_file() else [path]
        count = min(_whole_lines(file) for file in files)
        for file in files:
            _keep_lines(file, count)
        for position, record in enumerate(self.predictions(name)):
            same = position < len(gold) and all(record[key] == gold[position][key] for key in ("id", "text"))
            if not same:
                raise UsageError(
                    f"{display_name(path)}:{position + 1}: is no answer to sentence {position + 1} of gold.jsonl; "
                    "give another --out folder"
                )
        return count

    def append(self, name: str, records: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]] | None,
               timing: Mapping[str, Any]) -> None:  # fmt: skip
        """Add a chunk of answers, the stages' spans where there are some, and the timings so far."""
        if stages is not None:
            _append(stages_file(self.path, name), stages)
        _append(predictions_file(self.path, name), records)
        self.timings[name] = dict(timing)
        _write(self.path / "timings.json", json_text(self.timings).encode())

    def predictions(self, name: str) -> list[dict[str, Any]]:
        """A system's records so far."""
        return _records(predictions_file(self.path, name))

    def stages(self, name: str) -> list[dict[str, Any]] | None:
        """A system's spans after each stage; None for systems without stages."""
        path = stages_file(self.path, name)
        return _records(path) if path.is_file() else None

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics.json`."""
        _write(self.path / "metrics.json", json_text(metrics).encode())

    def _save_manifest(self) -> None:
        _write(self.path / "manifest.json", json_text(self.manifest).encode())


def _data_facts(data: EvaluationData) -> dict[str, Any]:
    return {
        "data": {
            "name": data.name, "source": data.source, "split": data.split, "sha256": data.sha256,
            "sentences": len(data.gold), "of": data.sentences, "limit": data.limit, "seed": data.seed,
        },
        "pool": data.pool_facts(),
    }  # fmt: skip


def _pool_record(demonstration: Any) -> dict[str, Any]:
    record = record_of(demonstration)
    return {"text": record["text"], "entities": record["entities"]}


def _locked(file: IO[str]) -> bool:
    """Lock a file for this process; False if another has it. Windows has no such locks: True."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _difference(before: Any, now: Any) -> str:
    """The first place where two pieces of plain data differ, in words."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                return f"{key}: {_difference(before.get(key), now.get(key))}"
    return f"{json.dumps(before)[:60]} there, {json.dumps(now)[:60]} now"


def _write(path: Path, content: bytes) -> None:
    with OutputFile(path) as file:
        file.write(content)


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with path.open("ab") as file:
        file.write(b"".join(dump_line(record) for record in records))
        file.flush()


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file() or not path.stat().st_size:
        return []
    return [record for _, record in read_records(path)]


def _whole_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _keep_lines(path: Path, count: int) -> None:
    """Cut a file after so many lines."""
    if path.is_file():
        content = path.read_bytes()
        kept = b"".join(line + b"\n" for line in content.split(b"\n")[:count])
        if kept != content:
            _write(path, kept)
