"""Log-probabilities of choices: whole batches of questions, packed behind the prefixes they share.

Per prefix one trie holds all its questions and the inner nodes of their choices (`token_trie`); one forward pass over
the trie gives every row that is read. The result equals one forward pass per prompt and choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from el4ner.engines.base import FloatArray
from el4ner.engines.chat import PromptTokens, TokenIds
from el4ner.engines.head import Head
from el4ner.engines.prefix_cache import PrefixRunner, Row
from el4ner.engines.repeated import RepeatedCache
from el4ner.engines.token_trie import ChoicePlan, TokenTrie, plan_choices


@dataclass(frozen=True, slots=True)
class Question:
    """A tokenised `Choose`. over_choices: normalise at each trie node over its children only."""

    prompt: PromptTokens
    choices: tuple[TokenIds, ...]
    over_choices: bool


@dataclass(slots=True)
class _Pack:
    """One trie behind one prefix: a row of a batch, and whose questions it answers."""

    path: tuple[TokenIds, ...]
    trie: TokenTrie = field(default_factory=TokenTrie)
    plans: list[tuple[int, ChoicePlan]] = field(default_factory=list)

    @property
    def start(self) -> int:
        return sum(len(part) for part in self.path)


@dataclass(frozen=True, slots=True)
class Budgets:
    """How much runs at once. pack_tokens: nodes per trie; forward_tokens: padded nodes per forward pass;
    kv_bytes: keys and values of the prefixes in use; kv_bytes_per_token: what one token takes."""

    pack_tokens: int
    forward_tokens: int
    kv_bytes: int
    kv_bytes_per_token: int


class ChoiceScorer:
    """Answers questions with one model. end_tokens: ids whose logits stand for "the answer ends here".

    computed: per question of the last call, the prompt tokens that were computed for it; what questions share is
    charged to the first of them.
    """

    def __init__(self, runner: PrefixRunner, head: Head, end_tokens: Sequence[int], budgets: Budgets) -> None:
        self._runner = runner
        self._head = head
        self._end_tokens = tuple(end_tokens)
        self._budgets = budgets
        self.computed: list[int] = []

    def score(self, questions: Sequence[Question]) -> list[FloatArray]:
        """Per question one log-probability (f32) for every choice."""
        results: list[FloatArray] = [np.zeros(0, dtype=np.float32) for _ in questions]
        self.computed = [0] * len(questions)
        packs = self._pack(questions)
        for chunk in self._chunks(packs):
            self._run(chunk, questions, results)
        return results

    def _pack(self, questions: Sequence[Question]) -> list[_Pack]:
        """One trie or more per prefix, in the order of the prefixes' tokens, so that relatives are neighbours."""
        open_packs: dict[tuple[TokenIds, ...], _Pack] = {}
        packs: list[_Pack] = []
        for index, question in enumerate(questions):
            path = question.prompt.shared
            pack = open_packs.get(path)
            if pack is None or (
                len(pack.trie) and len(pack.trie) + pack.trie.missing(question.prompt.rest) > self._budgets.pack_tokens
            ):
                pack = open_packs[path] = _Pack(path)
                packs.append(pack)
            self.computed[index] += pack.trie.missing(question.prompt.rest)
            pack.plans.append((index, plan_choices(pack.trie, question.prompt.rest, question.choices)))
        return sorted(packs, key=lambda pack: pack.path)

    def _chunks(self, packs: list[_Pack]) -> list[list[_Pack]]:
        """Neighbouring packs whose prefixes fit into memory together."""
        chunks: list[list[_Pack]] = []
        used = 0
        last: tuple[TokenIds, ...] | None = None
        for pack in packs:
            need = 0 if pack.path == last else pack.start * self._budgets.kv_bytes_per_token
            if not chunks or used + need > self._budgets.kv_bytes:
                chunks.append([])
                used = 0
            chunks[-1].append(pack)
            used, last = used + need, pack.path
        return chunks

    def _run(self, packs: list[_Pack], questions: Sequence[Question], results: list[FloatArray]) -> None:
        prefixes = self._runner.prefixes([pack.path for pack in packs])
        for pack in packs:
            self.computed[pack.plans[0][0]] += self._runner.spent_on(pack.path)
        for batch in self._batches(packs):
            rows = [
                Row(prefixes[index], packs[index].trie.tokens, packs[index].trie.depths, packs[index].trie.ancestors())
                for index in batch
            ]
            hidden = self._runner.forward(rows).hidden
            for position, index in enumerate(batch):
                self._answer(hidden[position], packs[index], questions, results)

    def _batches(self, packs: list[_Pack]) -> list[list[int]]:
        """Packs of like size, within the budget of padded nodes and prefix memory; each alone if prefixes are."""
        if self._runner.single_rows:
            return [[index] for index in range(len(packs))]
        budgets = self._budgets
        batches: list[list[int]] = []
        widest_prefix = width = 0
        for index in sorted(range(len(packs)), key=lambda i: (len(packs[i].trie), packs[i].start, i)):
            pack = packs[index]
            rows = len(batches[-1]) + 1 if batches else 1
            nodes, start = max(width, len(pack.trie)), max(widest_prefix, pack.start)
            fits = (
                rows * nodes <= budgets.forward_tokens
                and rows * (start + nodes) * budgets.kv_bytes_per_token <= budgets.kv_bytes
            )
            if not batches or not fits:
                batches.append([])
                nodes, start = len(pack.trie), pack.start
            batches[-1].append(index)
            width, widest_prefix = nodes, start
        return batches

    def _answer(
        self, hidden: torch.Tensor, pack: _Pack, questions: Sequence[Question], results: list[FloatArray]
    ) -> None:
        """hidden (N, D) of one trie -> the scores of its questions."""
        reads = needed_reads(pack.plans, questions, self._end_tokens)
        if not reads:
            return
        vocab = vocabulary_nodes(pack.plans, questions)
        over_vocab = {node: tokens for node, tokens in reads.items() if node in vocab}
        over_choices = {node: tokens for node, tokens in reads.items() if node not in vocab}
        logp = self._read(hidden, over_vocab, "vocab") | self._read(hidden, over_choices, "choices")
        for index, plan in pack.plans:
            results[index] = choice_scores(plan, questions[index].over_choices, logp, self._end_tokens)

    def _read(
        self, hidden: torch.Tensor, reads: dict[int, list[int]], normalise: Literal["vocab", "choices"]
    ) -> dict[tuple[int, int], float]:
        """(node, token) -> log-probability, normalised at each node over the vocabulary or over the tokens read."""
        if not reads:
            return {}
        ids = np.full((len(reads), max(map(len, reads.values()))), -1, dtype=np.int64)
        for row, tokens in zip(ids, reads.values(), strict=True):
            row[: len(tokens)] = tokens
        with torch.inference_mode():
            rows = hidden[torch.tensor(list(reads), device=hidden.device)]
            found = self._head.log_probabilities(rows, ids, normalise)
        return {
            (node, token): float(value)
            for (node, tokens), values in zip(reads.items(), found, strict=True)
            for token, value in zip(tokens, values, strict=False)
        }


