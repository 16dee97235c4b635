"""The read-out of hidden states: what it computes, how it is fitted, along which directions it reads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from el4ner.engines.base import FloatArray
from el4ner.errors import ShapeError
from el4ner.voters.fitting import Corpus, FitSettings, FitStopped, Material, fit_readouts, fit_taggers, one_thread_each
from el4ner.voters.projection import Projection, fit_projection
from el4ner.voters.reading_fit import Begin, fit_sets
from el4ner.voters.readout import PARTS, Readout, mean_log_probabilities
from el4ner.voters.span_net import SpanNet
from el4ner.voters.word_layers import Head

# Read-out


def random_readout(seed: int, hidden: int = 0, width: int = 6, columns: int = 3, max_words: int = 4) -> Readout:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> FloatArray:
        return rng.normal(size=shape).astype(np.float32)

    return Readout(
        word=draw(width, hidden),
        word_bias=draw(hidden),
        mix=draw(3 * hidden, hidden) * np.float32(0.3),
        mix_bias=draw(hidden),
        parts=draw(len(PARTS), hidden or width, hidden or columns),
        hidden=draw(max_words, hidden),
        output=draw(hidden, columns) * np.float32(0.1) if hidden else np.zeros((0, columns), np.float32),
        bias=draw(max_words, columns),
    )


@pytest.mark.parametrize("hidden", [0, 7])
@pytest.mark.parametrize("context", [True, False])
def test_what_is_trained_is_what_is_scored(context: bool, hidden: int) -> None:
    """The differentiable scores of a batch's spans equal the prefix-sum scores of each sentence alone."""
    readout = random_readout(0, hidden)
    if not context:
        readout.parts[3:] = 0.0
    rng = np.random.default_rng(1)
    lengths = [5, 1, 3, 9]
    values = rng.normal(size=(sum(lengths), 6)).astype(np.float32)
    left = torch.cat([torch.arange(n, 0, -1) for n in lengths])
    settings = FitSettings(hidden=hidden, dropout=0.0, feature_dropout=0.0, context=context)
    net = SpanNet(2, 6, [3], readout.max_words, settings, torch.Generator())
    for name, weight in net.weights.items():
        own = torch.from_numpy(getattr(readout, name))
        weight.data[1] = torch.cat(list(own), dim=1) if name == "parts" else own
    valid = torch.arange(readout.max_words) < left[:, None]
    first, length = valid.nonzero(as_tuple=True)
    scores = net.scores(torch.from_numpy(values), left, first, length).detach()[1]
    trained = np.full((*valid.shape, 3), -np.inf, np.float32)
    trained[valid.numpy()] = torch.log_softmax(scores, dim=1).numpy()
    begin = 0
    for n_words in lengths:
        alone = readout.log_probabilities(values[begin : begin + n_words])
        i, n = np.indices(alone.shape[:2])
        assert (np.isfinite(alone[:, :, 0]) == (i + n < n_words)).all()
        # two orders of float32 sums over a few numbers of size 100
        np.testing.assert_allclose(alone, trained[begin : begin + n_words], atol=1e-4)
        np.testing.assert_allclose(np.exp(alone[i + n < n_words]).sum(axis=1), 1, atol=1e-5)
        begin += n_words


@pytest.mark.parametrize("hidden", [0, 7])
def test_the_formula_word_by_word(hidden: int) -> None:
    readout = random_readout(3, hidden)
    values = np.random.default_rng(2).normal(size=(6, 6)).astype(np.float32)
    x = values
    if hidden:
        h = [np.maximum(row @ readout.word + readout.word_bias, 0) for row in x]
        none = np.zeros_like(h[0])
        around = [
            np.concatenate([h[t - 1] if t else none, h[t], h[t + 1] if t + 1 < len(h) else none]) for t in range(len(h))
        ]
        x = [own + np.maximum(both @ readout.mix + readout.mix_bias, 0) for own, both in zip(h, around, strict=True)]
    first, mean, last, left, right = readout.parts
    for i, j in ((2, 4), (0, 1), (4, 5)):
        u = x[i] @ first + np.mean([row @ mean for row in x[i : j + 1]], axis=0) + x[j] @ last
        if i > 0:
            u = u + x[i - 1] @ left
        if j < 5:
            u = u + x[j + 1] @ right
        if hidden:
            u = np.maximum(u + readout.hidden[j - i], 0) @ readout.output
        z = u + readout.bias[j - i]
        expected = z - np.log(np.exp(z).sum())
        np.testing.assert_allclose(readout.log_probabilities(values)[i, j - i], expected, atol=1e-4)


