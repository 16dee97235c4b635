"""Questions about one prefix, packed: a trie over their tokens, and where in it each choice is read off.

Pure bookkeeping, no model. Tokens that several questions share stand in the trie once; a node sees its ancestors only
(and the whole prefix), so its hidden state equals that of the same tokens run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from el4ner.engines.chat import TokenIds


@dataclass(slots=True)
class ChoicePlan:
    """Where the log-probabilities of one request come from.

    steps: per choice its (node, token) pairs; the choice's score is the sum of log p(token | node).
    ends: nodes at which a choice ends although another one goes on.
    """

    steps: list[list[tuple[int, int]]]
    ends: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class TokenTrie:
    """Nodes in the order they were added, so that a parent comes before its children.

    tokens, parents, depths: one entry per node; parents are -1 and depths 0 right after the prefix.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def insert(self, ids: Sequence[int], node: int = -1) -> int:
        """Follow `ids` from `node`, adding what is missing; returns the last node."""
        for token in ids:
            child = self._children.get((node, token))
            if child is None:
                child = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(0 if node < 0 else self.depths[node] + 1)
                self._children[(node, token)] = child
            node = child
        return node

    def missing(self, ids: Sequence[int]) -> int:
        """How many nodes inserting `ids` from the prefix would add."""
        node = -1
        for position, token in enumerate(ids):
            child = self._children.get((node, token))
            if child is None:
                return len(ids) - position
            node = child
        return 0

    def ancestors(self) -> NDArray[np.bool_]:
        """(N, N): whether node i may see node j, which is when j is i or one of its ancestors."""
        size = len(self.tokens)
        sees = np.zeros((size, size), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node, : parent + 1] = sees[parent, : parent + 1]
            sees[node, node] = True
        return sees


def plan_choices(trie: TokenTrie, rest: TokenIds, choices: Sequence[TokenIds]) -> ChoicePlan:
    """Put a question and the inner nodes of its choices' own trie into `trie`.

    The last token of a choice needs no node: nothing is read after it.
    """
    start = trie.insert(rest)
    steps = []
    for choice in choices:
        node, pairs = start, []
        for position, token in enumerate(choice):
            pairs.append((node, token))
            if position + 1 < len(choice):
                node = trie.insert((token,), node)
        steps.append(pairs)
    return ChoicePlan(steps, _ends(choices, steps))


def _ends(choices: Sequence[TokenIds], steps: Sequence[list[tuple[int, int]]]) -> dict[int, int]:
    """choice -> node, for choices that are a proper prefix of another: the node after their last token."""
    ends = {}
    for position, choice in enumerate(choices):
        for other, pairs in zip(choices, steps, strict=True):
            if len(other) > len(choice) and other[: len(choice)] == choice:
                ends[position] = pairs[len(choice)][0]
                break
    return ends
