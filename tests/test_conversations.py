"""Conversations are held side by side, one call per engine, kind and round."""

from __future__ import annotations

import pytest

from el4ner.engines.base import Choose, Completion, FloatArray, Generate
from el4ner.voters.conversations import Batch, Conversation, alone, together


class Echo:
    """Answers with the last segment of the prompt, and remembers every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []

    def generate(self, requests: list[Generate]) -> list[Completion]:
        self.calls.append(("generate", [request.prompt[-1] for request in requests]))
        return [Completion(request.prompt[-1], 1, 1) for request in requests]

    def choose(self, requests: list[Choose]) -> list[FloatArray]:
        self.calls.append(("choose", [request.prompt[-1] for request in requests]))
        return [request.prompt[-1] for request in requests]  # type: ignore[misc]

    def count_tokens(self, prompts: list[tuple[str, ...]]) -> list[int]:
        return [len(prompt) for prompt in prompts]


def talk(engine: Echo, *rounds: list[str]) -> Conversation[list[str]]:
    heard: list[str] = []
    for words in rounds:
        answers = yield Batch(engine, [Generate((word,)) for word in words])  # type: ignore[arg-type]
        heard += [answer.text for answer in answers]
    return heard


def pick(engine: Echo, words: list[str]) -> Conversation[list[str]]:
    answers = yield Batch(engine, [Choose((word,), ("x",)) for word in words])  # type: ignore[arg-type]
    return list(answers)


def test_one_call_per_engine_and_round_and_answers_come_back_to_who_asked() -> None:
    one, two = Echo(), Echo()
    results = together([talk(one, ["a", "b"], ["c"]), talk(two, ["d"]), talk(one, ["e"], ["f", "g"]), talk(one)])
    assert results == [["a", "b", "c"], ["d"], ["e", "f", "g"], []]
    assert one.calls == [("generate", ["a", "b", "e"]), ("generate", ["c", "f", "g"])]
    assert two.calls == [("generate", ["d"])]


def test_kinds_are_not_mixed_and_empty_batches_ask_nobody() -> None:
    engine = Echo()
    assert together([talk(engine, ["a"]), pick(engine, ["b"]), pick(engine, [])]) == [["a"], ["b"], []]
    assert engine.calls == [("generate", ["a"]), ("choose", ["b"])]
    assert together([]) == []
    assert alone(pick(engine, ["c"])) == ["c"]


def test_an_engine_that_fails_fails_the_conversation() -> None:
    class Broken(Echo):
        def generate(self, requests: list[Generate]) -> list[Completion]:
            raise RuntimeError("no answer")

    with pytest.raises(RuntimeError, match="no answer"):
        alone(talk(Broken(), ["a"]))