def test_several_heads_are_averaged_in_probability() -> None:
    heads = (random_readout(0, 7), random_readout(1, 7))
    values = np.random.default_rng(2).normal(size=(6, 6)).astype(np.float32)
    both = mean_log_probabilities(heads, values)
    each = [np.exp(head.log_probabilities(values)) for head in heads]
    np.testing.assert_allclose(np.exp(both), (each[0] + each[1]) / 2, atol=1e-6)
    assert np.isneginf(both[5, 1]).all()  # leaves the sentence
    assert (mean_log_probabilities(heads[:1], values) == heads[0].log_probabilities(values)).all()


def test_a_readout_takes_no_words_and_refuses_other_features() -> None:
    readout = random_readout(0)
    assert readout.log_probabilities(np.zeros((0, 6), np.float32)).shape == (0, 4, 3)
    with pytest.raises(ShapeError, match=r"values \(2, 5\); the read-out was fitted on \(words, 6\)"):
        readout.log_probabilities(np.zeros((2, 5), np.float32))
    back = Readout.from_arrays(readout.to_arrays())
    values = np.ones((3, 6), np.float32)
    assert (back.log_probabilities(values) == readout.log_probabilities(values)).all()


def planted(seed: int, n_sentences: int = 120) -> Corpus:
    """Runs of words with a large first feature are label 0, with a large second feature label 1; two words long."""
    rng = np.random.default_rng(seed)
    values, starts, targets = [], [0], []
    for _ in range(n_sentences):
        block = rng.normal(size=(8, 5)).astype(np.float32)
        label, at = int(rng.integers(2)), int(rng.integers(1, 6))
        block[at : at + 2, label] += 6.0
        values.append(block)
        starts.append(starts[-1] + 8)
        targets.append([(at, at + 1, label)])
    return Corpus(np.concatenate(values), np.array(starts), targets)


def right_of(fitted: Head, corpus: Corpus) -> int:
    """In how many of the last 20 sentences the likeliest entity is the planted one."""
    right = 0
    for s in range(100, 120):
        logp = fitted.log_probabilities(corpus.values[8 * s : 8 * s + 8])
        best = np.unravel_index(np.where(np.isfinite(logp[:, :, :-1]), logp[:, :, :-1], -99).argmax(), (8, 3, 2))
        ((first, last, label),) = corpus.targets[s]
        right += tuple(best) == (first, last - first, label)
    return right


@pytest.mark.parametrize("fit", [fit_readouts, fit_taggers])
@pytest.mark.parametrize("settings", [FitSettings(hidden=0), FitSettings(hidden=16)])
def test_fitting_learns_a_planted_concept_and_is_deterministic(settings: FitSettings, fit: Any) -> None:
    corpus = planted(0)
    (fitted,) = fit(Material(corpus, range(100), 2), 3, settings)
    assert right_of(fitted, corpus) >= 17
    torch.rand(3)  # a fit must not depend on what else drew random numbers
    (again,) = fit(Material(corpus, range(100), 2), 3, settings)
    assert all((a == b).all() for a, b in zip(fitted.to_arrays().values(), again.to_arrays().values(), strict=True))
    (other,) = fit(Material(corpus, range(100), 2), 3, settings, seed=1)
    assert any((a != b).any() for a, b in zip(fitted.to_arrays().values(), other.to_arrays().values(), strict=True))
    (unfitted,) = fit(Material(corpus, [], 2), 3, settings)
    assert np.isfinite(unfitted.log_probabilities(corpus.values[:8])[0]).all()


def test_a_fit_stops_when_it_is_told_to() -> None:
    stop = Event()
    stop.set()
    with pytest.raises(FitStopped):
        fit_readouts(Material(planted(0), range(100), 2), 3, FitSettings(hidden=0), stop=stop)


