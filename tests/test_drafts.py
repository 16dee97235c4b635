"""Drafts: looked up where the last tokens stood before, and without any influence on what is written."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from el4ner.engines import Generate, SubstringList, decoding, lanes, load_engine, prefix_cache  # noqa: E402
from el4ner.engines import transformers as engine_module  # noqa: E402
from el4ner.engines.drafts import Lookup  # noqa: E402
from el4ner.engines.prefix_cache import Chunk, PrefixCache, PrefixRunner  # noqa: E402

TEXTS = (
    "Ada Lovelace met Charles Babbage in London, and Charles Babbage met Ada Lovelace in Turin.",
    "Nothing happened here.",
    "The Avalanche Rescue Teams of Srinagar reached Gurez.",
)


def test_a_draft_is_what_followed_the_longest_run_last() -> None:
    lookup = Lookup([1, 2, 3, 4, 9, 2, 3, 5, 2, 3])
    assert lookup.draft(2) == [5, 2]  # 2 3 stood before 4 and, later, before 5
    lookup.add(5)
    assert lookup.draft(8) == [2, 3, 5]  # no further than there are tokens
    lookup.add(7)
    assert lookup.draft(8) == []
    lookup.add(1)
    assert lookup.draft(1) == [2]  # 7 1 is new, 1 is not
    assert lookup.draft(0) == []
    assert Lookup([]).draft(3) == []


def _requests(grounded: bool) -> list[Generate]:
    example = "Text: Bern is nice.\nNames: Bern\n"
    return [
        Generate((example, f"Text: {text}\n", ask), SubstringList(text, ";", "none", 8) if grounded else None, 24)
        for text in TEXTS
        for ask in ("Names:", "Places:")
    ]


@pytest.mark.embedded
@pytest.mark.parametrize("grounded", [True, False])
def test_drafts_change_no_reply_and_save_steps(grounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = load_engine("embedded:smollm2", device="cpu", dtype="float32")
    made: list[decoding.BatchDecoder] = []

    class Kept(decoding.BatchDecoder):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            made.append(self)

    monkeypatch.setattr(engine_module, "BatchDecoder", Kept)
    written = engine.generate(_requests(grounded))
    monkeypatch.setattr(decoding, "_LEAST_DRAFT", 0)
    monkeypatch.setattr(decoding, "_LONGEST_DRAFT", 0)
    assert engine.generate(_requests(grounded)) == written
    drafted, plain = made
    assert plain.drafted == 0
    assert 0 < drafted.right < drafted.drafted  # both right and wrong ones were met
    assert drafted.steps < plain.steps == max(reply.generated_tokens for reply in written) - 1
    monkeypatch.setattr(decoding, "_LEAST_DRAFT", 16)
    monkeypatch.setattr(decoding, "_LONGEST_DRAFT", 16)
    monkeypatch.setattr(decoding, "_spare", lambda _: 2)  # less than a step takes: the memory grows
    assert engine.generate(_requests(grounded)) == written
    assert [engine.generate([request])[0] for request in _requests(grounded)] == written


def test_keys_and_values_of_all_blocks_are_one_piece_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(like: torch.Tensor) -> list[torch.Tensor]:
        block = prefix_cache._Block(2, 300)
        return [block.take(like) for _ in range(4)]

    def refused(*_: int, **__: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    for dtype in (torch.float32, torch.bfloat16):
        like = torch.ones(2, 3, 5, 128, dtype=dtype)
        taken = pieces(like)
        assert [(t.shape, t.dtype, int(t.count_nonzero())) for t in taken] == [((2, 3, 300, 128), dtype, 0)] * 4
        assert len({t.untyped_storage().data_ptr() for t in taken}) == 1
        taken[0].fill_(1)
        assert not taken[1].any()
    with monkeypatch.context() as patch:  # memory that cannot be mapped is asked of torch, which says what is wrong
        patch.setattr(prefix_cache.mmap, "mmap", refused)
        assert [int(t.count_nonzero()) for t in pieces(like)] == [0] * 4
    block = prefix_cache._Block(2, 300)  # blocks of a model that differ
    first, other = block.take(like), block.take(like[..., :64])
    assert (first.shape[-1], other.shape[-1]) == (128, 64)
    assert first.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def test_rows_that_stay_move_to_the_front() -> None:
    layer = prefix_cache._BufferLayer([[], [], []], 0, 4, prefix_cache._Block(1, 6))
    keys = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    layer.update(keys, -keys)
    layer.keep([0, 2])
    assert layer.keys[:, 0, :2, 0].tolist() == [[0, 0], [2, 2]]
    assert layer.values[:, 0, :2, 0].tolist() == [[0, 0], [-2, -2]]
    assert layer.keys.shape[2] == 4
    layer.grow(6)
    assert (layer.keys.shape, layer.keys[1, 0, 4:].any().item()) == ((2, 1, 6, 2), False)


def test_prefixes_that_are_continued_are_copied_within_a_budget() -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))
    backbone = SimpleNamespace(config=config)
    runner = PrefixRunner(backbone, torch.device("cpu"), torch.float32, PrefixCache(1 << 20), 64, copied_bytes=2400)
    pair = torch.zeros(1, 100, 1), torch.zeros(1, 100, 1)
    parent = Chunk((0,) * 100, None, [pair], 100, (0,) * 100, 1000)  # 8 bytes a token, whatever else it holds
    jobs: dict[tuple[int, ...], tuple[Chunk | None, tuple[int, ...]]] = {(i,): (parent, (i,)) for i in range(7)}
    assert [len(batch) for batch in runner._batches(jobs)] == [3, 3, 1]
    without = {key: (None, tokens) for key, (_, tokens) in jobs.items()}
    assert [len(batch) for batch in runner._batches(without)] == [7]


def test_a_lane_gives_back_the_columns_of_wrong_drafts() -> None:
    class State:
        prefix_width, width, capacity, most = 3, 2, 9, 11

        def grow(self, capacity: int) -> None:
            self.capacity = capacity

        def keep(self, rows: list[int]) -> None:
            self.kept = rows

    state: Any = State()
    memory = lanes.LaneMemory(state, 2)
    first, second = (lanes.Lane(row, np.ones(5, dtype=bool), 5, Lookup([1])) for row in (0, 1))
    first.fed, second.fed = [7, 8, 9], [7]
    memory.take([first, second])
    assert (first.columns, second.columns) == ([5, 6, 7], [5])
    step = memory.step([first, second])
    assert step.tokens.tolist() == [7, 8, 9, 7]
    assert step.positions.tolist() == [5, 6, 7, 5]
    assert step.columns.tolist() == [5, 6, 7, 5]
    assert step.visible[0, 1].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert step.visible[1, 1].nonzero().flatten().tolist() == [0]
    assert (step.layout.rows.tolist(), step.layout.slots.tolist()) == ([0, 0, 0, 1], [0, 1, 2, 0])
    assert step.layout.spread(step.columns, 8).tolist() == [[5, 6, 7], [5, 8, 8]]
    assert step.layout.gather(step.layout.spread(step.tokens)).tolist() == step.tokens.tolist()
    memory.give(0, first.keep(1))
    assert (first.own, first.position) == ([5], 6)
    first.fed = [8, 9]
    memory.take([first])
    assert sorted(first.columns) == [6, 7]
    memory.give(0, first.keep(2))
    first.fed = [1]
    memory.take([first])  # nothing is left
    assert state.capacity == 11  # twice as many as the 4 would be more than were laid out
    assert first.columns == [8]
    memory.drop([first])
    assert state.kept == [0]
