"""Several members at once: what they ask of one engine in the same round goes to it in one call.

A member's stage is a conversation: a generator that yields a batch of requests, is sent the answers, and returns what
they mean. Requests that share leading segments then share their computation across members too.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from el4ner.engines.base import Choose, Engine, Generate

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests of one kind for one engine; the answers come back in their order."""

    engine: Engine
    requests: Sequence[Generate] | Sequence[Choose]


Conversation = Generator[Batch, "list[Any]", T]


def together(conversations: Sequence[Conversation[T]], computed: list[int] | None = None) -> list[T]:
    """Hold conversations side by side, round by round, until each has returned. Results in their order.

    computed: filled with the prompt tokens that were computed for each conversation; what several share is charged to
    the first of them, and an engine that does not say is taken to compute everything.
    """
    spent = [0] * len(conversations)
    results: dict[int, T] = {}
    answers: dict[int, list[Any] | None] = dict.fromkeys(range(len(conversations)))
    while answers:
        asked: dict[int, Batch] = {}
        for index, answer in answers.items():
            try:
                asked[index] = conversations[index].send(answer)  # type: ignore[arg-type]
            except StopIteration as stop:
                results[index] = stop.value
        answers = _answers(asked, spent)
    if computed is not None:
        computed[:] = spent
    return [results[index] for index in range(len(conversations))]


def alone(conversation: Conversation[T]) -> T:
    """Hold one conversation."""
    return together([conversation])[0]


def _answers(asked: dict[int, Batch], spent: list[int]) -> dict[int, list[Any] | None]:
    """One call per engine and kind of request; adds what each conversation made it compute to `spent`."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, batch in asked.items():
        generates = bool(batch.requests) and isinstance(batch.requests[0], Generate)
        groups.setdefault((id(batch.engine), generates), []).append(index)
    answers: dict[int, list[Any] | None] = {}
    for (_, generates), indices in groups.items():
        engine = asked[indices[0]].engine
        requests: list[Any] = [request for index in indices for request in asked[index].requests]
        replies: list[Any] = []
        computed: list[int] = []
        if requests:
            replies = list(engine.generate(requests) if generates else engine.choose(requests))
            computed = _computed(engine, requests)
        at = 0
        for index in indices:
            size = len(asked[index].requests)
            answers[index] = replies[at : at + size]
            spent[index] += sum(computed[at : at + size])
            at += size
    return {index: answers[index] for index in asked}


def _computed(engine: Engine, requests: Sequence[Any]) -> list[int]:
    """Prompt tokens that the engine computed for each request of its last call."""
    computed = getattr(engine, "computed", None)
    if computed is not None and len(computed) == len(requests):
        return list(computed)
    return list(engine.count_tokens([request.prompt for request in requests]))
