"""Voters without models: word features, span tables, retrieval, stacking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from el4ner.cache import ArrayCache
from el4ner.config import ReadingConfig, RetrievalConfig
from el4ner.engines.base import FloatArray, TokenStates
from el4ner.engines.scripted import ScriptedEngine
from el4ner.pool import Pool
from el4ner.records import Demonstration, Label, LabelledSpan, Sentence, Span
from el4ner.text import words
from el4ner.voters import reading
from el4ner.voters.features import SHAPE_NAMES, FeatureReader, pool_tokens, shapes
from el4ner.voters.reading import ReadingVoter, SpanTable
from el4ner.voters.reading_fit import read_pool
from el4ner.voters.retrieval import RetrievalVoter
from el4ner.voters.stacking import Stack, fit_stack, log_loss, log_votes, start_stack
from el4ner.voters.swapping import swapped

LABELS = (Label("person"), Label("place"))
NAMES = ("person", "place")


# Features


def test_pool_tokens_is_the_mean_of_the_touching_tokens() -> None:
    units = [Span(0, 3), Span(4, 9), Span(10, 11)]
    offsets = np.array([[0, 3], [3, 6], [6, 9], [12, 14]])
    states = np.array([[1.0, 0], [3, 0], [5, 2], [9, 9]], dtype=np.float32)
    means = pool_tokens(units, offsets, states)
    assert means.tolist() == [[1, 0], [4, 1], [0, 0]]  # "[3, 6]" begins in the space before the second word
    means = pool_tokens(units, offsets[:0], states[:0])
    assert not means.any()
    assert means.shape == (3, 2)


def test_shapes_of_words() -> None:
    text = "@Ada NATO eBay 42 :"
    units = words(text)
    by_word = {
        text[unit.start : unit.end]: {name for name, value in zip(SHAPE_NAMES, row, strict=True) if value}
        for unit, row in zip(units, shapes(text, units), strict=True)
    }
    assert by_word["@"] == {"symbol", "at sign", "one character", "first word", "after symbol"}
    assert by_word["Ada"] == {"starts upper", "after symbol", "after at or hash"}
    assert by_word["NATO"] == {"starts upper", "all upper", "upper inside"}
    assert by_word["eBay"] == {"upper inside"}
    assert by_word["42"] == {"has digit", "all digits"}
    assert shapes("", []).shape == (0, len(SHAPE_NAMES))


def char_states(text: str, layers: Sequence[int]) -> TokenStates:
    """One token per character that is not space; its state is (code point, position)."""
    at = [i for i, character in enumerate(text) if not character.isspace()]
    states = np.array([(ord(text[i]), i) for i in at], dtype=np.float32).reshape(-1, 2)
    offsets = np.array([(i, i + 1) for i in at], dtype=np.int64).reshape(-1, 2)
    return TokenStates(offsets, dict.fromkeys(layers, states))


def reader(twice: bool = True, max_tokens: int = 4096, limit: int = 510) -> tuple[FeatureReader, ScriptedEngine]:
    engine = ScriptedEngine(read=char_states, n_layers=10, max_tokens=max_tokens)
    config = ReadingConfig(depths=(0.4,), twice=twice, shapes=False, encoder_depths=(), max_text_tokens=limit)
    return FeatureReader(engine, None, config), engine


def test_the_second_copy_is_read_with_offsets_into_the_text() -> None:
    features, engine = reader()
    text = "Åse saw 🎈"
    (found,) = features.read([text])
    assert engine.requests == [(f"{text}\n{text}", (4,))]
    assert [text[a:b] for a, b in found.units] == ["Åse", "saw", "🎈"]
    assert found.values.shape == (3, 2)
    # the mean position of the characters in what the engine was given: behind the first copy and the line break
    assert found.values[:, 1].tolist() == [len(text) + 1 + i for i in (1, 5, 8)]
    assert found.values[2, 0] == ord("🎈")
    (once,) = reader(twice=False)[0].read([text])
    assert once.values[:, 1].tolist() == [1, 5, 8]


def test_a_text_that_does_not_fit_is_cut_at_a_word_and_says_where() -> None:
    text = " ".join(f"w{i}" for i in range(100))
    features, engine = reader(limit=40)
    short, long, empty = features.read(["a b", text, ""])
    assert (short.truncated_at, empty.truncated_at) == (None, None)
    assert long.truncated_at is not None
    read = text[: long.truncated_at]
    assert len(read.split()) == 40
    assert (f"{read}\n{read}", (4,)) in engine.requests
    assert [text[a:b] for a, b in long.units] == read.split()
    assert empty.values.shape == (0, 2)
    assert reader(max_tokens=44)[0].read([text])[0].truncated_at == len(" ".join(text.split()[:20]))


def test_texts_are_read_a_group_at_a_time_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("el4ner.voters.features._GROUP", 10)
    held: list[int] = []

    class Watched(ScriptedEngine):
        def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:
            held.append(len(texts))
            return super().read(texts, layers)

    config = ReadingConfig(depths=(0.4,), shapes=False, encoder_depths=())
    texts = ["one two", "x", "longer than a group", "", "y z", "x", "four"]
    found = FeatureReader(Watched(read=char_states, n_layers=10), None, config).read(texts)
    assert held == [5, 1, 1]  # "", "x", "x", "y z" and "four"; then each alone
    assert [[text[a:b] for a, b in own.units] for text, own in zip(texts, found, strict=True)] == [
        text.split() for text in texts
    ]
    assert FeatureReader(Watched(read=char_states, n_layers=10), None, config).read([]) == []


def test_a_second_copy_that_the_model_cuts_says_where() -> None:
    """Characters of many tokens each: few enough not to be counted before, and too many for the model twice."""
    text = "鬱 " * 30

    def cut(read: str, layers: Sequence[int]) -> TokenStates:
        states, end = char_states(read, layers), len(text) + 1 + 20
        kept = states.offsets[:, 1] <= end
        return TokenStates(states.offsets[kept], {n: own[kept] for n, own in states.states.items()}, end)

    engine = ScriptedEngine(read=cut, n_layers=10)
    config = ReadingConfig(depths=(0.4,), shapes=False, encoder_depths=())
    (found,) = FeatureReader(engine, None, config).read([text])
    assert (found.truncated_at, len(found.units)) == (20, 10)
    assert found.values.all()


def test_features_of_a_pool_stand_in_one_array_whatever_is_cut(tmp_path: Path) -> None:
    """A text that is cut has fewer words than room; the next ones move up. What comes from the cache is the same."""
    texts = [
        "a b",
        " ".join(f"w{i}" for i in range(100)),
        "",
        "Åse saw it",
        " ".join(f"v{i}" for i in range(60)),
        "end",
    ]
    features, _ = reader(limit=40)
    expected = [own.values.astype(np.float16) for own in features.read(texts)]
    for cache in (ArrayCache(tmp_path), ArrayCache(tmp_path)):
        values, read = read_pool(reader(limit=40)[0], cache, texts, lambda _: None)
        assert np.array_equal(values, np.concatenate(expected))
        assert [own.units for own in read] == [own.units for own in features.read(texts)]
        assert all(np.array_equal(own.values, right) for own, right in zip(read, expected, strict=True))
        assert all(np.shares_memory(own.values, values) for own in read if len(own.units))


# Span tables


def table() -> SpanTable:
    """Words "Ada", "saw", "Rome" of "Ada saw Rome", spans up to two words, columns person and none."""
    p = np.full((3, 2), 0.001)
    p[0, 0], p[2, 0], p[1, 1] = 0.9, 0.3, 0.02
    logp = np.log(np.stack([p, 1 - p], axis=2)).astype(np.float32)
    logp[2, 1] = -np.inf
    return SpanTable((Span(0, 3), Span(4, 7), Span(8, 12)), logp)


def test_rows_of_a_span_table() -> None:
    rows = np.exp(table().rows([Span(0, 3), Span(4, 12), Span(0, 12), Span(1, 3), Span(8, 20), Span(8, 3)]))
    np.testing.assert_allclose(rows[:, 0], [0.9, 0.02, 0.01, 0.01, 0.01, 0.01], atol=1e-6)
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-6)
    assert table().rows([]).shape == (0, 2)


def test_spans_above_a_floor() -> None:
    assert table().above(0.25) == [Span(0, 3), Span(8, 12)]
    assert table().above(0.019) == [Span(0, 3), Span(4, 12), Span(8, 12)]
    assert table().above(0.95) == []
    assert SpanTable((), np.zeros((0, 2, 2), np.float32)).above(0.1) == []


def pool_of(*rows: tuple[str, dict[str, str]]) -> Pool:
    sentences = []
    for text, entities in rows:
        found = tuple(LabelledSpan(text.index(s), text.index(s) + len(s), label) for s, label in entities.items())
        sentences.append(Demonstration(text, text, found))
    return Pool(tuple(sentences), LABELS)


def test_a_reading_voter_reads_its_pool_once_and_says_what_it_cannot_align(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(f"word{i} Ada went to Rome {i}", {"Ada": "person", "Rome": "place"}) for i in range(24)]
    pool = pool_of(*rows, ("half words: Romeward", {"Rome": "place"}))
    cache = ArrayCache(tmp_path)
    config = ReadingConfig(depths=(0.4,), encoder_depths=())
    engine = ScriptedEngine(read=char_states, n_layers=10)
    voter = ReadingVoter("reading", FeatureReader(engine, None, config), NAMES, config, cache)
    tables = voter.fit(pool, lambda _: None)
    assert voter.unaligned == 1
    assert len(engine.requests) == len(pool.sentences)
    assert [t.units for t in tables] == [tuple(words(d.text)) for d in pool.sentences]
    text = "word9 Ada went to Rome 99"
    sentence = Sentence("1", text)
    spans = [Span(6, 9), Span(18, 22), Span(10, 14)]
    (votes,) = voter.vote([sentence], [spans])
    assert votes.argmax(axis=1).tolist() == [0, 1, 2]
    voter.vote([sentence, sentence], [spans, spans])
    assert len(engine.requests) == len(pool.sentences) + 1  # a text is read once
    monkeypatch.setattr(reading, "_REMEMBERED_BYTES", 1)
    both = [sentence, Sentence("2", "word8 Ada")]
    voter.tables(both)
    voter.tables(both)
    assert len(engine.requests) == len(pool.sentences) + 2  # the texts of the last call are known still
    voter.tables(both[1:])
    voter.tables(both[:1])
    assert len(engine.requests) == len(pool.sentences) + 3  # older ones are not, beyond the room there is

    silent = ScriptedEngine(n_layers=10)  # would raise if it were read
    again = ReadingVoter("reading", FeatureReader(silent, None, config), NAMES, config, cache)
    stored = again.fit(pool, lambda _: None)
    assert all((a.logp == b.logp).all() for a, b in zip(tables, stored, strict=True))


def test_what_is_said_about_a_pool_sentence_does_not_come_from_its_own_fold(tmp_path: Path) -> None:
    """A word that is an entity in one fold only is learnt by the final fit, but unknown to that fold's own table."""
    rows = [(f"w{i} Ada went home {i}", {"Ada": "person"}) for i in range(40)]
    odd = "zz 中 went 文 home"  # two names: the copies in which they are swapped belong to the same fold
    pool = pool_of(*rows, (odd, {"中": "place", "文": "place"}))
    assert any(d.text.startswith("zz 文") for d in swapped(pool, 4)[0])
    config = ReadingConfig(depths=(0.4,), encoder_depths=())
    reader_ = FeatureReader(ScriptedEngine(read=char_states, n_layers=10), None, config)
    voter = ReadingVoter("reading", reader_, NAMES, config, ArrayCache(tmp_path))
    tables = voter.fit(pool, lambda _: None)
    position = next(i for i, d in enumerate(pool.sentences) if d.text == odd)
    out_of_fold = np.exp(tables[position].rows([Span(3, 4)]))[0, 1]
    final = np.exp(voter.tables([Sentence("1", odd)])[0].rows([Span(3, 4)]))[0, 1]
    assert final > 10 * out_of_fold


