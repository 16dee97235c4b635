"""el4ner under evaluation: any settings, with the spans after each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from el4ner.bench.evaluation_data import smaller
from el4ner.bench.system import Kind, Workbench, count_parameters
from el4ner.config import Config
from el4ner.pipeline import El4ner
from el4ner.pool import Pool, folds_for
from el4ner.records import Prediction, Sentence
from el4ner.stages import Classified, Extracted

_UNSETTLED = {"batch_size", "examples", "labels"}
"""Settings that decide no answer, or that the run's data say."""


class OwnSystem:
    """A configuration of el4ner (implements `System`). pool_size: use only so many sentences of the pool."""

    kind: Kind = "el4ner"

    def __init__(self, name: str, config: Config, bench: Workbench, pool_size: int | None = None) -> None:
        self.name = name
        self._config = config
        self._bench = bench.suited_to(config)
        self._pool_size = pool_size
        self._engines: dict[str, Any] = {}
        self._encoder: Any = None
        self._model: El4ner | None = None
        self._seen: dict[int, dict[str, Any]] = {}
        self._stages: list[dict[str, Any]] = []

    @property
    def settings(self) -> Mapping[str, Any]:
        """The configuration, and how much of the pool is used where that is not all."""
        settings = {k: v for k, v in self._config.model_dump(mode="json").items() if k not in _UNSETTLED}
        return settings if self._pool_size is None else {**settings, "pool_size": self._pool_size}

    @property
    def _reads_models(self) -> bool:
        return self._config.voters != ("retrieval",)

    def load(self) -> None:
        """Loads the encoder, and the members' models unless the retrieval voter works alone."""
        self._encoder = self._bench.encoder
        self._engines = dict(self._bench.engines) if self._reads_models else {}

    def prepare(self, pool: Pool, progress: Callable[[str], None]) -> None:
        """Fits what the settings fit, or takes it from the cache."""
        own = smaller(pool, self._pool_size)
        self._model = El4ner(
            self._config,
            engines=self._engines,
            encoder=self._encoder,
            pool=replace(own, n_folds=folds_for(len(own.sentences), self._config.stack.folds)),
        )
        self._model.watch = self._watch
        self._model.prepare(progress)

    def _watch(self, sentences: Sequence[Sentence], extracted: Extracted, classified: Classified) -> None:
        for sentence, candidates, kept in zip(sentences, extracted.candidates, classified.kept, strict=True):
            self._seen[id(sentence)] = {
                "extract": [list(c.span) for c in candidates],
                "classify": [[*scored.candidate.span, scored.label] for scored in kept],
            }

    def predict(self, sentences: Sequence[Sentence]) -> list[Prediction]:
        """One prediction per sentence; what fails is a record that says so."""
        assert self._model is not None, "prepare first"
        self._seen = {}
        predictions = self._model.predict(sentences)
        nothing: dict[str, Any] = {"extract": [], "classify": []}
        self._stages = [
            {
                "id": sentence.id,
                **self._seen.get(id(sentence), nothing),
                "verify": [[e.start, e.end, e.label] for e in prediction.entities],
            }
            for sentence, prediction in zip(sentences, predictions, strict=True)
        ]
        return predictions

    def stages(self) -> list[dict[str, Any]]:
        """Candidates after extraction; labelled spans after classification and after verification."""
        return self._stages

    def models(self) -> dict[str, str]:
        """The members' models and the encoder."""
        found = {source: str(engine.source) for source, engine in self._engines.items()}
        return {**found, self._config.encoder: self._encoder.source}

    def parameters(self) -> int | None:
        """Of the members' models and the encoder."""
        return count_parameters([*self._engines.values(), self._encoder])

    def report(self) -> dict[str, Any]:
        """Who was asked and why, where scores are cut, and what to expect there, as the pipeline reports it."""
        assert self._model is not None, "prepare first"
        full = self._model.report()
        return {key: full[key] for key in ("asked", "verifier", "threshold", "fitted", "notes", "replies")}
