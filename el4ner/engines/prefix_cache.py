"""Keys and values of prompt prefixes, kept while there is room, and forward passes that continue them.

A prefix is a chain of chunks, each with the chunk before it as parent, so that prompts with the same instruction hold
its keys and values once. What was used longest ago goes first, and a chunk stays as long as another continues it.
"""

from __future__ import annotations

import math
import mmap
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, DynamicLayer

from el4ner.engines.batches import length_batches
from el4ner.engines.chat import TokenIds
from el4ner.engines.ragged import Causal, Step, shaped
from el4ner.engines.states import additive_mask

Path = tuple[TokenIds, ...]
"""The parts of a prefix, each the tokens of a segment."""

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Per block the keys and values (H, T, D) of one chunk."""


@dataclass(eq=False, slots=True)
class Chunk:
    """Keys and values of `tokens`, which follow those of `parent`. length: tokens up to the end of this chunk.

    n_bytes: the memory that it holds, also where columns of earlier chunks stand in it.
    """

    tokens: TokenIds
    parent: Chunk | None
    layers: Layers
    length: int
    key: Path
    n_bytes: int
    followers: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all blocks."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers) // len(self.tokens)

    def chain(self) -> list[Chunk]:
        """This chunk and what it follows, first chunk first."""
        chunks: list[Chunk] = []
        chunk: Chunk | None = self
        while chunk is not None:
            chunks.append(chunk)
            chunk = chunk.parent
        return chunks[::-1]


class PrefixCache:
    """Chunks by the parts up to their end, at most `limit_bytes` of keys and values."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.n_bytes = 0
        self._chunks: OrderedDict[Path, Chunk] = OrderedDict()

    def __len__(self) -> int:
        return len(self._chunks)

    def get(self, key: Path) -> Chunk | None:
        """The chunk that ends the prefix `key`, now the most recently used."""
        chunk = self._chunks.get(key)
        if chunk is None:
            return None
        for used in chunk.chain():  # a prefix was used as recently as what continues it
            if used.key in self._chunks:
                self._chunks.move_to_end(used.key)
        return chunk

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk; drops the least recently used ones that nothing continues."""
        if chunk.key in self._chunks or chunk.n_bytes > self.limit_bytes:
            return
        if chunk.parent is not None and chunk.parent.key not in self._chunks:
            return  # the parent did not fit; a chunk without it could not be dropped in order
        self._chunks[chunk.key] = chunk
        self.n_bytes += chunk.n_bytes
        if chunk.parent is not None:
            chunk.parent.followers += 1
        while self.n_bytes > self.limit_bytes:
            oldest = next((c for c in self._chunks.values() if c.followers == 0 and c is not chunk), None)
            if oldest is None:
                self._drop(chunk)
                return
            self._drop(oldest)

    def _drop(self, chunk: Chunk) -> None:
        del self._chunks[chunk.key]
        self.n_bytes -= chunk.n_bytes
        if chunk.parent is not None:
            chunk.parent.followers -= 1

    def clear(self) -> None:
        """Forget everything."""
        self._chunks.clear()
        self.n_bytes = 0


_MAPPED_BYTES = 1 << 20
"""Memory is mapped from this size on, which is returned as soon as it is free."""


class _Block:
    """One piece of memory for the keys and values of all blocks of a model, up to `columns` of them.

    Many pieces of changing size would leave holes in the heap that nothing fits into. On a CPU what is not written to
    takes no memory, so columns may be asked for that few replies need.
    """

    def __init__(self, n_layers: int, columns: int) -> None:
        self.columns = columns
        self._pieces = 2 * n_layers
        self._memory: torch.Tensor | None = None
        self._taken = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Zeros (B, H, columns, D) for keys or values (B, H, N, D). Zeros, since what a mask hides must be finite."""
        shape = (*like.shape[:2], self.columns, like.shape[3])
        if self._memory is None:
            self._memory = _zeros((self._pieces, *shape), like)
        memory = self._memory
        if self._taken == len(memory) or memory.shape[1:] != shape or memory.dtype != like.dtype:
            return _zeros(shape, like)  # a model whose blocks differ
        self._taken += 1
        return memory[self._taken - 1]


