"""The tagger: against every sequence of tags, how it is fitted, and as a voter beside the reading voter."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_readout import log_likelihood as planted_likelihood
from test_readout import planted
from test_voters import NAMES, char_states, pool_of

from el4ner.cache import ArrayCache
from el4ner.config import ReadingConfig, make_config
from el4ner.engines.base import FloatArray
from el4ner.engines.scripted import ScriptedEngine
from el4ner.errors import ConfigError, ShapeError
from el4ner.pool import Pool
from el4ner.preparation import Preparation
from el4ner.records import Demonstration, LabelledSpan, Sentence, Span
from el4ner.voters.features import FeatureReader
from el4ner.voters.fitting import Corpus, FitSettings, Material, _gather, fit_readouts, fit_taggers
from el4ner.voters.reading import ReadingVoter
from el4ner.voters.reading_fit import fit_on
from el4ner.voters.tag_net import TagNet, log_likelihood
from el4ner.voters.tagging import Tagger, allowed, span_shares, tags_of


def test_tags_of_entities() -> None:
    assert tags_of(6, [(1, 2, 0), (4, 4, 1)]).tolist() == [0, 1, 2, 0, 3, 0]
    assert tags_of(4, [(0, 1, 0), (2, 3, 0)]).tolist() == [1, 2, 1, 2]  # beside one another, and still two
    # of those that share words the longest, then the earliest
    assert tags_of(5, [(1, 1, 0), (0, 2, 1), (2, 4, 0)]).tolist() == [3, 4, 4, 0, 0]
    assert tags_of(3, []).tolist() == [0, 0, 0]
    assert tags_of(0, []).tolist() == []


def test_inside_follows_its_own_label_only() -> None:
    may = allowed(5)
    assert may[:, 0].all()
    assert may[:, [1, 3]].all()
    assert np.flatnonzero(may[:, 2]).tolist() == [1, 2]
    assert np.flatnonzero(may[:, 4]).tolist() == [3, 4]


def chain(seed: int, n_words: int, n_labels: int, scale: float = 1.5) -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(seed)
    n_tags = 2 * n_labels + 1
    scores = rng.normal(size=(n_words, n_tags)) * scale
    return scores.astype(np.float32), rng.normal(size=(n_tags, n_tags)).astype(np.float32)


def every_sequence(scores: FloatArray, transitions: FloatArray) -> dict[tuple[int, ...], float]:
    """The probability of every sequence of tags, from the formula."""
    may = allowed(scores.shape[1])
    weights = {}
    for tags in product(range(scores.shape[1]), repeat=len(scores)):
        pairs = list(zip((0, *tags), (*tags, 0), strict=True))
        if all(may[pair] for pair in pairs):
            total = sum(float(scores[t, tag]) for t, tag in enumerate(tags))
            weights[tags] = np.exp(total + sum(float(transitions[pair]) for pair in pairs))
    whole = sum(weights.values())
    return {tags: weight / whole for tags, weight in weights.items()}


def entities_of(tags: tuple[int, ...]) -> set[tuple[int, int, int]]:
    """(first word, words beyond it, label) of a sequence of tags."""
    found = set()
    for first, tag in enumerate(tags):
        if tag % 2:
            last = first
            while last + 1 < len(tags) and tags[last + 1] == tag + 1:
                last += 1
            found.add((first, last - first, tag // 2))
    return found


@pytest.mark.parametrize(("n_words", "n_labels", "max_words"), [(1, 2, 3), (2, 1, 2), (4, 2, 3), (5, 1, 5), (6, 1, 2)])
def test_the_share_of_a_span_is_that_of_the_sequences_that_hold_it(n_words: int, n_labels: int, max_words: int) -> None:
    scores, transitions = chain(n_words, n_words, n_labels)
    expected = np.zeros((n_words, max_words, n_labels))
    for tags, p in every_sequence(scores, transitions).items():
        for first, more, label in entities_of(tags):
            if more < max_words:
                expected[first, more, label] += p
    np.testing.assert_allclose(span_shares(scores, transitions, max_words), expected, atol=1e-12)


def test_what_is_fitted_is_the_probability_of_the_sequence() -> None:
    """Sentences of several lengths in one batch, two heads with weights of their own, words of no sentence between."""
    sizes, begins = [3, 1, 4], [0, 4, 5]  # the word at 3 is nobody's
    heads = [chain(seed, 9, 2) for seed in (1, 2)]
    tags = np.array([0, 1, 2, 4, 3, 1, 2, 2, 1])
    found = log_likelihood(
        torch.from_numpy(np.stack([scores for scores, _ in heads])),
        torch.from_numpy(np.stack([transitions for _, transitions in heads])),
        torch.from_numpy(allowed(5)), torch.tensor(begins), torch.tensor(sizes), torch.from_numpy(tags),
    )  # fmt: skip
    for (scores, transitions), own in zip(heads, found, strict=True):
        for begin, size, value in zip(begins, sizes, own.tolist(), strict=True):
            sequences = every_sequence(scores[begin : begin + size], transitions)
            assert value == pytest.approx(np.log(sequences[tuple(tags[begin : begin + size])]), abs=1e-9)


def test_certain_and_absurd_scores_stay_finite() -> None:
    """The best tag by far may not stand there: the rest of the mass is what is left, not nothing."""
    scores = np.zeros((4, 3), np.float32)
    scores[:, 2] = 60_000.0  # I, and no B before it
    scores[:, 1] = -60_000.0
    transitions = np.zeros((3, 3), np.float32)
    shares = span_shares(scores, transitions, 3)
    assert np.isfinite(shares).all()
    assert (shares >= 0).all()
    parts = (torch.from_numpy(scores)[None].requires_grad_(), torch.from_numpy(transitions)[None].requires_grad_())
    said = log_likelihood(
        *parts, torch.from_numpy(allowed(3)), torch.tensor([0]), torch.tensor([4]), torch.zeros(4).long()
    )
    said.sum().backward()
    assert torch.isfinite(said).all()
    assert all(part.grad is not None and torch.isfinite(part.grad).all() for part in parts)


def random_tagger(hidden: int) -> Tagger:
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> FloatArray:
        return rng.normal(size=shape).astype(np.float32)

    return Tagger(draw(6, hidden), draw(hidden), draw(3 * hidden, hidden), draw(hidden), draw(hidden or 6, 5), draw(5),
                  draw(5, 5), np.array([3], np.float32))  # fmt: skip


@pytest.mark.parametrize("hidden", [0, 7])
def test_log_probabilities_of_spans(hidden: int) -> None:
    tagger = random_tagger(hidden)
    values = np.random.default_rng(2).normal(size=(5, 6)).astype(np.float32)
    logp = tagger.log_probabilities(values)
    assert (logp.shape, logp.dtype) == ((5, 3, 3), np.float32)
    first, more = np.indices((5, 3))
    inside = first + more < 5
    assert np.isneginf(logp[~inside]).all()
    np.testing.assert_allclose(np.exp(logp[inside]).sum(axis=1), 1, atol=1e-5)
    assert tagger.log_probabilities(values[:0]).shape == (0, 3, 3)
    with pytest.raises(ShapeError, match=r"values \(5, 4\); the tagger was fitted on \(words, 6\)"):
        tagger.log_probabilities(values[:, :4])
    back = Tagger.from_arrays(tagger.to_arrays())
    assert (back.log_probabilities(values)[inside] == logp[inside]).all()


def test_what_is_fitted_beside_and_before_helps() -> None:
    corpus, other = planted(0), planted(1)
    flipped = Corpus(other.values, other.starts, [[(f, last, 1 - label)] for ((f, last, label),) in other.targets])
    settings = FitSettings(hidden=16)
    few = Material(corpus, range(6), 2)
    (alone,) = fit_taggers(few, 3, settings)
    (beside,) = fit_taggers(few, 3, settings, beside=Material(flipped, range(120), 2))
    assert {k: v.shape for k, v in beside.to_arrays().items()} == {k: v.shape for k, v in alone.to_arrays().items()}
    assert planted_likelihood(beside, corpus) > planted_likelihood(alone, corpus) + 5
    start = fit_readouts(Material(flipped, range(120), 2), 3, settings, heads=2)
    begun = fit_taggers(Material(corpus, [], 2), 3, settings, heads=3, start=start)  # no sentences: nothing moves
    for head, given in zip(begun, (*start, start[0]), strict=True):
        np.testing.assert_array_equal(head.word, given.word)
        np.testing.assert_array_equal(head.mix, given.mix)
    (warm,) = fit_taggers(few, 3, settings, start=start)
    assert planted_likelihood(warm, corpus) > planted_likelihood(alone, corpus) + 5
    with pytest.raises(ShapeError, match="cannot begin at"):
        fit_taggers(few, 3, FitSettings(hidden=8), start=start)


# As a voter


def voters_of(engine: ScriptedEngine, cache: ArrayCache) -> tuple[ReadingVoter, ReadingVoter]:
    config = ReadingConfig(depths=(0.4,), encoder_depths=())
    reader = FeatureReader(engine, None, config)
    spans = ReadingVoter("reading", reader, NAMES, config, cache)
    return spans, ReadingVoter("tagging", reader, NAMES, config, cache, 0, "tags", spans)


def towns() -> Pool:
    return pool_of(*((f"word{i} Ada went to Rome {i}", {"Ada": "person", "Rome": "place"}) for i in range(24)))


def test_two_voters_of_a_model_read_pool_and_texts_once(tmp_path: Path) -> None:
    pool, engine, cache = towns(), ScriptedEngine(read=char_states, n_layers=10), ArrayCache(tmp_path)
    spans, tags = voters_of(engine, cache)
    tables = fit_on([spans, tags], pool, lambda _: None)
    assert len(engine.requests) == len(pool.sentences)
    assert [table.units for table in tables["tagging"]] == [table.units for table in tables["reading"]]
    sentence, own = Sentence("1", "word9 Ada went to Rome 99"), [Span(6, 9), Span(18, 22), Span(10, 14)]
    votes = {voter.name: voter.vote([sentence], [own])[0] for voter in (tags, spans)}
    assert len(engine.requests) == len(pool.sentences) + 1
    assert [rows.argmax(axis=1).tolist() for rows in votes.values()] == [[0, 1, 2]] * 2
    assert (votes["tagging"] != votes["reading"]).any()

    silent = ScriptedEngine(n_layers=10)  # would raise if it were read
    for name, stored in fit_on(voters_of(silent, cache), pool, lambda _: None).items():
        assert all((a.logp == b.logp).all() for a, b in zip(tables[name], stored, strict=True))
    _, alone = voters_of(ScriptedEngine(read=char_states, n_layers=10), ArrayCache(tmp_path / "other"))
    assert all(
        (a.logp == b.logp).all() for a, b in zip(tables["tagging"], alone.fit(pool, lambda _: None), strict=True)
    )


def test_what_was_fitted_comes_back_and_turns_features_once(tmp_path: Path) -> None:
    pool, cache = towns(), ArrayCache(tmp_path)
    before = voters_of(ScriptedEngine(read=char_states, n_layers=10), cache)
    fit_on(before, pool, lambda _: None)
    sentence, own = Sentence("1", "word9 Ada went to Rome 99"), [Span(6, 9)]
    after = voters_of(ScriptedEngine(read=char_states, n_layers=10), cache)
    for voter, fitted in zip(after, before, strict=True):
        voter.restore(fitted.state())
    assert after[0]._projection is after[1]._projection
    for voter, fitted in zip(after, before, strict=True):
        assert (voter.vote([sentence], [own])[0] == fitted.vote([sentence], [own])[0]).all()


def test_a_voter_that_forgets_is_not_read_for(tmp_path: Path) -> None:
    pool, engine = towns(), ScriptedEngine(read=char_states, n_layers=10)
    spans, tags = voters_of(engine, ArrayCache(tmp_path))
    fit_on([spans, tags], pool, lambda _: None)
    tags.forget()
    spans.tables([Sentence("1", "Ada")])
    assert not tags._known
    with pytest.raises(RuntimeError, match="before fit"):
        tags.tables([Sentence("1", "Ada")])
    with pytest.raises(RuntimeError, match="before fit"):
        tags.state()


def test_what_is_said_about_a_pool_sentence_does_not_come_from_its_own_fold(tmp_path: Path) -> None:
    """A word that is an entity in one fold only is learnt by the final fit, but unknown to that fold's own table."""
    odd = "zz 中 went 文 home"  # two names: the copies in which they are swapped belong to the same fold
    pool = pool_of(
        *((f"w{i} Ada went home {i}", {"Ada": "person"}) for i in range(40)), (odd, {"中": "place", "文": "place"})
    )
    _, tags = voters_of(ScriptedEngine(read=char_states, n_layers=10), ArrayCache(tmp_path))
    tables = tags.fit(pool, lambda _: None)
    position = next(i for i, d in enumerate(pool.sentences) if d.text == odd)
    assert Span(3, 4) in tables[position].units  # else its row would be that of a span nobody knows
    out_of_fold = np.exp(tables[position].rows([Span(3, 4)]))[0, 1]
    final = np.exp(tags.tables([Sentence("1", odd)])[0].rows([Span(3, 4)]))[0, 1]
    assert final > 10 * out_of_fold


