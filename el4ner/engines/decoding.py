"""Greedy decoding in batches, behind cached prefixes, each row free or bound to its own grammar.

A reply is one line: blank lines before it are passed over, and it ends at the next line break, at an end-of-turn or any
other control token, or at its token limit. Only generated ids are decoded; the prompt never passes through the
tokenizer's decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from el4ner.engines.chat import PromptTokens, TokenIds
from el4ner.engines.grammar import RowGrammar
from el4ner.engines.head import Head
from el4ner.engines.prefix_cache import Chunk, Continued, PrefixRunner, Row
from el4ner.engines.repeated import RepeatedCache
from el4ner.engines.scoring import Budgets
from el4ner.engines.token_trie import TokenTrie


@dataclass(slots=True)
class Reply:
    """A reply being written. tokens: ids so far, without the control token that ended it.

    computed: prompt tokens computed for it; what replies share is charged to the first of them.
    """

    prompt: PromptTokens
    limit: int
    grammar: RowGrammar | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    generated: int = 0
    done: bool = False
    truncated: bool = False
    computed: int = 0

    def restart(self) -> None:
        """Forget what was written."""
        self.tokens, self.text, self.generated, self.computed = [], "", 0, 0
        self.done = self.truncated = False
        if self.grammar is not None:
            self.grammar.restart()


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
        while "\n" in reply.text and not reply.text.partition("\n")[0].strip():
            reply.text = reply.text.partition("\n")[2]
        if "\n" in reply.text:
            reply.text = reply.text.partition("\n")[0]
            reply.done = True
        elif reply.grammar is not None and reply.grammar.finished:
            reply.done = True
        elif reply.generated >= reply.limit:
            reply.done = reply.truncated = True


@dataclass(slots=True)
class _Lanes:
    """The replies being written behind R prefixes, up to W side by side behind each.

    table (R, W): which reply, -1 for none. tokens, positions (R, W): the token each lane takes next, and where.
    visible (R, W, C) bool: the columns of the memory that each lane may look at.
    """

    table: NDArray[np.int64]
    tokens: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor

    def gather(self, rows: torch.Tensor, order: torch.Tensor) -> None:
        """Keep these rows, and of each the lanes in `order` (R', W')."""
        self.table = np.take_along_axis(self.table[rows.numpy()], order.numpy(), axis=1)
        self.tokens = self.tokens[rows].gather(1, order)
        self.positions = self.positions[rows].gather(1, order)
        self.visible = self.visible[rows[:, None], order]


class BatchDecoder:
    """Writes replies with packed prefixes. max_replies: replies written at once.

    Replies with the same prefix are lanes of one row: their prompts' ends form a trie behind it, and every step adds a
    token to each of them, so that the prefix's keys and values lie in memory once and are read once a step.
    """

    def __init__(
        self, runner: PrefixRunner, head: Head, writer: ReplyWriter, budgets: Budgets, max_replies: int
    ) -> None:
        self._runner = runner
        self._head = head
        self._writer = writer
        self._budgets = budgets
        self._max_replies = max_replies

    def write(self, replies: Sequence[Reply]) -> None:
        """Finish all replies in place."""
        for rows in self._batches(replies):
            prefixes = self._runner.prefixes([row[0].prompt.shared for row in rows])
            for row in rows:
                row[0].computed += self._runner.spent_on(row[0].prompt.shared)
            self._write(rows, prefixes)

    def _batches(self, replies: Sequence[Reply]) -> list[list[list[Reply]]]:
        """Batches of rows of replies with one prefix, of like length, within the budgets of memory and replies."""
        by_prefix: dict[tuple[TokenIds, ...], list[Reply]] = {}
        for reply in replies:
            by_prefix.setdefault(reply.prompt.shared, []).append(reply)
        size = max(1, self._max_replies)
        rows = [own[i : i + size] for own in by_prefix.values() for i in range(0, len(own), size)]
        batches: list[list[list[Reply]]] = []
        for row in sorted(rows, key=lambda own: (_longest(own), own[0].prompt.shared)):
            trial = [*batches[-1], row] if batches else [row]
            width = max(len(own) for own in trial)
            columns = _longest(row) + width * max(reply.limit for own in trial for reply in own)
            memory = len(trial) * columns * self._budgets.kv_bytes_per_token
            if not batches or len(trial) * width > self._max_replies or memory > self._budgets.kv_bytes:
                batches.append([row])
            else:
                batches[-1] = trial
        return batches

    def _write(self, rows: list[list[Reply]], prefixes: Sequence[Chunk | None]) -> None:
        replies = [reply for row in rows for reply in row]
        width = max(len(row) for row in rows)
        tries: list[TokenTrie] = []
        ends: list[list[int]] = []
        for row in rows:
            trie = TokenTrie()
            ends.append([])
            for own in row:
                own.computed += trie.missing(own.prompt.rest)
                ends[-1].append(trie.insert(own.prompt.rest))
            tries.append(trie)
        inputs = [
            Row(prefix, trie.tokens, trie.depths, trie.ancestors())
            for prefix, trie in zip(prefixes, tries, strict=True)
        ]
        extra = width * max(reply.limit for reply in replies)
        with torch.inference_mode():
            state = self._runner.forward(inputs, extra=extra)
            lanes = _lanes(inputs, ends, state, extra)
            row_of = [r for r, last in enumerate(ends) for _ in last]
            logits = self._head.logits(state.hidden[row_of, [end for last in ends for end in last]])
            live = list(range(len(replies)))
            while live:
                chosen = self._writer.take(logits, [replies[i] for i in live])
                places = {int(reply): place for place, reply in np.ndenumerate(lanes.table) if reply >= 0}
                for reply, token in zip(live, chosen, strict=True):
                    lanes.tokens[places[reply]] = token
                    if replies[reply].done:
                        lanes.table[places[reply]] = -1
                if not (lanes.table >= 0).any():
                    return
                self._tighten(lanes, state)
                hidden = self._runner.step(state, lanes.tokens, lanes.positions, lanes.visible)
                lanes.positions += 1
                at = np.nonzero(lanes.table >= 0)
                live = [int(reply) for reply in lanes.table[at]]
                logits = self._head.logits(hidden[at])

    def _tighten(self, lanes: _Lanes, state: Continued) -> None:
        """Close the gaps that finished replies leave.

        Lanes move freely. Rows are dropped once half of them are idle: dropping copies the memory of the others.
        """
        busy = lanes.table >= 0
        going: NDArray[np.bool_] = np.asarray(busy.any(axis=1))
        width = int(busy.sum(axis=1).max())
        rows = torch.arange(len(going))
        if 2 * int(going.sum()) <= len(going):
            rows = torch.from_numpy(np.flatnonzero(going))
            for layer in state.layers:
                layer.keep(rows.to(state.hidden.device))
        elif width == busy.shape[1]:
            return
        order = torch.from_numpy(np.argsort(~busy, axis=1, kind="stable")[rows.numpy(), :width])
        lanes.gather(rows, order)


def _longest(replies: Sequence[Reply]) -> int:
    """Tokens of the longest prompt, and of all that is written behind the shared prefix before the replies."""
    shared = sum(len(part) for part in replies[0].prompt.shared)
    return shared + sum(len(reply.prompt.rest) for reply in replies)


def _lanes(inputs: Sequence[Row], ends: Sequence[Sequence[int]], state: Continued, extra: int) -> _Lanes:
    """The lanes after the prompts have been read; `ends` names the last node of each prompt in its row's trie."""
    n_rows, width = len(inputs), max(len(own) for own in ends)
    table = np.full((n_rows, width), -1, dtype=np.int64)
    positions = torch.zeros((n_rows, width), dtype=torch.long)
    visible = torch.zeros((n_rows, width, state.prefix_width + state.width + extra), dtype=torch.bool)
    # a lane without a reply looks at the first column only: a softmax over nothing is NaN
    visible[:, :, 0] = True
    reply = 0
    for r, (row, own) in enumerate(zip(inputs, ends, strict=True)):
        for w, end in enumerate(own):
            table[r, w] = reply
            reply += 1
            assert row.depths is not None and row.sees is not None  # noqa: PT018
            positions[r, w] = row.start + row.depths[end] + 1
            visible[r, w, 0] = False
            visible[r, w, : row.start] = True
            begin = state.prefix_width
            visible[r, w, begin : begin + len(row.tokens)] = torch.from_numpy(row.sees[end])
    return _Lanes(table, torch.zeros((n_rows, width), dtype=torch.long), positions, visible)


class PlainDecoder:
    """Writes replies one at a time with the model's own cache: slow, and right for every architecture.

    run_tokens: prompt tokens that were run.
    """

    def __init__(self, repeated: RepeatedCache, writer: ReplyWriter) -> None:
        self._repeated = repeated
        self._writer = writer
        self.run_tokens = 0

    def write(self, replies: Sequence[Reply]) -> None:
        """Finish all replies in place."""
        for reply in sorted(replies, key=lambda own: own.prompt.shared):
            before = self._repeated.run_tokens
            shared = [token for part in reply.prompt.shared for token in part]
            logits, past = self._repeated.run(shared, reply.prompt.rest, 1)
            reply.computed = self._repeated.run_tokens - before
            self.run_tokens += reply.computed
            ids = list(reply.prompt.ids)
            with torch.inference_mode():
                while True:
                    (token,) = self._writer.take(logits.reshape(1, -1), [reply])
                    if reply.done:
                        break
                    ids.append(token)
                    logits, past = self._repeated.follow(ids if past is None else [token], past)