# Retrieval


class LetterEncoder:
    """Unit vectors of letter counts; remembers what it was asked to encode."""

    source = "letters"
    n_layers = 0

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str]) -> FloatArray:
        self.encoded += texts
        rows = np.zeros((len(texts), 128), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for character in text:
                row[ord(character) % 128] += 1
            row /= max(float(np.linalg.norm(row)), 1e-9)
        return rows

    def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:
        raise AssertionError("the retrieval voter reads no states")


def retrieval(pool: Pool, path: Path, neighbours: int = 20) -> tuple[RetrievalVoter, LetterEncoder]:
    encoder = LetterEncoder()
    voter = RetrievalVoter(encoder, NAMES, RetrievalConfig(neighbours=neighbours), ArrayCache(path))
    voter.fit(pool, [[Span(0, 3)] for _ in pool.sentences])
    return voter, encoder


ROWS = (
    ("xyz met Anna", {"Anna": "person"}),
    ("xyz saw Anna", {"Anna": "person"}),
    ("xyz left Oslo", {"Oslo": "place"}),
    ("xyz quit Oslo", {"Oslo": "place"}),
    ("xyz slept", {}),
)


def ask(voter: RetrievalVoter, *surfaces: str) -> FloatArray:
    sentences = [Sentence("1", surface) for surface in surfaces]
    return np.concatenate(voter.vote(sentences, [[Span(0, len(surface))] for surface in surfaces]))


def test_the_nearest_strings_decide_and_unmarked_strings_say_none(tmp_path: Path) -> None:
    voter, encoder = retrieval(pool_of(*ROWS), tmp_path)
    rows = ask(voter, "Anna", "Osloo", "xyz")
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-6)
    assert rows.argmax(axis=1).tolist() == [0, 1, 2]
    assert rows[0, 0] > 0.8
    assert encoder.encoded == ["Anna", "Oslo", "xyz", "Osloo"]  # the pool's own strings are at hand


