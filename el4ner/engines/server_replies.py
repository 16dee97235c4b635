"""What an OpenAI-compatible server replies, read into data; and what listed tokens say about choices. Pure.

Servers write log-probabilities in two forms: the older one of completions (`tokens`, `token_logprobs`, `top_logprobs`)
and that of chats (`content`), which some servers use for both. Both are read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from el4ner.engines.base import FloatArray

ANSWERED = 0.9
"""Probability of a choice that was written as an answer, without any probabilities; the others share the rest."""

WORTH_ASKING = 0.05
"""Share of all that was listed for the choices from which a token is looked into that does not settle which it is."""

_DEPTH = 6

Listed = Mapping[str, float]
"""Likeliest tokens at one place -> probability."""


@dataclass(frozen=True, slots=True)
class TokenOdds:
    """One token of a reply: its text, its log-probability (None where not given), and the likeliest at its place."""

    text: str
    logprob: float | None
    listed: Listed


@dataclass(frozen=True, slots=True)
class ServerReply:
    """One reply. tokens: None where the server gave no log-probabilities. Counts are None where it gave no usage."""

    text: str
    tokens: tuple[TokenOdds, ...] | None
    truncated: bool
    prompt_tokens: int | None
    cached_tokens: int
    generated_tokens: int | None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _listed(pairs: Sequence[tuple[Any, Any]]) -> Listed:
    found: dict[str, float] = {}
    for token, logprob in pairs:
        if isinstance(token, str) and _is_number(logprob):
            found[token] = found.get(token, 0.0) + math.exp(min(0.0, logprob))
    return found


def _tokens(logprobs: Any) -> tuple[TokenOdds, ...] | None:
    """Log-probabilities in either form; None for anything else."""
    if not isinstance(logprobs, dict):
        return None
    if isinstance(logprobs.get("content"), list):
        return tuple(_chat_token(row) for row in logprobs["content"] if isinstance(row, dict)) or None
    texts, numbers = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if not isinstance(texts, list) or not isinstance(numbers, list) or len(texts) != len(numbers):
        return None
    tops = logprobs.get("top_logprobs")
    tops = tops if isinstance(tops, list) and len(tops) == len(texts) else [None] * len(texts)
    tokens = []
    for text, number, top in zip(texts, numbers, tops, strict=True):
        listed = _listed([*top.items()] if isinstance(top, dict) else [])
        tokens.append(TokenOdds(str(text), number if _is_number(number) else None, listed))
    return tuple(tokens) or None


def _chat_token(row: Mapping[str, Any]) -> TokenOdds:
    number, top = row.get("logprob"), row.get("top_logprobs")
    pairs = [(t.get("token"), t.get("logprob")) for t in top if isinstance(t, dict)] if isinstance(top, list) else []
    return TokenOdds(str(row.get("token", "")), number if _is_number(number) else None, _listed(pairs))


def _count(usage: Any, key: str) -> int | None:
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def read_reply(data: Any) -> ServerReply:
    """A completion or chat completion. Raises ValueError, saying what is missing, for anything else."""
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("no choices in it")
    choice = choices[0]
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if text is None and isinstance(message, dict):
        text = ""  # a refusal, or nothing but reasoning
    if not isinstance(text, str):
        raise ValueError("no text in its first choice")
    usage = data.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    return ServerReply(
        text,
        _tokens(choice.get("logprobs")),
        choice.get("finish_reason") == "length",
        _count(usage, "prompt_tokens"),
        _count(details, "cached_tokens") or 0,
        _count(usage, "completion_tokens"),
    )


# Log-probabilities of every token of every choice -------------------------------------------------------------------


def choice_path(reply: ServerReply, choice: str) -> tuple[tuple[str, float], ...] | None:
    """The tokens that an echoed prompt ends with and that make up the choice, with their log-probabilities.

    None where no token begins with the choice, so that its log-probability cannot be told from the prompt's. Blanks are
    not compared: servers write tokens that begin a word with or without theirs.
    """
    if reply.tokens is None:
        return None
    written = 1 if reply.generated_tokens is None else reply.generated_tokens
    echoed = reply.tokens[: len(reply.tokens) - written]
    wanted = _dense(choice)
    found = ""
    path: list[tuple[str, float]] = []
    for token in reversed(echoed):
        if len(found) >= len(wanted):
            break
        if token.logprob is None:
            return None
        found = _dense(token.text) + found
        path.append((token.text, token.logprob))
    return tuple(reversed(path)) if found == wanted else None


def _dense(text: str) -> str:
    return re.sub(r"[\s\u2581\u0120]+", "", text)


def path_scores(paths: Sequence[Sequence[tuple[str, float]]], over_choices: bool) -> FloatArray:
    """Log-probability (n,) f32 of each choice from those of its tokens.

    over_choices: normalised at each node of the trie of all choices over its children. Where a choice ends at a node
    that others go on from, it takes all that its continuations leave.
    """
    if not over_choices:
        return np.array([sum(number for _, number in path) for path in paths], dtype=np.float32)
    children: dict[tuple[str, ...], dict[str | None, float]] = {}
    for path in paths:
        texts = tuple(text for text, _ in path)
        for depth, (text, number) in enumerate(path):
            children.setdefault(texts[:depth], {})[text] = number
    for path in paths:
        node = children.get(tuple(text for text, _ in path))
        if node is not None:
            going_on = sum(math.exp(number) for number in node.values())
            node[None] = math.log(max(1.0 - going_on, 1e-12))
    totals = {prefix: float(np.logaddexp.reduce([*node.values()])) for prefix, node in children.items()}
    scores = []
    for path in paths:
        texts = tuple(text for text, _ in path)
        score = sum(number - totals[texts[:depth]] for depth, (_, number) in enumerate(path))
        if texts in children:
            score += children[texts][None] - totals[texts]
        scores.append(score)
    return np.array(scores, dtype=np.float32)


# The likeliest first tokens -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Spread:
    """What listed tokens give each choice. bounded: how many were not listed and got the least listed probability."""

    scores: FloatArray
    bounded: int


class ListedChoices:
    """Shares of choices from the likeliest tokens after a prompt.

    A token that is the beginning of one choice only, up to the end of a word, gives that choice its probability: what
    follows is settled. Any other beginning of choices (a syllable, a word that two of them share) is looked into where
    it is worth asking, since it may as well begin something else; `look` says what is likely behind it, or None where
    that cannot be asked, and then it counts from three letters on, in equal parts. A choice that is not listed gets
    the least probability that is, which is an upper bound.
    """

    def __init__(self, look: Callable[[str], Listed | None], choices: Sequence[str]) -> None:
        self._look = look
        self._choices = choices
        self._mass = [0.0] * len(choices)
        self._least = 0.0

    def spread(self) -> Spread | None:
        """Log-probabilities (n,) f32 that sum to one; None where no token listed begins any choice."""
        top = self._look("")
        if not top:
            return None
        begins = sum(p for token, p in top.items() if token and any(c.startswith(token) for c in self._choices))
        self._least = WORTH_ASKING * begins
        self._walk("", top, dict(enumerate(self._choices)), 1.0, _DEPTH)
        if not any(self._mass):
            return None
        floor = max(min(top.values()), 1e-12)
        bounded = sum(not mass for mass in self._mass)
        mass = np.array([own or floor for own in self._mass], dtype=np.float64)
        return Spread(np.log(mass / mass.sum()).astype(np.float32), bounded)

    def _walk(self, prefix: str, top: Listed, rest: Mapping[int, str], weight: float, depth: int) -> None:
        """Shares out the tokens behind `prefix`, which has the probability `weight`, among choices still to be told."""
        going_on = 0.0
        for token, p in top.items():
            owners = {i: own[len(token) :] for i, own in rest.items() if token and own and own.startswith(token)}
            if not owners:
                continue
            going_on += p
            left = next(iter(owners.values()))
            if len(owners) == 1 and (not left or left[0].isspace()):
                self._mass[next(iter(owners))] += weight * p
            elif weight * p >= self._least and depth:
                self._look_into(prefix + token, owners, weight * p, depth - 1)
        for i, own in rest.items():
            if not own:  # it may end here: whatever does not go on to another choice means this one
                self._mass[i] += weight * max(0.0, 1.0 - going_on)

    def _look_into(self, prefix: str, owners: Mapping[int, str], weight: float, depth: int) -> None:
        top = self._look(prefix)
        if top is not None:
            self._walk(prefix, top, owners, weight, depth)
        elif len(prefix.strip()) >= 3:
            for i in owners:
                self._mass[i] += weight / len(owners)


def spoken(choice: str) -> str:
    """A choice as a chat's answer may begin: without leading blanks, whatever the case."""
    return choice.strip().casefold()