def test_an_interrupt_does_not_wait_for_the_other_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = []
    begun = Event()

    def fit(material: Material, *arguments: Any) -> None:
        if len(material.sentences) == 1:
            assert begun.wait(60)
            raise KeyboardInterrupt
        begun.set()
        stop: Event = arguments[-1]
        ended.append(stop.wait(60))
        raise FitStopped

    monkeypatch.setattr("el4ner.voters.reading_fit.fit_readouts", fit)
    monkeypatch.setenv("EL4NER_THREADS", "2")
    sets = [Material(planted(0), chosen, 2) for chosen in (range(1), range(2))]
    with pytest.raises(KeyboardInterrupt):
        fit_sets("spans", sets, 3, FitSettings(), Begin(0, 1, None, ()))
    assert ended == [True]


# Projection


def test_directions_are_the_principal_ones_and_plain_features_stay() -> None:
    rng = np.random.default_rng(5)
    wide = rng.normal(size=(300, 4)) @ rng.normal(size=(4, 40)) * 3 + 7 + rng.normal(size=(300, 40)) * 0.05
    values = np.concatenate([wide, rng.normal(size=(300, 9))], axis=1).astype(np.float32)
    found = fit_projection(values, (40, 6), 4)
    assert found.width == 4 + 4 + 3
    turned = found(values)
    standard = (values - values.mean(axis=0)) / values.std(axis=0)
    np.testing.assert_allclose(turned[:, 8:], standard[:, 46:], atol=0.02)
    for block, own in ((standard[:, :40], turned[:, :4]), (standard[:, 40:46], turned[:, 4:8])):
        _, sizes, principal = np.linalg.svd(block, full_matrices=False)
        # the scale has a thousandth added to it, so that constant features do no harm
        np.testing.assert_allclose(np.linalg.norm(own, axis=0), sizes[:4], rtol=0.01)
        cosines = np.abs(np.sum(own * (block @ principal[:4].T), axis=0)) / sizes[:4] ** 2
        assert cosines.min() > 0.98
    for basis in found.bases:
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
    back = Projection.from_arrays({**found.to_arrays(), "unaligned": np.array(3)})
    assert (back(values) == turned).all()
    with pytest.raises(ShapeError, match="49"):
        found(values[:, :5])


def test_a_projection_without_directions_only_standardises() -> None:
    values = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    values[:, 2] = 5.0
    found = fit_projection(values, (4,), 0)
    assert found.width == 6
    turned = found(values)
    np.testing.assert_allclose(turned[:, 0], (values[:, 0] - values[:, 0].mean()) / values[:, 0].std(), atol=0.01)
    assert (turned[:, 2] == 0).all()
    nothing = fit_projection(values[:0], (4,), 2)
    assert nothing(values).shape == (50, 6)
    assert np.isfinite(nothing(values)).all()
    # a block of fewer features than directions keeps them all
    assert fit_projection(values, (4,), 9).width == 6


# Fitting


def test_heads_differ_and_do_not_depend_on_fits_beside_them() -> None:
    corpus = planted(0)
    settings = FitSettings(hidden=16)
    heads = fit_readouts(Material(corpus, range(60), 2), 3, settings, heads=3)
    assert len({head.parts.tobytes() for head in heads}) == 3
    assert all(right_of(head, corpus) >= 15 for head in heads)
    with one_thread_each() as keep_to_one, ThreadPoolExecutor(2, initializer=keep_to_one) as workers:
        fits = [
            workers.submit(fit_readouts, Material(corpus, range(60), 2), 3, settings, seed, 2) for seed in (0, 1, 0)
        ]
        first, other, again = (fit.result() for fit in fits)
    for one, same in zip(first, again, strict=True):
        assert all((a == b).all() for a, b in zip(one.to_arrays().values(), same.to_arrays().values(), strict=True))
    assert (first[0].parts != other[0].parts).any()


def test_a_steep_gradient_of_one_head_shortens_no_other() -> None:
    net = SpanNet(2, 3, [3], 2, FitSettings(hidden=0), torch.Generator())
    for weight in net.weights.values():
        weight.grad = torch.zeros_like(weight)
    gradient = net.weights["bias"].grad
    assert gradient is not None
    gradient[0, 0, 0], gradient[1, 0, 0] = 50.0, 0.5
    net.clip_gradients(1.0)
    assert gradient[:, 0, 0].tolist() == pytest.approx([1.0, 0.5])


