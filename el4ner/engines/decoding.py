"""Greedy decoding in batches, behind cached prefixes, each row free or bound to its own grammar.

A reply is one line: blank lines before it are passed over, and it ends at the next line break, at an end-of-turn or any
other control token, or at its token limit; a list also where it goes round in circles. Only generated ids are decoded;
the prompt never passes through the tokenizer's decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from el4ner.engines.chat import PromptTokens, TokenIds
from el4ner.engines.grammar import RowGrammar, allowed_tokens
from el4ner.engines.head import Head
from el4ner.engines.lanes import Lane, LaneMemory, begin_lane
from el4ner.engines.prefix_cache import Chunk, PrefixRunner, Row
from el4ner.engines.repeated import RepeatedCache
from el4ner.engines.scoring import Budgets
from el4ner.engines.token_trie import TokenTrie

_LEAST_SPARE = 48
"""Columns for what a row's replies write, at least."""
_LEAST_DRAFT, _LONGEST_DRAFT = 2, 16
"""Tokens of a draft: as many where many replies are written; at most. Two of three drafted tokens were right (grounded
lists of the embedded model over WNUT17), and one costs about 0.4 of a token that is read alone, so two always pay."""

SETTLE_SHARE = 3e-6
"""How near two logits are that a pass of their reply alone settles in float32, as a share of the most that a logit can
be there (norms of the state and of the widest row of the head). Other replies beside moved logits by at most 2.2e-7 of
it with the embedded model (518 steps of lists over WNUT17), by 2.4e-7 and 3.4e-7 with random models of 0.5 and 1.1
billion parameters (EPYC Zen 4, torch 2.13, 2026-11); 0.2% of the embedded model's tokens are settled so."""


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


Logits = Callable[[Sequence[int], torch.Tensor | None], torch.Tensor]
"""What gives logits of some of B replies, R of them: of some tokens (T,) i64 as (R, T), of all as (R, V)."""


@dataclass(frozen=True, slots=True)
class Settle:
    """Decides between tokens that are so near that passes of other replies might. margins (B,) f32: how near, in
    logits. alone: a reply's logits from a pass over nothing but its prompt and what it wrote."""

    margins: torch.Tensor
    alone: Callable[[Reply], Logits]


class Scores:
    """Logits behind N hidden states (N, D). Those of all tokens are computed once for all of them."""

    def __init__(self, head: Head, hidden: torch.Tensor) -> None:
        self._head = head
        self._hidden = hidden
        self._all: torch.Tensor | None = None
        self._norms: torch.Tensor | None = None

    def norms(self, places: Sequence[int]) -> torch.Tensor:
        """Euclidean norms (B,) of the hidden states of some replies."""
        if self._norms is None:
            self._norms = self._hidden.norm(dim=-1)
        return self._norms[list(places)]

    def at(self, places: Sequence[int]) -> Logits:
        """Of the hidden states of some replies."""

        def logits(rows: Sequence[int], tokens: torch.Tensor | None) -> torch.Tensor:
            own = [places[row] for row in rows]
            if tokens is not None:
                return self._head.logits(self._hidden[own], tokens)
            if self._all is None:
                self._all = self._head.logits(self._hidden)
            return self._all[own]

        return logits