def chat_places(tokens: Sequence[TokenOdds]) -> dict[str, Listed]:
    """What was likely behind each beginning of a chat's answer that was written: beginning -> likeliest tokens."""
    places: dict[str, Listed] = {}
    written = ""
    for token in tokens:
        folded: dict[str, float] = {}
        for text, p in token.listed.items():
            own = text.casefold() if written else text.casefold().lstrip()
            folded[own] = folded.get(own, 0.0) + p
        places.setdefault(written, folded)
        written = (written + token.text.casefold()).lstrip()
    return places


# Written answers ------------------------------------------------------------------------------------------------------


def parse_answer(text: str, choices: Sequence[str]) -> int | None:
    """Which choice a reply names: the longest that its first line begins with, else the only one in it; else None."""
    try:  # the form that a schema asks for
        data = json.loads(text)
        text = str(data["answer"]) if isinstance(data, dict) and "answer" in data else text
    except ValueError:
        pass
    line = first_line(text).casefold().strip(" \t\"'`*.,:;!()[]")
    words = [(spoken(choice), i) for i, choice in enumerate(choices)]
    begins = [(word, i) for word, i in words if re.match(rf"{re.escape(word)}(?!\w)", line)]
    if begins:
        return max(begins, key=lambda found: len(found[0]))[1]
    inside = [(word, i) for word, i in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", line)]
    longest = [(word, i) for word, i in inside if not any(word != other and word in other for other, _ in inside)]
    return longest[0][1] if len(longest) == 1 else None


def answer_scores(answer: int | None, n_choices: int) -> FloatArray:
    """Log-probabilities (n,) f32 of a written answer: ANSWERED for it; NaN, an abstention, where there is none."""
    if answer is None:
        return np.full(n_choices, np.nan, dtype=np.float32)
    if n_choices == 1:
        return np.zeros(1, dtype=np.float32)
    scores = np.full(n_choices, math.log((1 - ANSWERED) / (n_choices - 1)), dtype=np.float32)
    scores[answer] = math.log(ANSWERED)
    return scores


def first_line(text: str) -> str:
    """The first line of a reply that is not blank; empty if there is none."""
    return next((line for line in text.splitlines() if line.strip()), "")
