"""What attention (attention.py) may know of a pass beyond its mask, to compute less.

Steps of writing feed their rows different numbers of tokens. The model sees the tokens of all rows as one row, so that
the products that cost most know no padding; only attention, which a `Layout` tells whose they are, lays them out by
row. Where attention is not el4ner's own the rows are padded instead. And of a pass that is `Causal` the columns behind
a token need not be looked at only to be hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Layout:
    """Which of R rows, and which of its W slots, each of N tokens stands in. rows, slots (N,) i64; shape (R, W)."""

    rows: torch.Tensor
    slots: torch.Tensor
    shape: tuple[int, int]

    def spread(self, tokens: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """(N, ...) -> (R, W, ...), `fill` in slots without a token."""
        laid = tokens.new_full((*self.shape, *tokens.shape[1:]), fill)
        laid[self.rows, self.slots] = tokens
        return laid

    def gather(self, laid: torch.Tensor) -> torch.Tensor:
        """The inverse: (R, W, ...) -> (N, ...)."""
        return laid[self.rows, self.slots]

    def to(self, device: torch.device) -> Layout:
        """The same where a model runs."""
        return Layout(self.rows.to(device), self.slots.to(device), self.shape)


@dataclass(frozen=True, slots=True)
class Causal:
    """A pass whose new token n, counted from 0, sees in no row a column behind `start` + n."""

    start: int


@dataclass(frozen=True, slots=True)
class Step:
    """A pass over N tokens. tokens, positions, columns (N,) i64: what they are, and where in the memory they go.

    visible (R, W, C) bool: the columns that each slot of the layout looks at, its own among them.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    columns: torch.Tensor
    visible: torch.Tensor
    layout: Layout


PassShape = Layout | Causal
"""What is known of a pass beyond its mask."""

_current: ContextVar[PassShape | None] = ContextVar("el4ner_pass", default=None)


def current() -> PassShape | None:
    """The shape of the pass that is being run, None where nothing is known of it."""
    return _current.get()


@contextmanager
def shaped(shape: PassShape | None) -> Iterator[None]:
    """Passes inside have this shape; a variable of the context, as not every architecture hands arguments through."""
    token = _current.set(shape)
    try:
        yield
    finally:
        _current.reset(token)