class ReplyWriter:
    """Chooses the next token of each reply and knows when it ends."""

    def __init__(self, tokenizer: Any, end_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stops = frozenset(end_tokens) | frozenset(tokenizer.all_special_ids)

    def take(self, logits: Logits, replies: Sequence[Reply], settle: Settle | None = None) -> list[int]:
        """The most probable allowed token of each of B replies, which the replies take.

        For those that are bound to grammars only tokens that one of these admits are scored: some hundred to a few
        thousand of all.
        """
        grammars = {row: r.grammar for row, r in enumerate(replies) if r.grammar is not None and not r.done}
        free = [row for row in range(len(replies)) if row not in grammars]
        chosen = [0] * len(replies)
        for rows, bound in ((list(grammars), list(grammars.values())), (free, [])):
            if not rows:
                continue
            best, near = _best(logits, rows, bound, None if settle is None else settle.margins[rows])
            for row, token, is_near in zip(rows, best, near, strict=True):
                chosen[row] = token
                if settle is not None and is_near and not replies[row].done:
                    own = [grammars[row]] if row in grammars else []
                    chosen[row] = _best(settle.alone(replies[row]), [0], own, None)[0][0]
        for reply, token in zip(replies, chosen, strict=True):
            if not reply.done:
                self._take(reply, token)
        return chosen

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
        elif reply.grammar is not None and (reply.grammar.finished or _loops(reply, reply.grammar)):
            reply.done = True
        elif reply.generated >= reply.limit:
            reply.done = reply.truncated = True


def _best(
    logits: Logits, rows: Sequence[int], grammars: Sequence[RowGrammar], margins: torch.Tensor | None
) -> tuple[list[int], list[bool]]:
    """The most probable token of some replies, of those that their grammars admit if they have any; and whether
    another one comes within the margin (R,) of it."""
    if grammars:
        tokens, admits = allowed_tokens(grammars)
        found = logits(rows, torch.from_numpy(tokens))
        found = found.masked_fill(~torch.from_numpy(admits).to(found.device), float("-inf"))
    else:
        tokens = None
        found = logits(rows, None)
    best = found.argmax(-1, keepdim=True)
    near = [False] * len(rows)
    if margins is not None:
        near = ((found >= found.gather(-1, best) - margins[:, None]).sum(-1) > 1).tolist()
    chosen = best[:, 0].tolist()
    return chosen if tokens is None else [int(tokens[i]) for i in chosen], near


class BatchDecoder:
    """Writes replies with packed prefixes. max_replies: replies written at once. step_tokens: tokens of a step that
    drafts fill up where few replies are left. margin_per_norm: how near two tokens' logits must be, per unit of the
    hidden state's norm, for a pass of their reply alone to decide, so that what is written beside cannot; 0 for never.

    Replies with the same prefix are lanes of one row: their prompts' ends form a trie behind it, and every step adds
    tokens to each of them, so that the prefix's keys and values lie in memory once and are read once a step.
    steps, drafted, right: passes after the prompts, drafted tokens read in them, those of them that were written.
    settled: tokens of passes that decided.
    """

    def __init__(
        self, runner: PrefixRunner, head: Head, writer: ReplyWriter, budgets: Budgets, max_replies: int,
        step_tokens: int, *, margin_per_norm: float = 0.0,
    ) -> None:  # fmt: skip
        self._runner = runner
        self._head = head
        self._writer = writer
        self._budgets = budgets
        self._max_replies = max_replies
        self._step_tokens = step_tokens
        self._margin_per_norm = margin_per_norm
        self.steps = 0
        self.drafted = 0
        self.right = 0
        self.settled = 0

    def write(self, replies: Sequence[Reply]) -> None:
        """Finish all replies in place."""
        for rows in self._batches(replies):
            prefixes = self._runner.prefixes([row[0].prompt.shared for row in rows])
            for row in rows:
                row[0].computed += self._runner.spent_on(row[0].prompt.shared)
            with torch.inference_mode():
                self._write(rows, prefixes)

    def _batches(self, replies: Sequence[Reply]) -> list[list[list[Reply]]]:
        """Batches of rows of replies with one prefix, of like length, within the budgets of memory and replies.

        Replies are taken to use half of their limits; few do. There is room for all of it, which on a CPU takes memory
        only where it is used.
        """
        by_prefix: dict[tuple[TokenIds, ...], list[Reply]] = {}
        for reply in replies:
            by_prefix.setdefault(reply.prompt.shared, []).append(reply)
        size = max(1, self._max_replies)
        rows = [own[i : i + size] for own in by_prefix.values() for i in range(0, len(own), size)]
        batches: list[list[list[Reply]]] = []
        for row in sorted(rows, key=lambda own: (_longest(own), own[0].prompt.shared)):
            trial = [*batches[-1], row] if batches else [row]
            width = max(len(own) for own in trial)
            columns = _longest(row) + width * max(reply.limit for own in trial for reply in own) // 2
            memory = len(trial) * columns * self._budgets.kv_bytes_per_token
            if not batches or len(trial) * width > self._max_replies or memory > self._budgets.kv_bytes:
                batches.append([row])
            else:
                batches[-1] = trial
        return batches

    def _write(self, rows: list[list[Reply]], prefixes: Sequence[Chunk | None]) -> None:
        inputs: list[Row] = []
        ends: list[list[int]] = []
        for row, prefix in zip(rows, prefixes, strict=True):
            trie = TokenTrie()
            ends.append([])
            for own in row:
                own.computed += trie.missing(own.prompt.rest)
                ends[-1].append(trie.insert(own.prompt.rest))
            inputs.append(Row(prefix, trie.tokens, trie.depths, trie.ancestors()))
        state = self._runner.forward(inputs, _spare(rows), most=_most(rows))
        memory = LaneMemory(state, len(rows))
        going = [
            (begin_lane(r, inputs[r], end, state, reply.prompt.ids), reply)
            for r, row in enumerate(rows)
            for reply, end in zip(row, ends[r], strict=True)
        ]
        hidden = state.hidden[[lane.row for lane, _ in going], [end for own in ends for end in own]]
        self._choose(Scores(self._head, hidden), range(len(going)), going)
        while going := [(lane, reply) for lane, reply in going if not reply.done]:
            lanes = [lane for lane, _ in going]
            memory.drop(lanes)
            self._feed(going)
            memory.take(lanes)
            step = memory.step(lanes)
            self._accept(going, Scores(self._head, self._runner.step(state, step)), memory)
            self.steps += 1

    def _choose(self, scores: Scores, places: Sequence[int], going: Sequence[tuple[Lane, Reply]]) -> list[int]:
        """The next tokens of replies whose hidden states stand at these places."""
        settle = None
        if self._margin_per_norm:
            prefix_of = {id(reply): lane.prefix for lane, reply in going}
            margins = scores.norms(places) * self._margin_per_norm
            settle = Settle(margins, lambda reply: self._alone(reply, prefix_of[id(reply)]))
        return self._writer.take(scores.at(places), [reply for _, reply in going], settle)

    def _alone(self, reply: Reply, prefix: Chunk | None) -> Logits:
        row = Row(prefix, (*reply.prompt.rest, *reply.tokens))
        self.settled += len(row.tokens)
        return Scores(self._head, self._runner.forward([row]).hidden[0, -1:]).at([0])

    def _feed(self, going: Sequence[tuple[Lane, Reply]]) -> None:
        """Every lane takes its reply's last token, and a draft of what follows as far as there is room in the step."""
        share = min(max(self._step_tokens // len(going) - 1, _LEAST_DRAFT), _LONGEST_DRAFT)
        for lane, reply in going:
            lane.lookup.add(reply.tokens[-1])
            draft = lane.lookup.draft(min(share, reply.limit - reply.generated - 1))
            if reply.grammar is not None and draft:
                draft = draft[: reply.grammar.valid(draft)]
            lane.fed = [reply.tokens[-1], *draft]
            self.drafted += len(draft)

    def _accept(self, going: Sequence[tuple[Lane, Reply]], scores: Scores, memory: LaneMemory) -> None:
        """Scores lane by lane. Replies take tokens for as long as their drafts are what they take."""
        begin = np.cumsum([0, *(len(lane.fed) for lane, _ in going)])
        taking = list(range(len(going)))
        read = 0
        while taking:
            chosen = self._choose(scores, [int(begin[i]) + read for i in taking], [going[i] for i in taking])
            read += 1
            follow = []
            for i, token in zip(taking, chosen, strict=True):
                lane, reply = going[i]
                if not reply.done and read < len(lane.fed) and token == lane.fed[read]:
                    lane.lookup.add(token)
                    follow.append(i)
                    continue
                self.right += read - 1
                memory.give(lane.row, lane.keep(read))
                if reply.done:
                    memory.give(lane.row, lane.own)
            taking = follow


def _longest(replies: Sequence[Reply]) -> int:
    """Tokens of the longest prompt, and of all that is written behind the shared prefix before the replies."""
    shared = sum(len(part) for part in replies[0].prompt.shared)
    return shared + sum(len(reply.prompt.rest) for reply in replies)


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
                    (token,) = self._writer.take(_given(logits.reshape(1, -1)), [reply])
                    if reply.done:
                        break
                    ids.append(token)
                    logits, past = self._repeated.follow(ids if past is None else [token], past)


def _loops(reply: Reply, grammar: RowGrammar) -> bool:
    """Whether a list goes round in circles; then the reply is what it says before that."""
    listed = grammar.grammar.before_a_loop(reply.text)
    if listed is not None:
        reply.text = listed
    return listed is not None


def _given(logits: torch.Tensor) -> Logits:
    """Logits (B, V) that are there."""
    return lambda rows, tokens: (
        logits[list(rows)] if tokens is None else logits[list(rows)][:, tokens.to(logits.device)]
    )


def _spare(rows: Sequence[Sequence[Reply]]) -> int:
    """Columns that a row's lanes share at first: what replies are taken to use, half of their limits."""
    return min(max(_LEAST_SPARE, _most(rows) // 2), _most(rows))


def _most(rows: Sequence[Sequence[Reply]]) -> int:
    """Columns that a row's lanes can use: all their tokens, and one for padding."""
    return max(sum(reply.limit for reply in row) for row in rows) + 1