def test_what_is_fitted_beside_a_corpus_helps_it_and_leaves_no_columns() -> None:
    """The same concept under other label numbers, in many sentences beside few: the few are read better."""
    corpus, other = planted(0), planted(1)
    flipped = Corpus(other.values, other.starts, [[(f, last, 1 - label)] for ((f, last, label),) in other.targets])
    settings = FitSettings(hidden=16)
    few = Material(corpus, range(6), 2)
    (alone,) = fit_readouts(few, 3, settings)
    (beside,) = fit_readouts(few, 3, settings, beside=Material(flipped, range(120), 2))
    assert {k: v.shape for k, v in beside.to_arrays().items()} == {k: v.shape for k, v in alone.to_arrays().items()}
    assert log_likelihood(beside, corpus) > log_likelihood(alone, corpus) + 5


def log_likelihood(readout: Head, corpus: Corpus) -> float:
    """Of the entities planted in the last 20 sentences."""
    total = 0.0
    for s in range(100, 120):
        ((first, last, label),) = corpus.targets[s]
        total += float(readout.log_probabilities(corpus.values[8 * s : 8 * s + 8])[first, last - first, label])
    return total


def test_a_fit_that_begins_at_another_one_knows_what_an_entity_looks_like() -> None:
    """The same concept, fitted before under one label: a few sentences with two are read better from there."""
    corpus, other = planted(0), planted(1)
    merged = Corpus(other.values, other.starts, [[(f, last, 0)] for ((f, last, _),) in other.targets])
    settings = FitSettings(hidden=16)
    start = fit_readouts(Material(merged, range(120), 1), 3, settings, heads=2)
    few = Material(corpus, range(6), 2)
    (cold,), (warm,) = fit_readouts(few, 3, settings), fit_readouts(few, 3, settings, start=start)
    assert log_likelihood(warm, corpus) > log_likelihood(cold, corpus) + 5


def test_a_fit_begins_where_it_is_told_to() -> None:
    corpus, settings = planted(0), FitSettings(hidden=16)
    start = fit_readouts(Material(corpus, range(30), 2), 3, settings, heads=2)
    heads = fit_readouts(Material(corpus, [], 4), 5, settings, heads=3, start=start)  # no sentences: nothing moves
    for head, given in zip(heads, (*start, start[0]), strict=True):  # in turn
        for name in ("word", "word_bias", "mix", "mix_bias", "parts"):
            np.testing.assert_array_equal(getattr(head, name), getattr(given, name))
        np.testing.assert_array_equal(head.hidden, given.hidden[[0, 1, 2, 2, 2]])
        np.testing.assert_array_equal(head.output[:, -1], given.output[:, -1])
        np.testing.assert_array_equal(head.bias[:, -1], given.bias[[0, 1, 2, 2, 2], -1])
        assert np.abs(head.output[:, :-1]).max() < 0.3 * 16**-0.5
    (short,) = fit_readouts(Material(corpus, [], 2), 2, settings, start=start)
    np.testing.assert_array_equal(short.hidden, start[0].hidden[:2])
    for units in (8, 0):
        with pytest.raises(ShapeError, match="cannot begin at"):
            fit_readouts(Material(corpus, range(6), 2), 3, FitSettings(hidden=units), start=start)


def test_fitting_on_some_of_the_negatives_keeps_their_weight() -> None:
    """With a third of the non-entities, the share of probability given to entities stays what it is with all."""
    corpus = planted(0)
    shares = []
    for negatives in (1.0, 0.3):
        settings = FitSettings(hidden=16, dropout=0.0, feature_dropout=0.0, negatives=negatives)
        (fitted,) = fit_readouts(Material(corpus, range(100), 2), 3, settings)
        logp = [fitted.log_probabilities(corpus.values[8 * s : 8 * s + 8]) for s in range(100, 120)]
        shares.append(sum(float(1 - np.exp(p[..., -1][np.isfinite(p[..., -1])]).mean()) for p in logp) / len(logp))
    assert shares[0] == pytest.approx(1 / 21, abs=0.02)  # one entity among 21 spans
    assert shares[1] == pytest.approx(shares[0], abs=0.015)
