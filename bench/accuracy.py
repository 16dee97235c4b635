"""Accuracy of el4ner's own settings on a folder of JSONL splits: strict F1 with interval, speed, memory.

Every system gets the same sentences and the same pool. Tuning belongs on `dev` or the pool; a test split is read once.
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from el4ner.bench._harness import commit, machine
from el4ner.bench.evaluation_data import smaller
from el4ner.bench.sharing import Remembering, answered, shared_engines
from el4ner.config import make_config
from el4ner.errors import ConfigError, InputError
from el4ner.jsonl import read_inputs, write_predictions
from el4ner.metrics import evaluate
from el4ner.pipeline import El4ner
from el4ner.pool import folds_for, load_pool
from el4ner.preparation import Preparation
from el4ner.records import Sentence

SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    "default": {"voters": "auto"},
    "both": {"voters": ["reading", "retrieval"]},
    "reading": {"voters": ["reading"]},
    "retrieval": {"voters": ["retrieval"]},
    "all": {"voters": "all"},
    "paper": {"preset": "paper"},
}
"""default: whoever the pool says is worth asking. both: the voters that need no prompts, without an audition."""


def split_file(folder: Path, split: str) -> Path:
    """The file of a split, plain or gzipped. Raises InputError naming what is there."""
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(sorted(path.name for path in folder.glob("*.jsonl*"))) or "no .jsonl files"
    raise InputError(f"{folder}: no split {split!r}; there are {there}")


def sample_sentences(path: Path, limit: int | None, seed: int) -> list[Sentence]:
    """All sentences of a file, or `limit` of them drawn by `seed`, in file order."""
    sentences = list(read_inputs([path]))
    if limit is None or limit >= len(sentences):
        return sentences
    return [sentences[i] for i in sorted(random.Random(seed).sample(range(len(sentences)), limit))]


def member_system(name: str) -> Mapping[str, Any]:
    """Settings of a system by name; `member:NAME` asks one member of the default ensemble alone.

    Raises ConfigError for an unknown name.
    """
    if name.startswith("member:"):
        return {"voters": [name.removeprefix("member:")]}
    if name not in SYSTEMS:
        raise ConfigError(f"system {name!r}; choose from {', '.join(SYSTEMS)} or member:NAME")
    return SYSTEMS[name]


def measure_accuracy(
    folder: Path, systems: list[str], *, split: str, limit: int | None, seed: int, settings: Mapping[str, Any],
    out: Path | None, progress: Callable[[str], None], pool_limit: int | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per system: scores with 95% bootstrap intervals over sentences, counts, seconds, memory, versions.

    settings: for all systems alike, over what the system itself says of other keys. out: folder for the predictions.
    pool_limit: use only so many sentences of `train`, drawn by hash of their content.
    """
    sentences = sample_sentences(split_file(folder, split), limit, seed)
    gold = [{"id": s.id, "text": s.text, "entities": s.extra.get("entities", [])} for s in sentences]
    train = str(split_file(folder, "train"))
    pool = smaller(load_pool(train, settings.get("labels")), pool_limit)
    loader = Preparation(make_config({"examples": train, **settings}))
    encoder: Any = Remembering(loader.encoder())
    engines: Any = shared_engines(loader)
    for name in systems:
        config = make_config({"examples": train, **settings, **member_system(name)})
        model = El4ner(
            config,
            pool=replace(pool, n_folds=folds_for(len(pool.sentences), config.stack.folds)),
            engines=engines,
            encoder=encoder,
        )
        began = time.perf_counter()
        model.prepare(progress)
        before = answered(engines, encoder)
        prepared = time.perf_counter()
        predictions = []
        for prediction in model.predict_iter(sentences):
            predictions.append(prediction)
            progress(f"{name}: {len(predictions):,} of {len(sentences):,} sentences")
        ended = time.perf_counter()
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_predictions(out / f"{folder.name}.{split}.{name}.jsonl", predictions)
        result = evaluate(gold, [p.to_dict() for p in predictions], seed=seed).to_dict()
        report = model.report()
        yield {
            "data": folder.name, "split": split, "sentences": len(sentences), "sampled": limit is not None,
            "sample_seed": seed, "pool_sentences": len(pool.sentences),
            "system": name, "settings": dict(settings), "strict": result["micro"],
            "macro_f1": result["macro"]["f1"], "spans_f1": result["spans"]["f1"], "problems": result["problems"],
            "asked": report["asked"], "verifier": report["verifier"], "threshold": report["threshold"],
            "fitted": report["fitted"], "notes": report["notes"], "tokens": report["tokens"],
            "preparation_s": round(prepared - began, 1), "prediction_s": round(ended - prepared, 1),
            # no speed where a system before this one has asked the same already
            "sentences_per_s": None if answered(engines, encoder) > before
            else round(len(sentences) / max(ended - prepared, 1e-9), 2),
            "threads": os.environ.get("OMP_NUM_THREADS", "default"), "peak_memory_mib": report["peak memory, MiB"],
            "python": platform.python_version(), "machine": machine(), "commit": commit(),
        }  # fmt: skip
