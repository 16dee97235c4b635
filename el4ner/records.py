"""The nouns of el4ner: sentences, spans, labels, demonstrations, candidates, entities, predictions.

A span is a pair of half-open offsets, counted in Unicode code points of the original text:
`text[start:end]` is the surface. No text is normalised, lower-cased or stripped before it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "truncated", "skipped", "failed"]

NONE_LABEL = ""
"""Stands for "none of these labels"; always the last column of a label distribution."""


class Span(NamedTuple):
    """Half-open code-point offsets into a text."""

    start: int
    end: int


class LabelledSpan(NamedTuple):
    """A span and the label it carries, as in a gold annotation."""

    start: int
    end: int
    label: str

    @property
    def span(self) -> Span:
        """The offsets without the label."""
        return Span(self.start, self.end)


@dataclass(frozen=True, slots=True)
class Label:
    """An entity type: its name, a sentence of definition, and what is and is not one."""

    name: str
    definition: str = ""
    examples: tuple[str, ...] = ()
    counter_examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sentence:
    """One input record. A record that could not be read has `error` set and goes through unprocessed."""

    id: str
    text: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A labelled sentence of the pool."""

    id: str
    text: str
    entities: tuple[LabelledSpan, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A span somebody proposed, and who did, in alphabetical order."""

    span: Span
    proposed_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens a record cost, summed over members and stages."""

    prompt_tokens: int = 0
    generated_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt_tokens + other.prompt_tokens, self.generated_tokens + other.generated_tokens)


@dataclass(frozen=True, slots=True)
class Entity:
    """A found entity with where it came from.

    score: calibrated probability that span and label are both right.
    votes: member -> label -> probability; "" stands for none of the labels.
    verified: the verifier's probability that the label is right, None if it was not asked.
    """

    start: int
    end: int
    text: str
    label: str
    score: float
    votes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    proposed_by: tuple[str, ...] = ()
    verified: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the keys of the output format; numbers rounded to 4 decimals."""
        return {
            "start": self.start,
            "end": self.end,
            "text": self.text,
            "label": self.label,
            "score": round(self.score, 4),
            "votes": {member: {label: round(p, 4) for label, p in vote.items()} for member, vote in self.votes.items()},
            "proposed_by": list(self.proposed_by),
            "verified": None if self.verified is None else round(self.verified, 4),
        }


@dataclass(frozen=True, slots=True)
class Prediction:
    """The one output record of one input record.

    status: "ok"; "truncated" if a voter read only the beginning of the text, or nothing of it; "skipped" if the input
    record was unusable and never entered the pipeline; "failed" if processing it raised an error.
    """

    id: str
    text: str
    entities: tuple[Entity, ...] = ()
    status: Status = "ok"
    error: str | None = None
    usage: Usage = Usage()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entity in self.entities:
            if self.text[entity.start : entity.end] != entity.text or not entity.text:
                raise ValueError(
                    f"record {self.id!r}: entity [{entity.start}:{entity.end}] reads "
                    f"{self.text[entity.start : entity.end]!r} in the text but says {entity.text!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, always with the same keys."""
        return {
            "id": self.id,
            "text": self.text,
            "entities": [entity.to_dict() for entity in self.entities],
            "status": self.status,
            "error": self.error,
            "usage": {
                "prompt_tokens": self.usage.prompt_tokens,
                "generated_tokens": self.usage.generated_tokens,
            },
            "extra": dict(self.extra),
        }
