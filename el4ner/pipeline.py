"""The method in four calls: retrieve, extract, classify, verify."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from threading import RLock
from typing import Any

from el4ner.config import Config, load_config, merge, settings_of
from el4ner.engines.base import Encoder, Engine
from el4ner.errors import ConfigError, EngineError, KernelError, UsageError, debugging
from el4ner.jsonl import make_sentence, record_sentence
from el4ner.kernels._dispatch import check_environment
from el4ner.plan import mib, peak_mib
from el4ner.pool import Pool
from el4ner.preparation import Preparation
from el4ner.records import Prediction, Sentence, Span
from el4ner.stages import Classified, Extracted, classify, extract, retrieve, verify
from el4ner.stages.team import Team

_NAMED = 10_000


class _CloseDecisions:
    """Spans whose fate rounding might turn: how many there are, and which the first of them are."""

    def __init__(self) -> None:
        self._count = 0
        self._named: list[dict[str, Any]] = []

    def add(self, record: str, spans: Sequence[Span]) -> None:
        """Counts the spans of one record."""
        room = max(0, _NAMED - self._count)
        self._named += [{"id": record, "start": span.start, "end": span.end} for span in spans[:room]]
        self._count += len(spans)

    def to_dict(self, tolerance: float) -> dict[str, Any]:
        """As the report has it; the tolerance is 0 in float32, where there are none."""
        return {"tolerance": tolerance, "count": self._count, "spans": list(self._named)}


Text = str | Mapping[str, Any] | Sentence
Watch = Callable[[Sequence[Sentence], Extracted, Classified], None]


class El4ner:
    """Finds entities in texts. Threads may share one: they take turns, a batch each.

    >>> model = El4ner.from_config()  # doctest: +SKIP
    >>> [e.label for e in model.predict(["Ada Lovelace was born in London."])[0].entities]  # doctest: +SKIP
    ['person', 'location']
    """

    def __init__(self, config: Config, *, engines: dict[str, Engine] | None = None, encoder: Encoder | None = None,
                 pool: Pool | None = None) -> None:  # fmt: skip
        if not isinstance(config, Config):
            raise ConfigError(f"config is {type(config).__name__}; write El4ner.from_config(...), or give a Config")
        self.config = config
        self.watch: Watch | None = None
        """Called with every batch and what its stages found, for evaluations; None for nobody."""
        self.progress: Callable[[str], None] | None = None
        """Told what the preparation is about, which can take minutes; None for nobody."""
        self._given: dict[str, Any] = {"engines": engines, "encoder": encoder, "pool": pool}
        self._team: Team | None = None
        self._preparation: Preparation | None = None
        self._at_once = config.batch_size
        self._seconds: dict[str, float] = defaultdict(float)
        self._statuses: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._close = _CloseDecisions()
        self._lock = RLock()

    @classmethod
    def from_config(
        cls, config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None, **overrides: Any
    ) -> El4ner:
        """From settings: a Config, plain data, or the path of a YAML or JSON file, under keyword overrides.

        Raises ConfigError for settings that are wrong. Nothing is loaded before it is needed.
        """
        overrides = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in overrides.items()}
        if isinstance(config, Config):
            if not overrides:
                return cls(config)
            config = settings_of(config, overrides.get("preset", config.preset))
        if isinstance(config, Mapping):
            return cls(load_config(None, merge(config, overrides)))
        if config is not None and not isinstance(config, str | os.PathLike):
            raise ConfigError(f"config is {type(config).__name__}; give a path, a mapping of settings or a Config")
        return cls(load_config(None if config is None else os.fspath(config), overrides))

    def __getstate__(self) -> dict[str, Any]:
        """Settings and what was given: a copy in another process loads its own models."""
        fresh = El4ner(self.config, **self._given)
        own = {**vars(fresh), "watch": self.watch, "progress": self.progress}
        del own["_lock"]
        return own

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=RLock())

    def prepare(self, progress: Callable[[str], None] | None = None) -> None:
        """Loads the models and computes everything that comes from the pool, or takes it from the cache.

        Raises UsageError where a variable of the environment asks kernels for what is not there.
        """
        with self._lock:
            if self._team is None:
                self._prepare(progress or self.progress)

    def _prepare(self, progress: Callable[[str], None] | None) -> None:
        try:
            check_environment()
        except KernelError as error:
            raise UsageError(str(error)) from None
        began = time.perf_counter()
        self._preparation = Preparation(self.config, progress=progress, **self._given)
        self._team = self._preparation.team()
        self._team.tokens.clear()  # the report counts what predictions cost
        self._team.counts.clear()
        self._at_once = self._preparation.at_once(self._team)
        self._seconds["preparation"] += time.perf_counter() - began

    def predict(self, texts: Iterable[Text]) -> list[Prediction]:
        """One prediction per text, in order. Raises UsageError for a single string, which would be read by letters."""
        return list(self.predict_iter(texts))

    def predict_iter(self, texts: Iterable[Text]) -> Iterator[Prediction]:
        """One prediction per text, in order, as they are ready; reads `config.batch_size` texts at a time.

        A text is a string, a Sentence, or a mapping as in an input file: "text" (or "tokens"), optionally "id"; other
        keys come back in `extra`.
        A record that cannot be used gives a prediction with status "skipped"; one that fails, status "failed".
        """
        if isinstance(texts, str | bytes | Mapping | Sentence):
            raise UsageError(f"texts is one {type(texts).__name__}, not several; write predict([text])")
        if not isinstance(texts, Iterable):
            raise UsageError(f"texts is {type(texts).__name__}; give a list of texts, or any other iterable of them")
        return self._predict(texts)

    def _predict(self, texts: Iterable[Text]) -> Iterator[Prediction]:
        sentences = (_as_sentence(text, position) for position, text in enumerate(texts, start=1))
        broken: list[Exception] = []
        while chunk := _read(sentences, self.config.batch_size, broken):
            usable = [s for s in chunk if s.error is None and s.text.strip()]
            with self._lock:  # voters, counts and caches are one thread's at a time
                if usable:
                    self.prepare()
                began = time.perf_counter()
                found = self._chunk(chunk, usable)
                self._seconds["prediction"] += time.perf_counter() - began  # without what the caller does in between
            for prediction in found:
                with self._lock:
                    self._statuses[prediction.status] += 1
                yield prediction
        for error in broken:
            raise error

    def _chunk(self, chunk: Sequence[Sentence], usable: Sequence[Sentence]) -> list[Prediction]:
        """Usable sentences go through the stages, as many at a time as the engines keep prefixes of."""
        parts = (usable[i : i + self._at_once] for i in range(0, len(usable), self._at_once))
        done = {id(s): found for part in parts for s, found in zip(part, self._together(part), strict=True)}
        return [done.get(id(s)) or _untouched(s) for s in chunk]

    def _together(self, sentences: Sequence[Sentence]) -> list[Prediction]:
        """Sentences go through the stages together; if that fails, each alone, so that none fails others."""
        found = self._attempt(sentences)
        if not isinstance(found, Exception):
            return found
        if len(sentences) > 1:
            return [self._together([sentence])[0] for sentence in sentences]
        return [_failed(sentences[0], found)]

    def _attempt(self, sentences: Sequence[Sentence]) -> list[Prediction] | Exception:
        """The predictions, or what failed: models and the libraries under them raise all kinds of errors.

        A wrong call or setting ends the run, as does any other mistake where EL4NER_DEBUG is set.
        """
        before = None if self._team is None else self._team.costs()
        try:
            return self._run(sentences)
        except UsageError:
            raise
        except Exception as error:
            if self._team is not None and before is not None:
                self._team.restore_costs(before)  # its sentences are asked again, each alone
            if debugging() and not isinstance(error, EngineError | KernelError):
                raise
            return error

    def _run(self, sentences: Sequence[Sentence]) -> list[Prediction]:
        team = self._team
        if team is None:
            return []
        retrieved = retrieve(sentences, team)
        extracted = extract(sentences, retrieved, team)
        classified = classify(sentences, retrieved, extracted, team)
        verified = verify(sentences, retrieved, classified, team)
        if self.watch is not None:
            self.watch(sentences, extracted, classified)
        predictions = []
        for i, (sentence, own, cost) in enumerate(zip(sentences, verified.entities, verified.usage, strict=True)):
            self._tokens["prompt"] += cost.prompt_tokens
            self._tokens["generated"] += cost.generated_tokens
            self._close.add(sentence.id, verified.close[i])
            unread = list(classified.unread[i])
            if team.verifier is not None and verified.unread[i]:
                unread.append(team.verifier.name)
            readers = [voter.name for voter in team.asked_readers]
            cut = _shortfall(sentence.text, extracted.read_up_to[i], team.asked, unread, readers)
            predictions.append(
                Prediction(
                    sentence.id, sentence.text, own, "ok" if cut is None else "truncated", cut, cost, sentence.extra
                )
            )
        return predictions

    def memory(self) -> dict[str, Any]:
        """Memory predicted for the models that were loaded (`el4ner plan`), and the peak that was measured, in MiB."""
        preparation = self._preparation
        plan = None if preparation is None else preparation.predicted()
        return {
            "predicted": None if plan is None else mib(plan.predicted),
            "measured peak": peak_mib("cpu" if plan is None else plan.device),
            "plan": None if plan is None else plan.to_dict(),
        }

    def report(self) -> dict[str, Any]:
        """What the run was and did: settings, who was asked and why, counts, tokens, seconds, peak memory.

        close decisions: those that rounding in reduced precision might turn, by record and span (the
        first 10,000).
        tokens by stage: per member those of prompts, those of them that were not computed because another prompt
        had them already, and those of replies. Waits for a batch of another thread.
        """
        with self._lock:
            return self._report()

    def _report(self) -> dict[str, Any]:
        team, preparation = self._team, self._preparation
        return {
            "settings": self.config.model_dump(mode="json"),
            "pool": None if team is None else {"sentences": len(team.pool.sentences), "labels": list(team.labels)},
            "asked": [] if team is None else list(team.asked),
            "verifier": None if team is None or team.verifier is None else team.verifier.name,
            "threshold": None if team is None else team.threshold,
            "stack": _weights(team),
            "fitted": {} if preparation is None else preparation.facts,
            "notes": [] if preparation is None else preparation.notes + preparation.engine_notes(),
            "replies": {} if team is None else dict(team.counts),
            "close decisions": self._close.to_dict(0.0 if team is None else team.tie_tolerance),
            "records": dict(self._statuses),
            "tokens": dict(self._tokens),
            "tokens by stage": {}
            if team is None
            else {
                stage: {member: dict(tokens) for member, tokens in own.items()} for stage, own in team.tokens.items()
            },
            "seconds": {name: round(value, 2) for name, value in self._seconds.items()},
            "peak memory, MiB": peak_mib("cpu"),
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


def _read(sentences: Iterator[Sentence], most: int, broken: list[Exception]) -> list[Sentence]:
    """The next sentences; where their iterable fails, those before it, and the error in `broken`."""
    chunk: list[Sentence] = []
    if broken:
        return chunk
    try:
        chunk.extend(islice(sentences, most))  # what came before an error stays in the list
    except Exception as error:  # noqa: BLE001  whatever the caller's iterable raises; raised again, later
        broken.append(error)
    return chunk


def _as_sentence(text: object, position: int) -> Sentence:
    where = f"record {position}"
    if isinstance(text, Sentence):
        if text.error is not None:
            return text
        own: object = text.text
        if isinstance(own, str):
            return make_sentence(own, where, text.id, text.extra)
        return replace(text, text="", error=f"{where}: text came as {type(own).__name__}; give a string")
    if isinstance(text, str):
        return make_sentence(text, where, str(position))
    if isinstance(text, Mapping):
        return record_sentence(text, where, position)
    reason = f"{where}: came as {type(text).__name__}; give a string, or a mapping with a text"
    return Sentence(str(position), "", {}, reason)


def _shortfall(
    text: str, read_up_to: Mapping[str, int] | None, asked: Sequence[str], unread: Sequence[str] = (),
    readers: Sequence[str] = (),
) -> str | None:  # fmt: skip
    """Who of those that are asked did not read the whole text, and how far they read; None if everybody did.

    unread: members whose question about the spans they were to label or judge was too long. readers: reading and
    tagging voters.
    """
    read_up_to = read_up_to or {}
    questioned = [name for name in dict.fromkeys(unread) if name not in read_up_to]
    ends = sorted(set(read_up_to.values()), reverse=True)
    parts = []
    for end in ends:
        names = ", ".join(name for name, own in read_up_to.items() if own == end)
        what = f"read only the first {end} of {len(text)} characters" if end else "could not read this text"
        parts.append(f"{names} {what}")
    if questioned:
        parts.append(f"{', '.join(questioned)} could not read this text with the question about its spans")
    if not parts:
        return None
    others = "; other voters did" if set(asked) - {*read_up_to, *questioned} else ""
    if others and {*readers} & {*read_up_to}:
        others = "; of the rest, other voters judge what members and strings known from the pool propose"
    return f"{' and '.join(parts)}: too long{others}"


def _untouched(sentence: Sentence) -> Prediction:
    """A record that needs no model: unusable, or without any word."""
    status = "ok" if sentence.error is None else "skipped"
    return Prediction(sentence.id, sentence.text, (), status, sentence.error, extra=sentence.extra)  # type: ignore[arg-type]


def _failed(sentence: Sentence, error: Exception) -> Prediction:
    """What an engine or kernel says on purpose as it is; of any other error its type too, since it may be a mistake."""
    reason = " ".join(str(error).split())
    if not isinstance(error, EngineError | KernelError):
        reason = f"unexpected {type(error).__name__}: {reason or 'no message'}; EL4NER_DEBUG=1 ends the run with it"
    return Prediction(sentence.id, sentence.text, (), "failed", reason, extra=sentence.extra)