def test_without_a_near_string_the_pools_shares_answer(tmp_path: Path) -> None:
    voter, _ = retrieval(pool_of(*ROWS), tmp_path)
    # 2 person, 2 place, 5 none and half a count for each
    np.testing.assert_allclose(ask(voter, "????")[0], np.array([2.5, 2.5, 5.5]) / 10.5, atol=1e-3)
    empty = RetrievalVoter(LetterEncoder(), NAMES, RetrievalConfig(), ArrayCache(tmp_path))
    empty.fit(Pool((), LABELS), [])
    np.testing.assert_allclose(ask(empty, "Anna"), 1 / 3, atol=1e-6)
    assert [rows.shape for rows in voter.vote([Sentence("1", "x")], [[]])] == [(0, 3)]


def test_a_sentences_own_fold_leaves_no_trace(tmp_path: Path) -> None:
    """Excluding a fold gives the same votes as a pool that never had it."""
    pool = pool_of(*ROWS, ("xyz saw Qqq", {"Qqq": "place"}))
    fold = pool.folds[next(i for i, d in enumerate(pool.sentences) if "Qqq" in d.text)]
    rest = Pool(tuple(d for d, own in zip(pool.sentences, pool.folds, strict=True) if own != fold), LABELS)
    whole, _ = retrieval(pool, tmp_path / "whole")
    without, _ = retrieval(rest, tmp_path / "rest")
    sentence, span = Sentence("1", "Qqq"), [[Span(0, 3)]]
    (seen,) = whole.vote([sentence], span)
    (excluded,) = whole.vote([sentence], span, exclude_folds=[fold])
    (never,) = without.vote([sentence], span)
    assert seen[0, 1] > 0.6
    np.testing.assert_allclose(excluded, never, atol=1e-6)


