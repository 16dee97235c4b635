"""Replies that are being written side by side: lanes behind prefixes, and the memory that they write to.

The memory has a row for each prefix: its keys and values, those of the prompts' ends behind it, and columns that lanes
take as they go and give back for drafts that were wrong and when they are done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from el4ner.engines.drafts import Lookup
from el4ner.engines.prefix_cache import Chunk, Continued, Row
from el4ner.engines.ragged import Layout, Step


@dataclass(eq=False, slots=True)
class Lane:
    """One reply. row: of the memory. prompt (P,) bool: the columns of its prompt. position: of the next token. prefix:
    what its prompt begins with.

    fed: the next token, and drafts of those after it; columns: where they are written. own: columns of what it wrote.
    """

    row: int
    prompt: NDArray[np.bool_]
    position: int
    lookup: Lookup
    prefix: Chunk | None = None
    fed: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)

    def keep(self, n: int) -> list[int]:
        """The first n of the tokens fed belong to the reply; returns the columns of the others."""
        self.own += self.columns[:n]
        self.position += n
        wrong = self.columns[n:]
        self.fed, self.columns = [], []
        return wrong


def begin_lane(r: int, row: Row, end: int, state: Continued, tokens: Sequence[int]) -> Lane:
    """The lane of a reply to the prompt `tokens`, which ends at the node `end` of the trie in row `r`."""
    assert row.depths is not None and row.sees is not None  # noqa: PT018  # made of a trie
    prompt = np.zeros(state.prefix_width + state.width, dtype=bool)
    prompt[: row.start] = True
    prompt[state.prefix_width : state.prefix_width + len(row.tokens)] = row.sees[end]
    return Lane(r, prompt, row.start + row.depths[end] + 1, Lookup(tokens), row.prefix)


class LaneMemory:
    """Which columns of the memory are free, row by row. The last one is nobody's: where rows are padded, padding is
    written there.

    Where they are used up lanes get twice as many, at most those that were laid out.
    """

    def __init__(self, state: Continued, n_rows: int) -> None:
        self._state = state
        self._begin = state.prefix_width + state.width
        self._free: list[list[int]] = [[*range(self._begin, state.capacity - 1)] for _ in range(n_rows)]

    def take(self, lanes: Sequence[Lane]) -> None:
        """Columns for what the lanes are fed; the memory grows where a row has too few."""
        needed = Counter[int]()
        for lane in lanes:
            needed[lane.row] += len(lane.fed)
        short = max(count - len(self._free[row]) for row, count in needed.items())
        if short > 0:
            old = self._state.capacity
            self._state.grow(min(old + max(short, old - self._begin), self._state.most))
            for own in self._free:
                own += range(old - 1, self._state.capacity - 1)
        for lane in lanes:
            own = self._free[lane.row]
            lane.columns, own[: len(lane.fed)] = own[: len(lane.fed)], []

    def give(self, row: int, columns: Sequence[int]) -> None:
        """Columns that are free again."""
        self._free[row] += columns

    def drop(self, lanes: Sequence[Lane]) -> None:
        """Leave out rows without a lane once they are half of all: the others move to the front."""
        rows = sorted({lane.row for lane in lanes})
        if 2 * len(rows) > len(self._free):
            return
        self._state.keep(rows)
        self._free = [self._free[row] for row in rows]
        for lane in lanes:
            lane.row = rows.index(lane.row)

    def step(self, lanes: Sequence[Lane]) -> Step:
        """The pass over what the lanes are fed, lane by lane; visible is laid out by row. A slot for padding looks at
        the first column: a softmax over nothing is NaN."""
        n_tokens = sum(len(lane.fed) for lane in lanes)
        tokens, positions, columns, rows, slots = (np.zeros(n_tokens, dtype=np.int64) for _ in range(5))
        filled = [0] * len(self._free)
        at = 0
        for lane in lanes:
            own = slice(at, at + len(lane.fed))
            tokens[own], columns[own], rows[own] = lane.fed, lane.columns, lane.row
            offsets = np.arange(len(lane.fed))
            positions[own], slots[own] = lane.position + offsets, filled[lane.row] + offsets
            filled[lane.row] += len(lane.fed)
            at = own.stop
        shape = (len(filled), max(filled))
        visible = np.zeros((*shape, self._state.capacity), dtype=bool)
        visible[:, :, 0] = True
        at = 0
        for lane in lanes:
            for offset in range(len(lane.fed)):
                seen = visible[lane.row, slots[at + offset]]
                seen[: self._begin] = lane.prompt
                seen[[*lane.own, *lane.columns[: offset + 1]]] = True
            at += len(lane.fed)
        made = [torch.from_numpy(array) for array in (tokens, positions, columns, visible, rows, slots)]
        return Step(made[0], made[1], made[2], made[3], Layout(made[4], made[5], shape))
