"""What a system of an evaluation is: prepared with a pool, asked about sentences. And what systems are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from el4ner.bench.sharing import Remembering, answered, shared_engines
from el4ner.config import Config
from el4ner.engines import Encoder, Engine
from el4ner.errors import ConfigError
from el4ner.pool import Pool
from el4ner.preparation import Preparation
from el4ner.records import Entity, Prediction, Sentence, Span, Usage

Kind = Literal["el4ner", "baseline"]
B = TypeVar("B", bound="BaselineSettings")


class System(Protocol):
    """A method under evaluation. settings: everything that decides its answers, as plain data."""

    name: str
    kind: Kind

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that decides the answers, as plain data."""
        ...

    def load(self) -> None:
        """Load the models, before time is taken: whoever comes first in a run would pay for all."""
        ...

    def prepare(self, pool: Pool, progress: Callable[[str], None]) -> None:
        """Learn from the pool what is learned; forgets a pool it had before."""
        ...

    def predict(self, sentences: Sequence[Sentence]) -> list[Prediction]:
        """One prediction per sentence, in order."""
        ...

    def stages(self) -> list[dict[str, Any]] | None:
        """The spans after each stage of the last `predict`, one record a sentence; None without stages."""
        ...

    def models(self) -> dict[str, str]:
        """What was loaded: source -> name with revision or checksum, device and precision."""
        ...

    def parameters(self) -> int | None:
        """Weights of all models that were loaded; None where one is out of sight, behind a server."""
        ...

    def report(self) -> dict[str, Any] | None:
        """What was decided on the pool, as plain data; None where nothing is."""
        ...


def count_parameters(models: Iterable[Any]) -> int | None:
    """Weights of the models of engines and encoders, each model once; None if one has no `model` to look at."""
    distinct: dict[int, Any] = {}
    for one in models:
        model: Any = getattr(one, "model", None)
        if model is None:
            return None
        distinct[id(model)] = model
    return sum(int(p.numel()) for model in distinct.values() for p in model.parameters())


class Workbench:
    """What all systems of a run share: settings for models, one loader, the budget of demonstrations, the seed.

    config: settings that hold for all systems alike. k: demonstrations a prompt may show. remember: answer again from
    memory what another system asked before.
    """

    def __init__(self, config: Config, k: int, seed: int, *, remember: bool = False) -> None:
        self.config = config
        self.k = k
        self.seed = seed
        self._remember = remember
        self._loader = Preparation(config)
        self._encoder: Any = None
        self._engines: dict[str, Any] | None = None
        self._others: dict[str, Workbench] = {}

    def suited_to(self, config: Config) -> Workbench:
        """This workbench, or one with the models that settings name where those are others."""
        if _models_of(config) == _models_of(self.config):
            return self
        key = _models_of(config)
        if key not in self._others:
            self._others[key] = Workbench(config, self.k, self.seed, remember=self._remember)
        return self._others[key]

    @property
    def encoder(self) -> Encoder:
        """The sentence encoder, loaded when it is first asked for."""
        if self._encoder is None:
            loaded = self._loader.encoder()
            self._encoder = Remembering(loaded) if self._remember else loaded
        encoder: Encoder = self._encoder
        return encoder

    @property
    def engines(self) -> dict[str, Any]:
        """The engines of the members' sources that are asked in one way, loaded when first asked for."""
        if self._engines is None:
            self._engines = shared_engines(self._loader, remember=self._remember)
        return self._engines

    @property
    def engine(self) -> Engine:
        """The first member's model: what every baseline that prompts one model asks."""
        if not self.config.members:
            raise ConfigError("members: none; a baseline that prompts needs one")
        member = self.config.members[0]
        engine: Engine = self.engines.get(member.model) or self._loader.engine(
            member.source, member.chat, adapter=member.adapter
        )
        return engine

    def demonstrations(self, k: int | None, system: str) -> int:
        """How many demonstrations a system shows, of its own k or the run's. Raises ConfigError above the budget."""
        if k is not None and k > self.k:
            raise ConfigError(f"--option {system}.k={k}: above the budget of all systems, --k {self.k}; raise that")
        return self.k if k is None else k

    @property
    def answered(self) -> int:
        """How many answers came from memory so far."""
        own = answered(self._engines or {}, self._encoder)
        return own + sum(other.answered for other in self._others.values())

    def forget(self) -> None:
        """Drop what models keep of earlier prompts, so that no system profits from the one before."""
        for engine in (self._engines or {}).values():
            if hasattr(engine, "forget_prefixes"):
                engine.forget_prefixes()
        for other in self._others.values():
            other.forget()


def _models_of(config: Config) -> str:
    """What decides which models are loaded, and how, as a key."""
    members = sorted({(m.model, str(m.chat), m.quantization) for m in config.members})
    return repr((members, config.encoder, config.device, config.dtype))


@dataclass(frozen=True, slots=True)
class Found:
    """An entity that a baseline found; score is its own measure of certainty, not calibrated."""

    span: Span
    label: str
    score: float = 1.0


_FREE = Usage()


def prediction_of(
    sentence: Sentence,
    found: Sequence[Found],
    overlap: str,
    name: str,
    usage: Usage = _FREE,
    error: str | None = None,
) -> Prediction:
    """A record from what a baseline found. Copies are united; where output is flat, of spans that overlap the one with
    the best score stays, of equal ones the longest, then the first."""
    best: dict[tuple[Span, str], float] = {}
    for one in found:
        best[one.span, one.label] = max(one.score, best.get((one.span, one.label), 0.0))
    kept: list[tuple[Span, str]] = []
    for span, label in sorted(best, key=lambda key: (-best[key], key[0].start - key[0].end, key)):
        if overlap == "nested" or all(span.end <= other.start or other.end <= span.start for other, _ in kept):
            kept.append((span, label))
    entities = tuple(
        Entity(
            span.start, span.end, sentence.text[span.start : span.end], label, best[span, label], proposed_by=(name,)
        )
        for span, label in sorted(kept)
    )
    status: Literal["ok", "truncated"] = "ok" if error is None else "truncated"
    return Prediction(sentence.id, sentence.text, entities, status, error, usage)


class BaselineSettings(BaseModel):
    """Settings of a baseline: checked when made, never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def with_options(settings: type[B], given: Mapping[str, Any], system: str) -> B:
    """Settings of a baseline with the options given for it. Raises ConfigError for one that it does not have, or a
    value that is not allowed."""
    try:
        return settings.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join([system, *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            known = ", ".join(settings.model_fields) or "no options"
            raise ConfigError(f"--option {place}: unknown; {system} has {known}") from None
        raise ConfigError(f"--option {place}={first['input']!r}: {first['msg']}") from None
