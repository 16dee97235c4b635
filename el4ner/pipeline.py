"""The method in four calls: retrieve, extract, classify, verify."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from el4ner.config import Config, load_config, merge
from el4ner.engines.base import Encoder, Engine
from el4ner.errors import EngineError, KernelError, UsageError
from el4ner.jsonl import make_sentence
from el4ner.pool import Pool
from el4ner.preparation import Preparation
from el4ner.records import Prediction, Sentence
from el4ner.stages import classify, extract, retrieve, verify
from el4ner.stages.team import Team

Text = str | Mapping[str, Any] | Sentence


class El4ner:
    """Finds entities in texts.

    >>> model = El4ner.from_config()  # doctest: +SKIP
    >>> [e.label for e in model.predict(["Ada Lovelace was born in London."])[0].entities]  # doctest: +SKIP
    ['person', 'location']
    """

    def __init__(self, config: Config, *, engines: dict[str, Engine] | None = None, encoder: Encoder | None = None,
                 pool: Pool | None = None) -> None:  # fmt: skip
        self.config = config
        self._given: dict[str, Any] = {"engines": engines, "encoder": encoder, "pool": pool}
        self._team: Team | None = None
        self._preparation: Preparation | None = None
        self._seconds: dict[str, float] = defaultdict(float)
        self._statuses: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    @classmethod
    def from_config(cls, config: Config | Mapping[str, Any] | str | None = None, **overrides: Any) -> El4ner:
        """From settings: a Config, plain data, or the path of a YAML or JSON file, under keyword overrides.

        Raises ConfigError for settings that are wrong. Nothing is loaded before it is needed.
        """
        if isinstance(config, Config):
            if not overrides:
                return cls(config)
            config = config.model_dump(exclude_unset=True)
        if isinstance(config, Mapping):
            return cls(load_config(None, merge(config, overrides)))
        return cls(load_config(config, overrides))

    def prepare(self, progress: Callable[[str], None] | None = None) -> None:
        """Loads the models and computes everything that comes from the pool, or takes it from the cache."""
        if self._team is None:
            began = time.perf_counter()
            self._preparation = Preparation(self.config, progress=progress, **self._given)
            self._team = self._preparation.team()
            self._seconds["preparation"] += time.perf_counter() - began

    def predict(self, texts: Iterable[Text]) -> list[Prediction]:
        """One prediction per text, in order. Raises UsageError for a single string, which would be read by letters."""
        return list(self.predict_iter(texts))

    def predict_iter(self, texts: Iterable[Text]) -> Iterator[Prediction]:
        """One prediction per text, in order, as they are ready; reads `config.batch_size` texts at a time.

        A text is a string, a Sentence, or a mapping with "text" and optionally "id"; other keys come back in `extra`.
        A record that cannot be used gives a prediction with status "skipped"; one that fails, status "failed".
        """
        if isinstance(texts, str | bytes | Mapping | Sentence):
            raise UsageError(f"texts is one {type(texts).__name__}, not several; write predict([text])")
        return self._predict(texts)

    def _predict(self, texts: Iterable[Text]) -> Iterator[Prediction]:
        sentences = (_as_sentence(text, position) for position, text in enumerate(texts, start=1))
        while chunk := list(islice(sentences, self.config.batch_size)):
            self.prepare()
            began = time.perf_counter()
            for prediction in self._chunk(chunk):
                self._statuses[prediction.status] += 1
                yield prediction
            self._seconds["prediction"] += time.perf_counter() - began

    def _chunk(self, chunk: Sequence[Sentence]) -> list[Prediction]:
        """Usable sentences go through the stages together; if that fails, each alone, so that none fails others."""
        usable = [s for s in chunk if s.error is None and s.text.strip()]
        try:
            done = dict(zip(map(id, usable), self._run(usable), strict=True))
        except (EngineError, KernelError) as error:
            done = (
                {id(s): self._alone(s) for s in usable}
                if len(usable) > 1
                else {id(s): _failed(s, error) for s in usable}
            )
        return [done.get(id(s)) or _untouched(s) for s in chunk]

    def _alone(self, sentence: Sentence) -> Prediction:
        try:
            return self._run([sentence])[0]
        except (EngineError, KernelError) as error:
            return _failed(sentence, error)

    def _run(self, sentences: Sequence[Sentence]) -> list[Prediction]:
        team = self._team
        if team is None or not sentences:
            return []
        retrieved = retrieve(sentences, team)
        extracted = extract(sentences, retrieved, team)
        classified = classify(sentences, retrieved, extracted, team)
        entities, usage = verify(sentences, retrieved, classified, team)
        predictions = []
        for sentence, own, cost, end in zip(sentences, entities, usage, extracted.truncated_at, strict=True):
            self._tokens["prompt"] += cost.prompt_tokens
            self._tokens["generated"] += cost.generated_tokens
            cut = None if end is None else f"only the first {end} of {len(sentence.text)} characters were read"
            predictions.append(
                Prediction(
                    sentence.id, sentence.text, own, "ok" if cut is None else "truncated", cut, cost, sentence.extra
                )
            )
        return predictions

    def report(self) -> dict[str, Any]:
        """What the run was and did: settings, who was asked and why, counts, tokens, seconds, peak memory."""
        team, preparation = self._team, self._preparation
        return {
            "settings": self.config.model_dump(mode="json"),
            "pool": None if team is None else {"sentences": len(team.pool.sentences), "labels": list(team.labels)},
            "asked": [] if team is None else list(team.asked),
            "verifier": None if team is None or team.verifier is None else team.verifier.name,
            "threshold": None if team is None else team.threshold,
            "stack": _weights(team),
            "fitted": {} if preparation is None else preparation.facts,
            "notes": [] if preparation is None else preparation.notes,
            "replies": {} if team is None else dict(team.counts),
            "records": dict(self._statuses),
            "tokens": dict(self._tokens),
            "seconds": {name: round(value, 2) for name, value in self._seconds.items()},
            "peak memory, MiB": _peak_memory_mib(),
        }


def _weights(team: Team | None) -> dict[str, Any] | None:
    """How much each voter counts, per label; "" is none."""
    if team is None or team.stack is None:
        return None
    names = (*team.labels, "")
    return {
        voter: {name: round(float(w), 3) for name, w in zip(names, row, strict=True)}
        for voter, row in zip(team.stack.voters, team.stack.weights, strict=True)
    }


def _peak_memory_mib() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))


def _as_sentence(text: object, position: int) -> Sentence:
    if isinstance(text, Sentence):
        return text
    if isinstance(text, str):
        return make_sentence(text, f"record {position}", str(position))
    if not isinstance(text, Mapping):
        reason = f"record {position}: came as {type(text).__name__}; give a string, or a mapping with a text"
        return Sentence(str(position), "", {}, reason)
    extra = {key: value for key, value in text.items() if key not in ("id", "text")}
    identifier = str(position if text.get("id") is None else text["id"])
    content = text.get("text")
    if not isinstance(content, str):
        reason = f"record {identifier}: text is {type(content).__name__}, not a string; give every record a text"
        return Sentence(identifier, "", extra, reason)
    return make_sentence(content, f"record {identifier}", identifier, extra)


def _untouched(sentence: Sentence) -> Prediction:
    """A record that needs no model: unusable, or without any word."""
    status = "ok" if sentence.error is None else "skipped"
    return Prediction(sentence.id, sentence.text, (), status, sentence.error, extra=sentence.extra)  # type: ignore[arg-type]


def _failed(sentence: Sentence, error: Exception) -> Prediction:
    return Prediction(sentence.id, sentence.text, (), "failed", str(error), extra=sentence.extra)
