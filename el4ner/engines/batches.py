"""Which texts run together, and which layers are read: plain bookkeeping, no model."""

from __future__ import annotations

from collections.abc import Sequence

from el4ner.errors import EngineError


def check_layers(layers: Sequence[int], n_layers: int) -> list[int]:
    """The layers in ascending order, each once. Raises EngineError outside 0..n_layers."""
    wanted = sorted(set(layers))
    if not wanted or wanted[0] < 0 or wanted[-1] > n_layers:
        raise EngineError(f"layers {list(layers)} asked for; choose from 0 (embeddings) to {n_layers}")
    return wanted


def length_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length whose padded size (rows x longest) stays within `budget` tokens.

    A text longer than the budget gets a batch of its own; texts of length 0 are left out.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    # ties by index keep the batches the same whatever the sort does
    for index in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            batches.append(batch)
            batch = []
        batch.append(index)
    if batch:
        batches.append(batch)
    return batches


def even_length(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that holds `length` tokens."""
    return -(-length // multiple) * multiple


def even_batches(lengths: Sequence[int], multiple: int, budget: int) -> list[tuple[list[int], int, int]]:
    """(indices, rows, tokens a row) of batches that all have the same shape for the same padded length.

    On a CPU a matrix product depends in its last bits on its shape. A batch that is always padded to `rows` rows of
    `tokens` tokens gives a text the same numbers whatever is run beside it. rows is what fits `budget` tokens, at
    least 1; texts of length 0 are left out.
    """
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        if length:
            by_length.setdefault(even_length(length, multiple), []).append(index)
    batches = []
    for tokens, own in sorted(by_length.items()):
        rows = max(1, budget // tokens)
        batches += [(own[i : i + rows], rows, tokens) for i in range(0, len(own), rows)]
    return batches