def _zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of the same kind; on a CPU from the system, whose pages are there when they are first written to."""
    n_bytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or n_bytes < _MAPPED_BYTES:
        return like.new_zeros(shape)
    try:
        mapped = mmap.mmap(-1, n_bytes, access=mmap.ACCESS_COPY)  # no shared memory, which some systems limit
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                mapped.madvise(mmap.MADV_NOHUGEPAGE)  # huge pages are there as a whole once one column is written
    except OSError:
        return like.new_zeros(shape)  # or torch's error, which says that memory ran out
    return torch.frombuffer(mapped, dtype=like.dtype).view(shape)


class _Complete(Exception):  # noqa: N818  ends a forward pass, no error
    """Ends a forward pass once the keys and values of its last block are there."""


class _BufferLayer(DynamicLayer):
    """One block's keys and values in memory that is allocated once: prefixes on the left, new tokens behind them.

    transformers' own layer copies everything it holds whenever a token is added.
    """

    keys: torch.Tensor  # None only until the first update
    values: torch.Tensor

    def __init__(self, prefixes: list[Layers], prefix_width: int, capacity: int, block: _Block) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._prefixes = prefixes
        self._width = prefix_width
        self._block = block
        self._whole: tuple[torch.Tensor, torch.Tensor] | None = None
        self.capacity = capacity
        self.filled = 0
        self.ends = False
        """Whether a pass ends once the keys and values of this block are written."""
        self.places: tuple[torch.Tensor, torch.Tensor] | None = None
        """Rows and columns that the next tokens (B, N) are written to, which broadcast to (B, N); None: behind what is
        there."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Memory for (B, H, capacity, D), and the prefixes copied in."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._whole = self._block.take(key_states), self._block.take(value_states)
        self._show(key_states.shape[0])
        for row, chunks in enumerate(self._prefixes):
            at = 0
            for keys, values in chunks:
                self.keys[row, :, at : at + keys.shape[1]] = keys
                self.values[row, :, at : at + keys.shape[1]] = values
                at += keys.shape[1]
        self._prefixes = []
        self.filled = self._width
        self.is_initialized = True

    def _show(self, rows: int) -> None:
        """The first rows, and the columns that are in use."""
        assert self._whole is not None, "there is no memory before the first update"
        self.keys, self.values = (memory[:rows, :, : self.capacity] for memory in self._whole)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens, (B, H, N, D), to their places; returns the whole memory, what is free of it finite.

        The masks cover all of it: products over a part of the columns cost more than the columns that are left out.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.places is not None:
            rows, columns = self.places
            self.keys[rows, :, columns] = key_states.transpose(1, 2)
            self.values[rows, :, columns] = value_states.transpose(1, 2)
            return self.keys, self.values
        end = self.filled + key_states.shape[-2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        if self.ends:
            raise _Complete
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Columns in use, padding included."""
        return self.filled if self.is_initialized else self._width

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in ascending order: they move to the front."""
        for to, row in enumerate(rows):
            if to != row:
                self.keys[to], self.values[to] = self.keys[row], self.values[row]
        self._show(len(rows))

    def grow(self, capacity: int) -> None:
        """More of the columns that were laid out."""
        self.capacity = capacity
        self._show(len(self.keys))


@dataclass(slots=True)
class Continued:
    """A forward pass behind prefixes: hidden states (B, N, D) after the final norm, and the memory it wrote to.

    hidden is (B, 0, 0) where no states were asked for.
    prefix_width, width: columns of the padded prefixes and of the padded new tokens. most: columns it may grow to.
    """

    hidden: torch.Tensor
    cache: Cache
    layers: list[_BufferLayer]
    prefix_width: int
    width: int
    most: int

    @property
    def capacity(self) -> int:
        """Columns of the memory."""
        return self.layers[0].capacity

    def grow(self, capacity: int) -> None:
        """More of the columns that were laid out; there are `most`."""
        assert capacity <= self.most, "more columns than were laid out"
        for layer in self.layers:
            layer.grow(capacity)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the memory, in ascending order."""
        for layer in self.layers:
            layer.keep(rows)


@dataclass(slots=True)
class Row:
    """New tokens behind a prefix. sees (N, N) bool: which new tokens each sees; None: itself and all before."""

    prefix: Chunk | None
    tokens: Sequence[int]
    depths: Sequence[int] | None = None
    sees: NDArray[np.bool_] | None = None

    @property
    def start(self) -> int:
        """Position of the first new token."""
        return self.prefix.length if self.prefix is not None else 0


_FOREIGN = 0.25
"""Columns of earlier chunks for each column of its own with which a chunk still keeps the memory of its pass, not a
copy. The usual instruction is a tenth of what follows it; copying took 6% of the time of `--voters all` (Xeon without
AMX, float32, torch 2.13, 2026-11). What is kept twice counts towards the limit of the cache."""


class PrefixRunner:
    """Runs the backbone of a causal model behind cached prefixes.

    forward_tokens: padded new tokens per forward pass when prefixes are computed. copied_bytes: what the prefixes that
    these continue may take, copied side by side. ragged: steps run without padding, for models whose attention lays
    rows out (`packing.check`). single_rows: every prefix is computed in a pass of its own, so that its numbers depend
    on nothing else; the two limits bound nothing then. Raises what torch raises.
    computed, padded: tokens that `forward` has run so far, without and with padding.
    """

    def __init__(
        self, backbone: Any, device: torch.device, dtype: torch.dtype, cache: PrefixCache, forward_tokens: int,
        copied_bytes: int = 1 << 30, *, ragged: bool = False, single_rows: bool = False,
    ) -> None:  # fmt: skip
        self._backbone = backbone
        self._device = device
        self._dtype = dtype
        self.cache = cache
        self._forward_tokens = forward_tokens
        self._copied_bytes = copied_bytes
        self._ragged = ragged
        self.single_rows = single_rows
        self._n_layers = int(backbone.config.get_text_config().num_hidden_layers)
        self.computed = 0
        self.padded = 0
        self._spent: dict[Path, int] = {}

    def forward(self, rows: Sequence[Row], extra: int = 0, most: int = 0, *, states: bool = True) -> Continued:
        """One forward pass over all rows, padded on the right. extra: columns to leave free behind them; most: columns
        that these may become. states: whether the hidden states are asked for, or keys and values alone."""
        prefix_width = max(row.start for row in rows)
        width = max(len(row.tokens) for row in rows)
        self.computed += sum(len(row.tokens) for row in rows)
        self.padded += len(rows) * width
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        positions = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            n = len(row.tokens)
            ids[index, :n] = torch.tensor(list(row.tokens), dtype=torch.long)
            depths = torch.tensor(list(row.depths)) if row.depths is not None else torch.arange(n)
            positions[index, :n] = depths + row.start
        chains = [row.prefix.chain() if row.prefix is not None else [] for row in rows]
        capacity, block = prefix_width + width + extra, _Block(self._n_layers, prefix_width + width + max(extra, most))
        layers = [
            _BufferLayer([[chunk.layers[n] for chunk in chain] for chain in chains], prefix_width, capacity, block)
            for n in range(self._n_layers)
        ]
        layers[-1].ends = not states
        cache = Cache(layers=list(layers))
        hidden = torch.empty(len(rows), 0, 0)
        causal = Causal(prefix_width) if all(row.sees is None for row in rows) else None
        with torch.inference_mode(), shaped(causal), suppress(_Complete):
            hidden = self._backbone(
                input_ids=ids.to(self._device),
                attention_mask=self._mask(rows, prefix_width, width, extra),
                position_ids=positions.to(self._device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        layers[-1].ends = False
        return Continued(hidden if states else hidden[:, :0, :0], cache, layers, prefix_width, width, block.columns)

    def step(self, state: Continued, step: Step) -> torch.Tensor:
        """N more tokens -> their hidden states after the final norm (N, D)."""
        layout = step.layout.to(self._device)
        tokens, positions, columns = (t.to(self._device) for t in (step.tokens, step.positions, step.columns))
        if self._ragged:
            rows = layout.rows[None]
            tokens, positions, columns = tokens[None], positions[None], columns[None]
        else:
            rows = torch.arange(layout.shape[0], device=self._device)[:, None]
            tokens, positions = layout.spread(tokens), layout.spread(positions)
            columns = layout.spread(columns, state.capacity - 1)
        for layer in state.layers:
            layer.places = (rows, columns)
        with torch.inference_mode(), shaped(layout if self._ragged else None):
            hidden: torch.Tensor = self._backbone(
                input_ids=tokens,
                attention_mask=additive_mask(step.visible[:, None], self._dtype, self._device),
                position_ids=positions,
                past_key_values=state.cache,
                use_cache=True,
            ).last_hidden_state
        return hidden[0] if self._ragged else layout.gather(hidden)

    def _mask(self, rows: Sequence[Row], prefix_width: int, width: int, extra: int) -> torch.Tensor:
        """(B, 1, N, P + N + extra) additive: 0 where a token may look, the lowest number of the dtype elsewhere."""
        sees = np.zeros((len(rows), width, prefix_width + width + extra), dtype=bool)
        for index, row in enumerate(rows):
            n = len(row.tokens)
            sees[index, :, : row.start] = True
            own = np.tri(n, dtype=bool) if row.sees is None else row.sees
            sees[index, :n, prefix_width : prefix_width + n] = own
            # a padded token sees itself, because a softmax over nothing is NaN
            pad = np.arange(n, width)
            sees[index, pad, prefix_width + pad] = True
        return additive_mask(torch.from_numpy(sees)[:, None], self._dtype, self._device)

    def prefixes(self, paths: Sequence[Path]) -> list[Chunk | None]:
        """The chunk of the last part of every path; those of all its parts are computed where the cache has none.

        Every part has a chunk, whatever other paths share. None for an empty path.
        """
        held: dict[Path, Chunk] = {}
        for depth in range(max((len(path) for path in paths), default=0)):
            jobs: dict[Path, tuple[Chunk | None, TokenIds]] = {}
            for path in paths:
                if depth < len(path):
                    self._plan(path[: depth + 1], held, jobs)
            self._compute(jobs, held)
        return [held[path] if path else None for path in paths]

    def spent_on(self, path: Path) -> int:
        """Tokens computed for a path by `prefixes` that were not charged to another path before."""
        return sum(self._spent.pop(path[:depth], 0) for depth in range(1, len(path) + 1))

    def _plan(
        self,
        path: Path,
        held: dict[Path, Chunk],
        jobs: dict[Path, tuple[Chunk | None, TokenIds]],
    ) -> None:
        """What is to be computed for the last part of a path, whose other parts are held."""
        if path in held or path in jobs:
            return
        cached = self.cache.get(path)
        if cached is None:
            jobs[path] = (held[path[:-1]] if len(path) > 1 else None, path[-1])
        else:
            held[path] = cached

    def _compute(self, jobs: dict[Path, tuple[Chunk | None, TokenIds]], held: dict[Path, Chunk]) -> None:
        for keys in self._batches(jobs):
            rows = [Row(*jobs[key]) for key in keys]
            done = self.forward(rows, states=False)
            for position, key in enumerate(keys):
                chunk = _chunk(done, position, rows[position], key)
                self._spent[chunk.key] = len(chunk.tokens)
                held[chunk.key] = chunk
                self.cache.add(chunk)

    def _batches(self, jobs: dict[Path, tuple[Chunk | None, TokenIds]]) -> list[list[Path]]:
        """What is computed at once: each alone, or those of like length, no more than their prefixes may be copied
        for."""
        keys = list(jobs)
        if self.single_rows:
            return [[key] for key in keys]
        batches: list[list[Path]] = []
        for batch in length_batches([len(jobs[key][1]) for key in keys], self._forward_tokens):
            parents = [parent for parent, _ in (jobs[keys[index]] for index in batch) if parent is not None]
            per_token = max((parent.bytes_per_token for parent in parents), default=0)
            longest = max((parent.length for parent in parents), default=0)
            rows = max(1, self._copied_bytes // max(1, longest * per_token))
            batches += [[keys[index] for index in batch[i : i + rows]] for i in range(0, len(batch), rows)]
        return batches


def _chunk(done: Continued, position: int, row: Row, key: Path) -> Chunk:
    """What a pass computed for one of its rows: its memory, where little of that is of something else, or a copy."""
    length = len(row.tokens)
    start, end = done.prefix_width, done.prefix_width + length
    own = len(done.layers[0].keys) == 1 and done.most - length <= _FOREIGN * length
    block = _Block(len(done.layers), length)  # in one piece, as above

    def kept(memory: torch.Tensor) -> torch.Tensor:
        computed = memory[position : position + 1, :, start:end]
        return computed[0] if own else block.take(computed).copy_(computed)[0]

    layers = [(kept(layer.keys), kept(layer.values)) for layer in done.layers]
    size = sum(keys.nbytes + values.nbytes for keys, values in layers)
    if own:
        size = size // length * done.most
    return Chunk(tuple(row.tokens), row.prefix, layers, row.start + length, key, size)
