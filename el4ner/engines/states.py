"""Hidden states of a causal model, layer by layer, without running what lies above the deepest layer asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from el4ner.engines.base import FloatArray, IntArray, TokenStates
from el4ner.engines.token_trie import TokenTrie
from el4ner.errors import EngineError


class _Deep(Exception):  # noqa: N818  ends a forward pass, no error
    """Ends a forward pass once the deepest layer asked for has run."""


def find_blocks(backbone: Any) -> torch.nn.ModuleList:
    """The list of transformer blocks: the only ModuleList as long as the configuration says.

    Raises EngineError if the architecture hides it.
    """
    wanted = backbone.config.get_text_config().num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted:
            return module
    raise EngineError(
        f"{type(backbone).__name__}: no list of {wanted} blocks found, so hidden states cannot be read; "
        "use this model as a prompted member only"
    )


@contextmanager
def layer_capture(blocks: torch.nn.ModuleList, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Inside, a forward pass fills the dict with layer -> (B, T, D) and ends by `_Deep` after the deepest layer."""
    caught: dict[int, torch.Tensor] = {}
    deepest = max(layers)
    handles = []

    def before(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        caught[0] = arguments[0] if arguments else keywords["hidden_states"]
        if deepest == 0:
            raise _Deep

    def after(layer: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            caught[layer] = output[0] if isinstance(output, tuple) else output
            if layer == deepest:
                raise _Deep

        return hook

    try:
        if 0 in layers:
            handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
        handles += [blocks[layer - 1].register_forward_hook(after(layer)) for layer in layers if layer]
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def read_batch(
    backbone: Any,
    blocks: torch.nn.ModuleList,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    device: torch.device,
    mask: bool = False,
    pad_id: int = 0,
    shape: tuple[int, int] | None = None,
) -> list[dict[int, FloatArray]]:
    """Hidden states of rows of token ids: per row layer -> (T, D) f32.

    Rows are padded on the right. A causal model needs no mask for that, since no token sees what follows it; for an
    encoder `mask` is set. shape: rows and tokens to pad to, more than there are.
    """
    n_rows, longest = shape or (len(rows), max(len(row) for row in rows))
    ids = torch.full((n_rows, longest), pad_id, dtype=torch.long)
    for position, row in enumerate(rows):
        ids[position, : len(row)] = torch.tensor(list(row), dtype=torch.long)
    keywords: dict[str, Any] = {}
    if mask:
        # a row of padding alone shows its first token: a softmax over nothing would give NaN
        lengths = torch.tensor([len(row) for row in rows] + [1] * (n_rows - len(rows)))
        keywords["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long().to(device)
    else:
        keywords["use_cache"] = False
    with torch.inference_mode(), layer_capture(blocks, layers) as caught:
        with suppress(_Deep):
            backbone(input_ids=ids.to(device), **keywords)
        host = {layer: caught[layer].float().cpu().numpy() for layer in layers}
    return [
        {layer: np.ascontiguousarray(host[layer][position, : len(row)]) for layer in layers}
        for position, row in enumerate(rows)
    ]


def read_trie_ends(
    backbone: Any,
    blocks: torch.nn.ModuleList,
    tries: Sequence[TokenTrie],
    ends: Sequence[Sequence[int]],
    layers: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int] | None = None,
) -> list[FloatArray]:
    """Hidden states at some nodes of tries of tokens, each of which sees its ancestors only: per trie (n_ends,
    n_layers, D) f32. shape: tries and nodes to pad to, more than there are."""
    n_rows, width = shape or (len(tries), max(map(len, tries)))
    ids = torch.zeros((n_rows, width), dtype=torch.long)
    positions = torch.zeros((n_rows, width), dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool).repeat(n_rows, 1, 1)  # padding sees itself: a softmax over nothing is NaN
    for row, trie in enumerate(tries):
        n = len(trie)
        ids[row, :n], positions[row, :n] = torch.tensor(trie.tokens), torch.tensor(trie.depths)
        sees[row, :n, :n] = torch.from_numpy(trie.ancestors())
    mask = additive_mask(sees[:, None], dtype, device)
    with torch.inference_mode(), layer_capture(blocks, layers) as caught:
        with suppress(_Deep):
            backbone(input_ids=ids.to(device), attention_mask=mask, position_ids=positions.to(device), use_cache=False)
        return [
            torch.stack([caught[layer][row, list(own)] for layer in layers], dim=1).float().cpu().numpy()
            for row, own in enumerate(ends)
        ]


def additive_mask(sees: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Booleans to what attention adds to its scores."""
    mask = torch.zeros(sees.shape, dtype=dtype)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min).to(device)


def cut(ids: list[int], offsets: IntArray, limit: int) -> tuple[list[int], IntArray, int | None]:
    """At most `limit` tokens, and the code point up to which they read the text (None: to its end).

    A character whose tokens were only partly kept does not count as read.
    """
    if len(ids) <= limit:
        return ids, offsets, None
    end = int(offsets[limit, 0])
    return ids[:limit], offsets[:limit], end


def token_states(offsets: IntArray, states: dict[int, FloatArray], truncated_at: int | None) -> TokenStates:
    """Keeps the tokens that cover at least one character, and of a cut text only those before the cut."""
    covers = offsets[:, 1] > offsets[:, 0]
    if truncated_at is not None:
        covers &= offsets[:, 1] <= truncated_at
    if covers.all():
        return TokenStates(offsets, states, truncated_at)
    return TokenStates(offsets[covers], {layer: array[covers] for layer, array in states.items()}, truncated_at)
