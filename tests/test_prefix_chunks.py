"""Chunks of prefixes: what is computed for them, and whose memory they are in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tiny_models import save_tiny  # noqa: E402

from el4ner.engines import Choose, load_engine  # noqa: E402
from el4ner.engines.attention import _by_head  # noqa: E402
from el4ner.engines.prefix_cache import Chunk, PrefixRunner, Row  # noqa: E402
from el4ner.engines.states import find_blocks  # noqa: E402


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = save_tiny(tmp_path_factory.mktemp("tiny"), "llama")
    loaded: Any = load_engine(folder, device="cpu", dtype="float32")
    assert loaded.packing.ragged  # found out here, lest its own passes be counted
    return loaded


def runner_of(engine: Any) -> PrefixRunner:
    """Of passes of 128 tokens."""
    runner: PrefixRunner = engine._runner(engine._budgets(128, 128))
    return runner


def test_a_pass_over_a_prefix_ends_at_its_last_keys(engine: Any) -> None:
    runner: PrefixRunner = runner_of(engine)
    ran: list[str] = []
    last = find_blocks(engine.model.base_model)[-1]
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in (("keys", last.self_attn.k_proj), ("mlp", last.mlp))
    ]
    rows = [Row(None, (5, 6, 7))]
    try:
        without = runner.forward(rows, states=False)
        assert ran == ["keys"]
        whole = runner.forward(rows)
        assert ran == ["keys", "keys", "mlp"]
    finally:
        for handle in handles:
            handle.remove()
    assert (without.hidden.shape, whole.hidden.shape[:2]) == ((1, 0, 0), (1, 3))
    for ours, theirs in zip(without.layers, whole.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_a_prefix_alone_stays_where_it_was_computed_and_counts_all_of_it(engine: Any) -> None:
    runner: PrefixRunner = runner_of(engine)
    engine._cache.clear()
    instruction, rest = (1, 2), tuple(range(3, 23))
    (chunk,) = runner.prefixes([(instruction, rest)])
    assert chunk is not None
    assert (chunk.tokens, chunk.length) == (rest, 22)
    keys, values = chunk.layers[0]
    assert keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    assert keys.untyped_storage().nbytes() == chunk.n_bytes  # all blocks, the instruction's columns among them
    assert keys.nbytes * 2 * len(chunk.layers) * 22 // 20 == chunk.n_bytes


def test_a_short_piece_behind_a_long_one_is_copied(engine: Any) -> None:
    runner: PrefixRunner = runner_of(engine)
    engine._cache.clear()
    (chunk,) = runner.prefixes([(tuple(range(3, 23)), (1, 2))])
    assert chunk is not None
    assert chunk.tokens == (1, 2)
    assert chunk.layers[0][0].untyped_storage().nbytes() == chunk.n_bytes
    assert chunk.layers[0][0].nbytes * 2 * len(chunk.layers) == chunk.n_bytes


@pytest.mark.parametrize("single_rows", [True, False])
def test_other_prefixes_move_no_bit_of_a_prefix_or_only_the_last(
    engine: Any, single_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_single_rows", single_rows)
    passes: list[int] = []
    forward = PrefixRunner.forward

    def counting(self: Any, rows: Any, *others: Any, **named: Any) -> Any:
        passes.append(len(rows))
        return forward(self, rows, *others, **named)

    monkeypatch.setattr(PrefixRunner, "forward", counting)
    runner: PrefixRunner = runner_of(engine)
    paths = [((1, 2), tuple(range(3, 23))), ((1, 2), tuple(range(30, 67))), ((1, 2, 4), tuple(range(60, 71)))]
    engine._cache.clear()
    together = runner.prefixes(paths)
    assert passes == ([1] * 5 if single_rows else [2, 3])
    alone: list[Chunk | None] = []
    for path in paths[::-1]:
        engine._cache.clear()
        alone += runner.prefixes([path])
    for ours, theirs in zip(together, reversed(alone), strict=True):
        assert ours is not None
        assert theirs is not None
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            # sums in another order: products of two rows, of one
            torch.testing.assert_close(a, b, atol=0 if single_rows else 1e-5, rtol=0 if single_rows else 1e-4)


def test_where_parts_end_is_part_of_a_prefix(engine: Any) -> None:
    engine._cache.clear()
    runner: PrefixRunner = runner_of(engine)
    one, other = runner.prefixes([((1, 2), (3, 4, 5)), ((1, 2, 3), (4, 5))])
    assert one is not None
    assert other is not None
    assert (one.tokens, other.tokens) == ((3, 4, 5), (4, 5))
    assert len(engine._cache) == 4


def test_all_blocks_of_a_pass_share_a_repeated_mask(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from el4ner.engines import attention

    seen: list[torch.Tensor] = []

    def noting(mask: torch.Tensor, share: int, columns: int) -> torch.Tensor:
        seen.append(_by_head(mask, share, columns))
        return seen[-1]

    monkeypatch.setattr(attention, "_by_head", noting)
    trie = np.tril(np.ones((3, 3), dtype=bool))
    for _ in range(2):
        runner_of(engine).forward([Row(None, (5, 6, 7), (0, 1, 2), trie)])
    first, second = seen[: engine.n_layers], seen[engine.n_layers :]
    assert len(first) == len(second) == engine.n_layers > 1
    assert all(mask is first[0] for mask in first)
    assert all(mask is second[0] for mask in second)
    assert second[0] is not first[0]


def test_a_mask_is_repeated_for_the_heads_of_a_group() -> None:
    mask = torch.arange(2 * 3 * 5.0).reshape(2, 1, 3, 5)
    repeated = _by_head(mask, 2, 4)
    assert torch.equal(repeated, mask[..., :4].repeat(1, 1, 2, 1))
    assert _by_head(mask, 2, 4) is repeated
    assert torch.equal(_by_head(mask, 3, 5), mask.repeat(1, 1, 3, 1))  # a block of another shape
    assert _by_head(mask, 1, 5).data_ptr() == mask.data_ptr()


@pytest.mark.parametrize("alone", [True, False])
def test_tries_of_like_size_are_scored_together_where_not_each_alone(
    engine: Any, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """In the order of the prefixes long and short ones take turns, and a third of the tokens would be padding."""
    engine._cache.clear()
    passes: list[list[int]] = []
    forward = PrefixRunner.forward

    def counting(self: Any, rows: Any, *others: Any, **named: Any) -> Any:
        if named.get("states", True):
            passes.append([len(row.tokens) for row in rows])
        return forward(self, rows, *others, **named)

    monkeypatch.setattr(PrefixRunner, "forward", counting)
    monkeypatch.setattr(engine, "_single_rows", alone)
    lengths = [(40, 2), (30, 30), (20, 2), (10, 30)]
    requests = [Choose(("x" * prefix, "y", "z" * own), ("a", "b")) for prefix, own in lengths]
    monkeypatch.setattr(engine, "_forward_tokens", 90)
    monkeypatch.setattr(engine, "_pack_tokens", 90)
    engine.choose(requests)
    assert len(passes) == (4 if alone else 2)
    assert sum(len(own) * max(own) for own in passes) <= (1 if alone else 1.1) * sum(map(sum, passes))
