"""Prompts of the `paper` preset: free generation with the published list markers, in our own wording.

The form is known from descriptions of EL4NER and from a re-implementation (one line, [CLS] and [SEP] as markers, all
spans of a sentence classified in one call, true or false for each span in verification without demonstrations).
"""

from __future__ import annotations

from collections.abc import Sequence

from el4ner.engines.base import Prompt
from el4ner.escaping import escape_line
from el4ner.prompts import Nearest, mentions, ordered, quoted, render_labels, render_paper_list, surfaces_of
from el4ner.records import Demonstration, Label, Span

_EXTRACT = (
    "You are an expert in named entity recognition. List every part of the sentence that could be an entity. "
    "Copy it exactly as it is written. Begin with [CLS], write [SEP] after each entity, and explain nothing.\n\n"
)
_CLASSIFY = (
    "You are an expert in named entity recognition. Give each of the listed entities its type. Answer on one line as "
    "entity -> type, with [SEP] between them. Use only the listed entities and add none.\n"
)
_VERIFY = (
    "You are a careful linguist. Judge whether the part of the sentence has the given type. "
    "Answer only true or false.\n\n"
)


def paper_extraction_prompt(
    text: str, demonstrations: Sequence[Demonstration], *, nearest: Nearest = "first"
) -> Prompt:
    """Asks for a marked list; without demonstrations it is the zero-shot prompt of the retrieval stage."""
    blocks = "".join(
        f"Sentence: {escape_line(demonstration.text)}\n"
        f"Entities: {render_paper_list(surfaces_of(mentions(demonstration)))}\n\n"
        for demonstration in ordered(demonstrations, nearest)
    )
    return _EXTRACT, f"{blocks}Sentence: {escape_line(text)}\n", "Entities:"


def paper_classification_prompt(
    text: str,
    demonstrations: Sequence[Demonstration],
    spans: Sequence[Span],
    labels: Sequence[Label],
    *,
    list_labels: bool = False,
    nearest: Nearest = "first",
) -> Prompt:
    """Asks for the labels of all spans in one reply.

    list_labels: whether the label set is written out; the re-implementation shows it only through demonstrations.
    """
    types = "The types are: " + ", ".join(escape_line(label.name) for label in labels) + ".\n" if list_labels else ""
    blocks = "".join(
        f"Sentence: {escape_line(demonstration.text)}\n"
        f"Entities: {render_paper_list(surfaces_of(mentions(demonstration)))}\n"
        f"Types: {render_labels(mentions(demonstration))}\n\n"
        for demonstration in ordered(demonstrations, nearest)
        if demonstration.entities
    )
    listed = render_paper_list(dict.fromkeys(text[span.start : span.end] for span in spans))
    return f"{_CLASSIFY}{types}\n", f"{blocks}Sentence: {escape_line(text)}\n", f"Entities: {listed}\nTypes:"


def paper_verification_prompt(text: str, span: Span, label: str) -> Prompt:
    """Asks for true or false about one span and label.

    On 120 claims about spans of WNUT17 dev, half of them right, SmolLM2-135M as plain text gives 120 usable verdicts to
    this wording, 46 where it ends in "Answer:" alone; at chance (61 right) in any case.
    """
    return (
        _VERIFY,
        f"Sentence: {escape_line(text)}\n",
        f"Is {quoted(text[span.start : span.end])} an entity of the type {quoted(label)} in this sentence?\n"
        "Answer (true or false):",
    )