def test_what_is_trained_is_what_is_scored() -> None:
    """Of sentences of two tasks in one batch: the loss is that of the tags under each task's own chain."""
    corpus = planted(0)
    merged = Corpus(corpus.values, corpus.starts, [[(f, last, 0)] for ((f, last, _),) in corpus.targets])
    settings = FitSettings(hidden=7, dropout=0.0, feature_dropout=0.0)
    net = TagNet(2, 5, [3, 2], 3, settings, torch.Generator().manual_seed(1))
    for tensor in net.weights.values():
        tensor.data.normal_(generator=torch.Generator().manual_seed(2))
    tasks = [Material(corpus, range(2), 2), Material(merged, range(2, 4), 1)]
    words = _gather(tasks, 3)
    chosen = [2, 0, 3]  # sentences of both tasks, in any order
    picked = torch.cat([torch.arange(*words.sentences[i]) for i in chosen])
    loss = net.loss(words.values(chosen), words, picked, torch.Generator())
    expected = 0.0
    for i in chosen:
        task = 0 if i < 2 else 1
        for e, tagger in enumerate(net.heads()):
            output, bias, moves = (net.weights[f"{n} {task}"][e].detach() for n in ("output", "bias", "transitions"))
            seen = torch.from_numpy(tagger.among_neighbours(corpus.values[8 * i : 8 * i + 8]))
            tags = torch.from_numpy(tags_of(8, (corpus if task == 0 else merged).targets[i]))
            said = log_likelihood((seen @ output + bias)[None], moves[None], torch.from_numpy(allowed(len(bias))),
                                  torch.tensor([0]), torch.tensor([8]), tags)  # fmt: skip
            expected -= float(said)
    assert loss.item() == pytest.approx(expected / len(picked), rel=1e-5)