def test_one_query_does_not_depend_on_the_others(tmp_path: Path) -> None:
    voter, _ = retrieval(pool_of(*ROWS), tmp_path, neighbours=2)
    surfaces = [f"{name}{i}" for i in range(25) for name in ("Anna", "Oslo", "x")]
    together = ask(voter, *surfaces)
    for i in (0, 31, 32, 74):
        assert (ask(voter, surfaces[i])[0] == together[i]).all()
    assert (ask(voter, *surfaces[::-1])[::-1] == together).all()


# Stacking


def votes_case(seed: int = 0, n: int = 300) -> tuple[list[FloatArray], FloatArray, np.ndarray]:
    """A good voter, a noisy one, and truth over two labels and none."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=n)

    def voter(strength: float) -> FloatArray:
        z = rng.normal(size=(n, 3))
        z[np.arange(n), truth] += strength
        p = np.exp(z)
        return np.asarray(p / p.sum(axis=1, keepdims=True), dtype=np.float32)

    return [voter(3.0), voter(0.0)], rng.integers(2, size=(n, 2)).astype(np.float32), truth


def test_fitting_improves_the_log_loss_and_finds_the_better_voter() -> None:
    votes, evidence, truth = votes_case()
    start = start_stack(["good", "noise"], 3, 2)
    fitted = fit_stack(start, votes, evidence, truth)
    before, after = (log_loss(stack.probabilities(votes, evidence), truth) for stack in (start, fitted))
    assert after < 0.8 * before
    assert fitted.weights[0].min() > 3 * np.abs(fitted.weights[1]).max()
    fresh = votes_case(seed=1)
    assert log_loss(fitted.probabilities(*fresh[:2]), fresh[2]) < log_loss(start.probabilities(*fresh[:2]), fresh[2])


def test_the_penalty_pulls_to_the_start() -> None:
    votes, evidence, truth = votes_case()
    start = start_stack(["good", "noise"], 3, 2)

    def distance(stack: Stack) -> float:
        return float(np.abs(stack.weights - start.weights).max())

    loose, tight = (fit_stack(start, votes, evidence, truth, penalty) for penalty in (1.0, 1e6))
    assert distance(tight) < 1e-2 < distance(loose)
    assert fit_stack(start, [vote[:0] for vote in votes], evidence[:0], truth[:0]) is start


def test_an_abstention_says_nothing_and_a_zero_is_floored() -> None:
    stack = Stack(("a", "b"), np.ones((2, 3)), np.zeros(3), np.zeros(1))
    evidence = np.zeros((1, 1), np.float32)
    first, silent = np.array([[0.7, 0.2, 0.1]], np.float32), np.full((1, 3), np.nan, np.float32)
    np.testing.assert_allclose(stack.probabilities([first, silent], evidence), first, atol=1e-6)
    certain = np.array([[1.0, 0.0, 0.0]], np.float32)
    assert log_votes(certain)[0, 1] == np.float32(np.log(1e-4))
    assert np.isfinite(stack.probabilities([certain, certain], evidence)).all()


def test_evidence_speaks_for_none_only() -> None:
    stack = Stack(("a",), np.ones((1, 3)), np.zeros(3), np.array([-2.0]))
    vote = np.tile(np.array([0.5, 0.3, 0.2], np.float32), (2, 1))
    without, given = stack.probabilities([vote], np.array([[0.0], [1.0]], np.float32))
    assert given[2] < without[2]
    assert given[0] / given[1] == pytest.approx(without[0] / without[1], rel=1e-5)


def test_a_row_does_not_depend_on_the_others() -> None:
    votes, evidence, truth = votes_case()
    fitted = fit_stack(start_stack(["good", "noise"], 3, 2), votes, evidence, truth)
    whole = fitted.probabilities(votes, evidence)
    for i in (0, 7, 299):
        alone = fitted.probabilities([vote[i : i + 1] for vote in votes], evidence[i : i + 1])
        assert (alone[0] == whole[i]).all()


def test_new_voters_start_at_nothing_beside_what_is_fitted() -> None:
    votes, evidence, truth = votes_case()
    base = fit_stack(start_stack(["good"], 3, 2), votes[:1], evidence, truth)
    start = start_stack(["good", "asked"], 3, 2, base)
    assert (start.probabilities(votes, evidence) == base.probabilities(votes[:1], evidence)).all()


def test_weights_that_are_held_stay_while_new_ones_are_fitted() -> None:
    votes, evidence, truth = votes_case()
    base = fit_stack(start_stack(["noise"], 3, 2), votes[1:], evidence, truth)
    start = start_stack(["noise", "good"], 3, 2, base)
    fitted = fit_stack(start, votes[::-1], evidence, truth, held=["noise"])
    assert (fitted.weights[0] == base.weights[0]).all()
    assert fitted.weights[1].min() > 0.3
    free = fit_stack(start, votes[::-1], evidence, truth)
    assert np.abs(free.weights[0] - base.weights[0]).max() > 1e-3