class PlainScorer:
    """Answers questions one prompt at a time with the whole model: slower, and right for every architecture.

    Questions with one prefix share it where the model's cache can be copied. run_tokens, computed: as elsewhere.
    """

    def __init__(self, repeated: RepeatedCache, end_tokens: Sequence[int]) -> None:
        self._repeated = repeated
        self._end_tokens = tuple(end_tokens)
        self.run_tokens = 0
        self.computed: list[int] = []

    def score(self, questions: Sequence[Question]) -> list[FloatArray]:
        """Per question one log-probability (f32) for every choice."""
        results: list[FloatArray] = [np.zeros(0, dtype=np.float32) for _ in questions]
        self.computed = [0] * len(questions)
        begun = self._repeated.run_tokens
        for index in sorted(range(len(questions)), key=lambda i: (questions[i].prompt.shared, i)):
            before = self._repeated.run_tokens
            results[index] = self._answer(questions[index])
            self.computed[index] = min(self._repeated.run_tokens - before, questions[index].prompt.length)
        self.run_tokens = self._repeated.run_tokens - begun
        return results

    def _answer(self, question: Question) -> FloatArray:
        trie = TokenTrie()
        plan = plan_choices(trie, question.prompt.rest, question.choices)
        shared = [token for part in question.prompt.shared for token in part]
        reads = needed_reads([(0, plan)], [question], self._end_tokens)
        logp: dict[tuple[int, int], float] = {}
        nodes = set(reads)
        inner = {trie.parents[node] for node in range(len(trie))}
        for leaf in sorted(nodes - (inner & nodes)):
            path = _path(trie, leaf)
            rows, _ = self._repeated.run(shared, [trie.tokens[node] for node in path], len(path))
            for node, row in zip(path, rows.double().cpu(), strict=True):
                known = row.log_softmax(-1)
                logp.update({(node, token): float(known[token]) for token in reads.get(node, ())})
        return choice_scores(plan, question.over_choices, logp, self._end_tokens)


