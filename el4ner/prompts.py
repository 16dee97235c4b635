"""Records to prompts. Pure: no model, no tokenizer.

A prompt is three segments: (instruction and labels; demonstrations and sentence; question). In the default style the
first two are the same text for extraction, classification and verification and for every variant, so members that
share weights read a sentence's demonstrations once; only the question differs. The paper style has an instruction of
its own for each stage, as published.

Texts are data. Each stands on one line, its line breaks escaped (escaping.py), so it cannot begin a line of its own,
add a label or end the line early. Spans inside a question stand in double quotes, with quotes inside them escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from el4ner.engines.base import Prompt
from el4ner.errors import ConfigError
from el4ner.escaping import escape_code, escape_line
from el4ner.parsing import ARROW, CLS, SEP
from el4ner.records import Demonstration, Label

PROMPT_VERSION = 2
"""Part of every cache key whose value depends on a prompt; raised whenever a rendered prompt changes."""

Variant = Literal["list", "ask", "define"]
VARIANTS: tuple[Variant, ...] = ("list", "ask", "define")
"""Wordings of the question. list: continues the form of the demonstrations. ask: a question in plain words.
define: refers to the definitions. Different wordings err differently, which is what a vote needs."""

Nearest = Literal["last", "first"]

SEPARATOR = "; "
EMPTY = "none"
NONE_CHOICE = " none of these"
VERDICT_CHOICES = (" yes", " no")
CONTENT_FREE = "N/A"
"""Stands for the span in the content-free question of contextual calibration (Zhao et al. 2021)."""


# Pieces ---------------------------------------------------------------------------------------------------------------


def verbalise(name: str) -> str:
    """A label name as words: hyphens and underscores become spaces."""
    return escape_line(name.replace("-", " ").replace("_", " ").strip(), also='"')


def label_choices(labels: Sequence[Label], none_choice: str = NONE_CHOICE) -> tuple[str, ...]:
    """The continuations scored in classification: each label with a leading space, then "none".

    Names that become equal as words are kept as written. Raises ConfigError if a label reads like the "none" choice.
    """
    spoken = [verbalise(label.name) for label in labels]
    choices = tuple(
        " " + (escape_line(label.name, also='"') if spoken.count(words) > 1 else words)
        for label, words in zip(labels, spoken, strict=True)
    )
    if len({*choices, none_choice}) != len(choices) + 1:
        names = ", ".join(label.name for label in labels)
        raise ConfigError(f"labels {names} and none_choice={none_choice!r} do not all read differently; rename one")
    return (*choices, none_choice)


def quoted(surface: str) -> str:
    """A surface in double quotes on one line."""
    return '"' + escape_line(surface, also='"') + '"'


def render_span_list(surfaces: Iterable[str], separator: str = SEPARATOR, empty: str = EMPTY) -> str:
    """Surfaces joined by `separator`, its first visible character escaped inside them; `empty` for none."""
    items = [escape_line(surface, also=separator.strip()[0]) for surface in surfaces]
    if not items:
        return empty
    line = separator.join(items)
    # A single entity that is called "none".
    return escape_code(line[0]) + line[1:] if line.casefold().rstrip(".") == empty.casefold() else line


def render_paper_list(surfaces: Iterable[str]) -> str:
    """The published form of a list: [CLS]a[SEP]b[SEP]."""
    return CLS + ("".join(escape_line(surface, also="[") + SEP for surface in surfaces) or SEP)


def render_labels(pairs: Iterable[tuple[str, str]]) -> str:
    """Labelled spans on one line: a -> person[SEP]b -> location."""
    return SEP.join(
        escape_line(surface, also="[") + ARROW + escape_line(label, also="[").replace("->", "\\->")
        for surface, label in pairs
    )


def mentions(demonstration: Demonstration) -> list[tuple[str, str]]:
    """(surface, label) pairs in text order, each once."""
    ordered = sorted(demonstration.entities, key=lambda entity: (entity.start, -entity.end))
    pairs = [(demonstration.text[entity.start : entity.end], entity.label) for entity in ordered]
    return list(dict.fromkeys(pairs))


def surfaces_of(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """The surfaces of (surface, label) pairs, each once."""
    return list(dict.fromkeys(surface for surface, _ in pairs))


def ordered(demonstrations: Sequence[Demonstration], nearest: Nearest) -> list[Demonstration]:
    """Demonstrations come most similar first; "last" puts the most similar next to the sentence."""
    return list(demonstrations) if nearest == "first" else list(reversed(demonstrations))


@dataclass(frozen=True, slots=True)
class FittedDemonstrations:
    """The demonstrations that fit a token budget, how many were dropped, and whether the rest fits without any."""

    demonstrations: tuple[Demonstration, ...]
    dropped: int
    fits: bool


def fit_demonstrations(
    demonstrations: Sequence[Demonstration],
    build: Callable[[Sequence[Demonstration]], Prompt],
    count: Callable[[Prompt], int],
    max_prompt_tokens: int,
) -> FittedDemonstrations:
    """Drops the least similar demonstrations (the last ones) until the prompt has at most `max_prompt_tokens`.

    count is called O(log n) times: dropping a demonstration never lengthens the prompt.
    """
    low, high = 0, len(demonstrations)
    if count(build(demonstrations)) <= max_prompt_tokens:
        return FittedDemonstrations(tuple(demonstrations), 0, fits=True)
    if not demonstrations or count(build(())) > max_prompt_tokens:
        return FittedDemonstrations((), len(demonstrations), fits=False)
    while high - low > 1:  # low fits, high does not
        middle = (low + high) // 2
        if count(build(demonstrations[:middle])) <= max_prompt_tokens:
            low = middle
        else:
            high = middle
    return FittedDemonstrations(tuple(demonstrations[:low]), len(demonstrations) - low, fits=True)


# Default style --------------------------------------------------------------------------------------------------------


def instruction(labels: Sequence[Label]) -> str:
    """First segment: what is asked, and the label set with definitions and examples."""
    lines = ["Find the named entities in texts. The types of entities are:"]
    for label in labels:
        line = f"- {verbalise(label.name)}"
        if label.definition:
            line += ": " + escape_line(label.definition)
        if label.examples:
            line += f" For example: {render_span_list(label.examples)}."
        if label.counter_examples:
            line += f" But not: {render_span_list(label.counter_examples)}."
        lines.append(line)
    return "\n".join(lines) + "\n\n"


def demonstration_block(demonstration: Demonstration) -> str:
    """One demonstration: its text, its entities as a list, and their types."""
    pairs = mentions(demonstration)
    lines = ["Text: " + escape_line(demonstration.text), "Entities: " + render_span_list(surfaces_of(pairs))]
    lines.extend(f"{_type_line(surface)} {verbalise(label)}" for surface, label in pairs)
    return "\n".join(lines) + "\n\n"


def prefix(
    text: str, demonstrations: Sequence[Demonstration], labels: Sequence[Label], nearest: Nearest = "last"
) -> Prompt:
    """The two segments that all questions about a sentence share."""
    blocks = "".join(demonstration_block(demonstration) for demonstration in ordered(demonstrations, nearest))
    return instruction(labels), f"{blocks}Text: {escape_line(text)}\n"


def extraction_question(variant: Variant = "list") -> str:
    """Asks for a separator-joined list of surfaces."""
    return {
        "list": "Entities:",
        "ask": f'Which entities are named in this text? Separate them by "{SEPARATOR.strip()}".\nEntities:',
        "define": f'Copy each part of this text that fits one of the types above, or "{EMPTY}".\nEntities:',
    }[variant]


def classification_question(surface: str, variant: Variant = "list") -> str:
    """Ends where a label name is to follow, always in the form of the demonstrations, which small models copy."""
    return {
        "list": "",
        "ask": "What is it in this text, one of the types or none of these?\n",
        "define": "Compare it with the types as described above; none of these if none fits.\n",
    }[variant] + _type_line(surface)


def _type_line(surface: str) -> str:
    """How a label is written and asked for.

    With SmolLM2-135M as plain text, four demonstrations and 86 gold spans of WNUT17 dev (60 sentences), uncalibrated:
    "list" names 74% of the labels, "ask" 69%, "define" 66%, where always saying "person" would name 48%.
    """
    return f"Type of {quoted(surface)}:"


def verification_question(surface: str, label: str, variant: Variant = "list") -> str:
    """Ends where yes or no is to follow."""
    name = verbalise(label)
    return {
        "list": f"{quoted(surface)} is a {name}: yes or no?\nAnswer:",
        "ask": f"Is {quoted(surface)} a {name} in this text?\nAnswer:",
        "define": f'Does {quoted(surface)} fit the type "{name}" as described above?\nAnswer:',
    }[variant]