def test_who_gets_a_tagging_voter() -> None:
    def of_size(n: int) -> Pool:
        labelled = (LabelledSpan(0, 3, "person"),)
        return Pool(tuple(Demonstration(str(i), f"Ada {i}", labelled) for i in range(n)), towns().labels)

    auto = Preparation(make_config({}))
    assert [auto.wants_tagging(of_size(n)) for n in (600, 601)] == [False, True]
    assert Preparation(make_config({"voters": ["tagging"]})).wants_tagging(of_size(30))
    assert Preparation(make_config({"voters": "all"})).wants_tagging(of_size(30))
    assert not Preparation(make_config({"voters": ["reading"]})).wants_tagging(of_size(700))
    assert not Preparation(make_config({"preset": "paper"})).wants_tagging(of_size(700))
    with pytest.raises(ConfigError, match="members only, not tagging"):
        make_config({"preset": "paper", "voters": ["tagging"]})
    for name in ("tagging", "tagging.a"):
        with pytest.raises(ConfigError, match="is the name of a voter"):
            make_config({"members": [{"name": name, "source": "embedded:smollm2", "variant": "ask"}]})


def test_each_model_has_a_reading_and_a_tagging_voter() -> None:
    engines = {f"model-{name}": ScriptedEngine(read=char_states, n_layers=10) for name in "ab"}
    members = [{"name": name, "source": f"model-{name}", "variant": "ask"} for name in "ab"]
    config = make_config({"members": members, "voters": "all", "reading": {"encoder_depths": []}})
    readers = Preparation(config, engines=dict(engines)).readers(towns())
    assert [(voter.name, voter.kind) for voter in readers] == [
        ("reading.a", "spans"), ("reading.b", "spans"), ("tagging.a", "tags"), ("tagging.b", "tags")
    ]  # fmt: skip
    assert readers[0].reader is readers[2].reader
    assert readers[1].reader is readers[3].reader
    assert readers[0].reader is not readers[1].reader