def _path(trie: TokenTrie, node: int) -> list[int]:
    path = [node]
    while trie.parents[path[-1]] >= 0:
        path.append(trie.parents[path[-1]])
    return path[::-1]


def needed_reads(
    plans: Sequence[tuple[int, ChoicePlan]], questions: Sequence[Question], end_tokens: Sequence[int]
) -> dict[int, list[int]]:
    """node -> the tokens whose probability after it is needed, each once."""
    reads: dict[int, dict[int, None]] = {}
    for index, plan in plans:
        for pairs in plan.steps:
            for node, token in pairs:
                reads.setdefault(node, {})[token] = None
        if questions[index].over_choices:
            for node in plan.ends.values():
                reads.setdefault(node, {}).update(dict.fromkeys(end_tokens))
    return {node: list(tokens) for node, tokens in reads.items()}


def vocabulary_nodes(plans: Sequence[tuple[int, ChoicePlan]], questions: Sequence[Question]) -> set[int]:
    """Nodes whose whole vocabulary has to be summed."""
    steps = (pairs for index, plan in plans if not questions[index].over_choices for pairs in plan.steps)
    return {node for pairs in steps for node, _ in pairs}


def choice_scores(
    plan: ChoicePlan, over_choices: bool, logp: dict[tuple[int, int], float], end_tokens: Sequence[int]
) -> FloatArray:
    """Log-probabilities (n_choices,) f32 from those of the tokens that were read."""
    if over_choices:
        return np.asarray(over_children(plan, logp, end_tokens), dtype=np.float32)
    return np.asarray([sum(logp[pair] for pair in pairs) for pairs in plan.steps], dtype=np.float32)


def over_children(plan: ChoicePlan, logit: dict[tuple[int, int], float], end_tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of a question's choices, normalised at each node over the choices' next tokens there.

    logit: (node, token) -> logit or log-probability; what is the same for all tokens of a node drops out.
    Where a choice ends and another goes on, ending competes too, with the log-sum-exp of the end tokens' logits.
    Choices with the same tokens share their probability equally, so that the probabilities sum to one.
    """
    children: dict[int, dict[int, float]] = {}
    for pairs in plan.steps:
        for node, token in pairs:
            children.setdefault(node, {})[token] = logit[(node, token)]
    ending = {node: _log_sum_exp([logit[(node, token)] for token in end_tokens]) for node in plan.ends.values()}
    total = {
        node: _log_sum_exp([*values.values(), *([ending[node]] if node in ending else [])])
        for node, values in children.items()
    }
    twins = [sum(1 for other in plan.steps if other == pairs) for pairs in plan.steps]
    scores = []
    for position, pairs in enumerate(plan.steps):
        score = sum(children[node][token] - total[node] for node, token in pairs)
        if position in plan.ends:
            node = plan.ends[position]
            score += ending[node] - total[node]
        scores.append(score - math.log(twins[position]))
    return scores


def _log_sum_exp(values: Sequence[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))
