"""What the engine benchmark asks: the questions that the default members put about real sentences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from el4ner.bench.evaluation_data import sample_sentences, split_file
from el4ner.config import make_config
from el4ner.engines.base import Choose, Prompt
from el4ner.pool import Pool, load_pool
from el4ner.preparation import Preparation
from el4ner.prompts import (
    VARIANTS,
    VERDICT_CHOICES,
    classification_question,
    fit_demonstrations,
    label_choices,
    prefix,
    verification_question,
)
from el4ner.records import Demonstration, Sentence
from el4ner.stages.retrieve import input_spans
from el4ner.stages.team import Team


@dataclass(frozen=True, slots=True)
class Asked:
    """Requests, where their sentences came from, and how many sentences and questions they are."""

    requests: tuple[Choose, ...]
    origin: str
    sentences: int


@dataclass(frozen=True, slots=True)
class Shown:
    """Sentences with their demonstrations (most similar first) and the surfaces that are asked about."""

    pool: Pool
    sentences: tuple[Sentence, ...]
    demonstrations: tuple[tuple[Demonstration, ...], ...]
    surfaces: tuple[tuple[str, ...], ...]
    origin: str
    max_prompt_tokens: int


def shown_sentences(folder: Path | None, split: str, count: int, spans: int, seed: int) -> Shown:
    """`count` sentences of a folder's split, or of the built-in pool, with demonstrations as stage 1 finds them.

    spans: at most so many surfaces of a sentence, from noun phrases and pool strings. Raises InputError for a folder
    without that split.
    """
    train = None if folder is None else str(split_file(folder, "train"))
    config = make_config({} if train is None else {"examples": train})
    pool = load_pool(train, None)
    if folder is None:
        sentences = pool.as_sentences(pool.sample(count))
    else:
        sentences = sample_sentences(split_file(folder, split), count, seed)
    retriever = Preparation(config).retriever(pool)
    assert retriever is not None  # both kinds of pool have sentences
    found, _ = input_spans(sentences, Team(config, pool))
    surfaces = tuple(
        tuple(dict.fromkeys(s.text[span.start : span.end] for span in own))[:spans]
        for s, own in zip(sentences, found, strict=True)
    )
    return Shown(
        pool, tuple(sentences), tuple(retriever.find(sentences, found)), surfaces,
        "built-in pool" if folder is None else f"{folder.name} {split}", config.max_prompt_tokens,
    )  # fmt: skip


def member_requests(shown: Shown, engine: Any) -> Asked:
    """Every default member classifies every surface; the first one verifies it, the labels taking turns."""
    choices = label_choices(shown.pool.labels)
    names = shown.pool.label_names
    requests: list[Choose] = []
    bare = int(engine.count_tokens([prefix("", (), shown.pool.labels)])[0])
    for sentence, demonstrations, surfaces in zip(shown.sentences, shown.demonstrations, shown.surfaces, strict=True):
        fitted = fit_demonstrations(
            demonstrations,
            lambda own, text=sentence.text: (*prefix(text, own, shown.pool.labels), text),  # type: ignore[misc]
            lambda prompt: int(engine.count_tokens([prompt])[0]),
            shown.max_prompt_tokens + bare,
        )
        shared = prefix(sentence.text, fitted.demonstrations, shown.pool.labels)
        requests += [
            Choose((*shared, classification_question(surface, variant)), choices)
            for variant in VARIANTS
            for surface in surfaces
        ]
        requests += [
            Choose((*shared, verification_question(surface, names[i % len(names)])), VERDICT_CHOICES)
            for i, surface in enumerate(surfaces)
        ]
    return Asked(tuple(requests), shown.origin, len(shown.sentences))


def shape_requests(engine: Any, prefix_tokens: int = 700, spans: int = 6) -> Asked:
    """The shape of the goal: one prefix, `spans` x 2 questions of about 14 tokens, answers of one token each.

    The text is English from the built-in pool, cut so that the prefix has `prefix_tokens` tokens.
    """
    pool = load_pool(None, None)
    text = ""
    for demonstration in pool.sentences:
        text += f"Text: {demonstration.text}\n"
        if len(engine.choice_ids(text)) > 2 * prefix_tokens:
            break
    shared = _cut(engine, text, prefix_tokens)
    words = ("Ada Lovelace", "London", "the analytical engine", "Tuesday", "Babbage", "a railway", "Lisbon", "storms")
    requests: list[Choose] = []
    labels = _single_token(engine, (" person", " place", " group", " work", " event", " time", " none"))
    for surface in (words * (spans // len(words) + 1))[:spans]:
        requests.append(Choose((*shared, f'Type of "{surface}" in this text:'), labels))
        requests.append(Choose((*shared, f'Is "{surface}" a person in this text?\nAnswer:'), VERDICT_CHOICES))
    return Asked(tuple(requests), "built-in pool, cut to a length", 1)


def _cut(engine: Any, text: str, tokens: int) -> Prompt:
    """(instruction, the rest) of a text with `tokens` tokens in all, cut at a space."""
    low, high = 0, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        if len(engine.choice_ids(text[:middle])) <= tokens:
            low = middle
        else:
            high = middle
    whole = text[: text.rfind(" ", 0, low)]
    middle = whole.find("\n") + 1
    return whole[:middle], whole[middle:] + "\n"


def _single_token(engine: Any, choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(choice for choice in choices if len(engine.choice_ids(choice)) == 1)
