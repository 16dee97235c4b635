"""Greedy decoding in batches, behind cached prefixes, each row free or bound to its own grammar.

A reply ends at its first line break, at an end-of-turn or any other control token, or at its token limit. Only
generated ids are decoded; the prompt never passes through the tokenizer's decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from el4ner.engines.chat import PromptTokens
from el4ner.engines.grammar import RowGrammar
from el4ner.engines.head import Head
from el4ner.engines.prefix_cache import Chunk, Continued, PrefixRunner, Row
from el4ner.engines.scoring import Budgets


@dataclass(slots=True)
class Reply:
    """A reply being written. tokens: ids so far, without the control token that ended it."""

    prompt: PromptTokens
    limit: int
    grammar: RowGrammar | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    generated: int = 0
    done: bool = False
    truncated: bool = False


class ReplyWriter:
    """Chooses the next token of each reply and knows when it ends."""

    def __init__(self, tokenizer: Any, end_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stops = frozenset(end_tokens) | frozenset(tokenizer.all_special_ids)

    def take(self, logits: torch.Tensor, replies: Sequence[Reply]) -> list[int]:
        """logits (B, V) -> the most probable allowed token of every reply, which the replies take."""
        for row, reply in enumerate(replies):
            if reply.grammar is not None and not reply.done:
                allowed = reply.grammar.allowed().to(logits.device)
                width = min(len(allowed), logits.shape[1])
                logits[row, :width].masked_fill_(~allowed[:width], float("-inf"))
                logits[row, width:] = float("-inf")
        chosen = logits.argmax(-1).tolist()
        for reply, token in zip(replies, chosen, strict=True):
            if not reply.done:
                self._take(reply, token)
        return [int(token) for token in chosen]

    def _take(self, reply: Reply, token: int) -> None:
        reply.generated += 1
        if token in self._stops:
            reply.done = True
            return
        reply.tokens.append(token)
        if reply.grammar is not None:
            reply.grammar.consume(token)
        reply.text = self._tokenizer.decode(reply.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\n" in reply.text:
            reply.text = reply.text.partition("\n")[0]
            reply.done = True
        elif reply.grammar is not None and reply.grammar.finished:
            reply.done = True
        elif reply.generated >= reply.limit:
            reply.done = reply.truncated = True


class BatchDecoder:
    """Writes replies with packed prefixes. max_rows: replies written at once."""

    def __init__(self, runner: PrefixRunner, head: Head, writer: ReplyWriter, budgets: Budgets, max_rows: int) -> None:
        self._runner = runner
        self._head = head
        self._writer = writer
        self._budgets = budgets
        self._max_rows = max_rows

    def write(self, replies: Sequence[Reply]) -> None:
        """Finish all replies in place."""
        for batch in self._batches(replies):
            prefixes = self._runner.prefixes([reply.prompt.shared for reply in batch])
            self._write(batch, prefixes)

    def _batches(self, replies: Sequence[Reply]) -> list[list[Reply]]:
        """Replies whose prompts are of like length, within the budgets of memory and rows."""
        batches: list[list[Reply]] = []
        order = sorted(range(len(replies)), key=lambda i: (replies[i].prompt.length, replies[i].prompt.shared, i))
        for index in order:
            reply = replies[index]
            rows = len(batches[-1]) + 1 if batches else 1
            limit = max([reply.limit, *(other.limit for other in batches[-1])]) if batches else reply.limit
            # prompts come in ascending length, so this one is the longest
            size = rows * (reply.prompt.length + limit) * self._budgets.kv_bytes_per_token
            if not batches or rows > self._max_rows or size > self._budgets.kv_bytes:
                batches.append([])
            batches[-1].append(reply)
        return batches

    def _write(self, replies: list[Reply], prefixes: Sequence[Chunk | None]) -> None:
        rows = [Row(prefix, reply.prompt.rest) for prefix, reply in zip(prefixes, replies, strict=True)]
        extra = max(reply.limit for reply in replies)
        with torch.inference_mode():
            state = self._runner.forward(rows, extra=extra)
            last = torch.tensor([len(row.tokens) - 1 for row in rows], device=state.hidden.device)
            logits = self._head.logits(state.hidden[torch.arange(len(rows), device=last.device), last])
            visible = _visible(rows, state, extra)
            positions = torch.tensor([row.start + len(row.tokens) for row in rows])
            live = list(replies)
            while True:
                tokens = torch.tensor(self._writer.take(logits, live))
                going = [row for row, reply in enumerate(live) if not reply.done]
                if not going:
                    return
                # finished rows are dropped once half the batch is idle: dropping copies the memory of the others
                if 2 * len(going) <= len(live):
                    kept = torch.tensor(going)
                    for layer in state.layers:
                        layer.keep(kept.to(state.hidden.device))
                    live = [live[row] for row in going]
                    tokens, visible, positions = tokens[kept], visible[kept], positions[kept]
                logits = self._head.logits(self._runner.step(state, tokens, positions, visible))
                positions = positions + 1


def _visible(rows: Sequence[Row], state: Continued, extra: int) -> torch.Tensor:
    """(B, columns) bool: what a reply's tokens may look at in the padded memory; what they write is always seen."""
    visible = torch.ones((len(rows), state.prefix_width + state.width + extra), dtype=torch.bool)
    for index, row in enumerate(rows):
        visible[index, row.start : state.prefix_width] = False
        visible[index, state.prefix_width + len(row.tokens) : state.prefix_width + state.width] = False
    return visible


class PlainDecoder:
    """Writes replies one at a time with the model's own cache: slow, and right for every architecture."""

    def __init__(self, model: Any, device: torch.device, writer: ReplyWriter) -> None:
        self._model = model
        self._device = device
        self._writer = writer

    def write(self, replies: Sequence[Reply]) -> None:
        """Finish all replies in place."""
        for reply in replies:
            ids = list(reply.prompt.ids)
            fed: dict[str, Any] = {"input_ids": torch.tensor([ids], device=self._device)}
            with torch.inference_mode():
                while not reply.done:
                    output = self._model(**fed, use_cache=True)
                    (token,) = self._writer.take(output.logits[:, -1].float(), [reply])
                    ids.append(token)
                    past = getattr(output, "past_key_values", None)
                    fed = {"input_ids": torch.tensor([[token] if past is not None else ids], device=self._device)}
                    if past is not None:
                        fed["past_key_values"] = past
