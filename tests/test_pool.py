"""The pool: one canonical order, folds by content, its strings in other texts, deterministic samples; decoding."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from el4ner.decoding import keep, keep_flat, log_odds
from el4ner.errors import LabelsError, PoolError
from el4ner.pool import Pool, PoolStrings, labels_of, load_pool
from el4ner.records import Demonstration, Label, LabelledSpan, Span
from el4ner.text import words

LABELS = (Label("person"), Label("place"))


def demonstration(text: str, identifier: str = "x", **entities: str) -> Demonstration:
    found = []
    for name, label in entities.items():
        surface = name.replace("_", " ")
        found.append(LabelledSpan(text.index(surface), text.index(surface) + len(surface), label))
    return Demonstration(identifier, text, tuple(found))


SENTENCES = (
    demonstration("Ada Lovelace lived in London.", "1", Ada_Lovelace="person", London="place"),
    demonstration("It rained in Rome.", "2", Rome="place"),
    demonstration("Nobody came.", "3"),
    demonstration("nobody  CAME.", "4"),
    demonstration("Rome is old.", "5", Rome="place"),
    demonstration("Alan Turing was here.", "6", Alan_Turing="person"),
)


@settings(deadline=None)
@given(st.permutations(SENTENCES))
def test_the_order_of_the_pool_changes_nothing(sentences: list[Demonstration]) -> None:
    pool, same = Pool(tuple(sentences), LABELS), Pool(SENTENCES, LABELS)
    assert pool.sentences == same.sentences
    assert (pool.content, pool.folds, pool.sample(3)) == (same.content, same.folds, same.sample(3))


def test_content_sees_texts_entities_and_labels_but_not_ids() -> None:
    pool = Pool(SENTENCES, LABELS)
    renamed = Pool(tuple(Demonstration("other", d.text, d.entities) for d in SENTENCES), LABELS)
    assert renamed.content == pool.content
    assert Pool(SENTENCES, (Label("person", "Humans."), Label("place"))).content != pool.content
    assert Pool(SENTENCES[1:], LABELS).content != pool.content
    bare = Demonstration("1", SENTENCES[0].text, SENTENCES[0].entities[:1])
    assert Pool((bare, *SENTENCES[1:]), LABELS).content != pool.content


def test_copies_of_a_text_share_a_fold_whatever_their_case_and_spacing() -> None:
    texts = [f"Sentence number {i} is here." for i in range(60)]
    copies = [text.upper().replace(" ", "\t ") for text in texts]
    pool = Pool(tuple(Demonstration(str(i), t, ()) for i, t in enumerate(texts + copies)), LABELS)
    fold = dict(zip((d.text for d in pool.sentences), pool.folds, strict=True))
    assert all(fold[text] == fold[copy] for text, copy in zip(texts, copies, strict=True))
    assert set(pool.folds) == set(range(5))


def test_neighbours_by_a_rare_string_share_a_fold_and_folds_are_even() -> None:
    """Forty documents of three sentences each about somebody, who visits the capital that everybody visits."""
    sentences = [
        demonstration(f"Mr{d} {verb} Paris on day {d}.", f"{d}{verb}", **{f"Mr{d}": "person", "Paris": "place"})
        for d in range(40)
        for verb in ("left", "saw", "liked")
    ]
    pool = Pool(tuple(sentences), LABELS)
    folds: dict[str, set[int]] = {}
    for d, fold in zip(pool.sentences, pool.folds, strict=True):
        folds.setdefault(d.text.split()[0], set()).add(fold)
    assert all(len(own) == 1 for own in folds.values())
    sizes = [pool.folds.count(fold) for fold in range(5)]
    assert max(sizes) - min(sizes) <= 3
    # a string that runs through the whole pool must not pull it into one fold, nor may a long chain of rare ones
    chain = [
        demonstration(f"Mr{d} met Mr{d + 1} at {d}.", str(d), **{f"Mr{d}": "person", f"Mr{d + 1}": "person"})
        for d in range(100)
    ]
    folds_of_chain = Pool(tuple(chain), LABELS).folds
    assert max(folds_of_chain.count(fold) for fold in range(5)) <= 25


def test_strings_are_found_at_word_borders_as_written() -> None:
    pool = Pool(SENTENCES, LABELS)
    text = "Rome, Romeo and rome; Ada Lovelace in Rome"
    found = [text[a:b] for a, b in pool.strings.find(text, words(text))]
    assert found == ["Rome", "Ada Lovelace", "Rome"]
    assert PoolStrings(["", "  "]).find("a  b", words("a  b")) == []
    assert pool.strings.find("", []) == []


def test_strings_without_a_fold_are_those_that_occur_outside_it() -> None:
    pool = Pool(SENTENCES, LABELS)
    text = "Ada Lovelace, Alan Turing, London and Rome"
    for fold in range(pool.n_folds):
        outside = {d.text[e.start : e.end] for d, own in zip(pool.sentences, pool.folds, strict=True) if own != fold
                   for e in d.entities}  # fmt: skip
        found = pool.strings_without(fold).find(text, words(text))
        assert {text[a:b] for a, b in found} == outside


def test_samples_are_nested_and_ascending() -> None:
    pool = Pool(SENTENCES, LABELS)
    for size in range(1, 8):
        sample = pool.sample(size)
        assert sample == sorted(set(sample))
        assert len(sample) == min(size, len(SENTENCES))
        assert set(pool.sample(size - 1)) <= set(sample)


def test_a_label_that_the_labels_file_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match=r"sentence .\d. .*uses label 'person'.*choose from place"):
        Pool(SENTENCES, (Label("place"),), name="p.jsonl")
    pool_path, labels_path = tmp_path / "pool.jsonl", tmp_path / "labels.yaml"
    pool_path.write_text(json.dumps({"text": "Rome", "entities": [{"start": 0, "end": 4, "label": "place"}]}) + "\n")
    labels_path.write_text("- {name: person, definition: A human.}\n")
    with pytest.raises(PoolError, match=r"'place', which .*labels\.yaml does not define"):
        load_pool(str(pool_path), str(labels_path))


def test_a_span_has_one_label_the_first_that_is_listed() -> None:
    place, person = LabelledSpan(0, 4, "place"), LabelledSpan(0, 4, "person")
    inside = LabelledSpan(0, 2, "person")
    both = Demonstration("x", "Rome", (place, inside, person))
    pool = Pool((both, *SENTENCES), LABELS)
    (kept,) = (d for d in pool.sentences if d.text == "Rome")
    assert kept.entities == (place, inside)  # nested ones are two spans
    assert pool.second_labels == 1
    assert pool.content == Pool((Demonstration("x", "Rome", (place, inside)), *SENTENCES), LABELS).content
    assert Pool(SENTENCES, LABELS).second_labels == 0


def test_second_labels_of_a_file_are_warned_about(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    entities = [{"start": 0, "end": 4, "label": label} for label in ("place", "person")]
    path.write_text((json.dumps({"text": "Rome", "entities": entities}) + "\n") * 2)
    with pytest.warns(UserWarning, match=r"pool\.jsonl: 2 spans have two labels, of which only the first counts"):
        pool = load_pool(str(path), None)
    assert [d.entities for d in pool.sentences] == [(LabelledSpan(0, 4, "place"),)] * 2
    assert pool.label_names == ("person", "place")


def test_columns_are_a_pool_and_builtin_may_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pool.conll").write_text("Rome B-place\nis O\nold O\n")
    pool = load_pool("pool.conll", None)
    assert [(d.text, d.entities) for d in pool.sentences] == [("Rome is old", (LabelledSpan(0, 4, "place"),))]
    Path("builtin").write_text('{"text": "Rome", "entities": [{"start": 0, "end": 4, "label": "place"}]}\n')
    assert len(load_pool("builtin", None).sentences) > 1
    assert len(load_pool("./builtin", None).sentences) == 1


def test_where_labels_come_from(tmp_path: Path) -> None:
    path, labels_path = tmp_path / "pool.jsonl", tmp_path / "labels.yaml"
    path.write_text(json.dumps({"text": "Rome", "entities": [{"start": 0, "end": 4, "label": "place"}]}) + "\n")
    labels_path.write_text("- {name: person, definition: A human.}\n- {name: place, definition: A place.}\n")
    assert load_pool(str(path), None).labels == (Label("place"),)
    assert load_pool(str(path), str(labels_path)).label_names == ("person", "place")
    zero_shot = load_pool(None, str(labels_path))
    assert (zero_shot.sentences, zero_shot.label_names) == ((), ("person", "place"))
    builtin = load_pool(None, None)
    assert len(builtin.sentences) >= 300
    assert load_pool("builtin", None).content == builtin.content
    assert labels_of(SENTENCES) == LABELS
    path.write_text(json.dumps({"text": "Nothing", "entities": []}) + "\n")
    with pytest.raises(LabelsError, match="no sentence has an entity"):
        load_pool(str(path), None)


# Decoding


def gains_of(scores: list[float], threshold: float, reference: float) -> list[float]:
    values = np.array(scores, dtype=np.float64)
    return list(np.maximum(log_odds(values) - log_odds(np.array(max(threshold, reference))), 1e-3 * values))


def best_by_trying_all(spans: list[Span], scores: list[float], threshold: float, reference: float) -> float:
    gains = gains_of(scores, threshold, reference)
    usable = [i for i in range(len(spans)) if scores[i] >= threshold and scores[i] > 0]
    best = 0.0
    for size in range(1, len(usable) + 1):
        for chosen in combinations(usable, size):
            own = sorted(spans[i] for i in chosen)
            if all(a.end <= b.start for a, b in pairwise(own)):
                best = max(best, sum(gains[i] for i in chosen))
    return best


SPAN = st.tuples(st.integers(0, 12), st.integers(1, 6)).map(lambda pair: Span(pair[0], pair[0] + pair[1]))
SCORED = st.dictionaries(SPAN, st.floats(0, 1, width=32), max_size=9)
SHARE = st.floats(0, 1, width=32)


@settings(deadline=None)  # the first call compiles
@given(SCORED, SHARE, SHARE)
def test_flat_decoding_finds_the_best_set(scored: dict[Span, float], threshold: float, reference: float) -> None:
    spans, scores = list(scored), list(scored.values())
    kept = keep_flat(spans, scores, threshold, reference)
    assert kept == sorted(set(kept))
    own = sorted(spans[i] for i in kept)
    assert all(a.end <= b.start for a, b in pairwise(own))
    assert all(scores[i] >= threshold and scores[i] > 0 for i in kept)
    gains = gains_of(scores, threshold, reference)
    reached = sum(gains[i] for i in kept)
    # best_flat adds in float32: log-odds reach 28, so sums of nine are exact to about 1e-4
    assert reached == pytest.approx(best_by_trying_all(spans, scores, threshold, reference), abs=1e-4)
    # what overlaps nothing is kept, however little it gains
    usable = [i for i in range(len(spans)) if scores[i] >= threshold and scores[i] > 0]
    for i in usable:
        if not any(j != i and spans[j].start < spans[i].end and spans[i].start < spans[j].end for j in usable):
            assert i in kept


@pytest.mark.parametrize("score", [0.3, 0.4, 0.5])
def test_parts_of_a_name_do_not_win_under_a_low_threshold(score: float) -> None:
    spans = [Span(0, 9), Span(0, 4), Span(5, 9)]
    assert keep_flat(spans, [0.95, score, score], 0.0, 0.5) == [0]
    assert keep_flat(spans, [0.95, score, score], 0.0, 0.18) == [0]
    assert keep_flat(spans, [0.55, 0.6, 0.6], 0.0, 0.5) == [1, 2]  # but good parts do
    assert keep_flat(spans, [1.0, 2 / 3, 2 / 3], 0.0, 0.5) == [0]  # all of three members against two of them


def test_a_weak_span_beside_strong_ones_is_kept() -> None:
    spans = [Span(4 * i, 4 * i + 3) for i in range(40)]
    scores = [1.0] * 39 + [1e-3]
    assert keep_flat(spans, scores, 0.0, 0.5) == list(range(40))


@settings(deadline=None)
@given(st.permutations([(Span(0, 4), 0.62), (Span(5, 9), 0.62), (Span(0, 9), 0.7), (Span(10, 12), 0.5)]))
def test_the_order_of_candidates_does_not_matter(scored: list[tuple[Span, float]]) -> None:
    spans, scores = [span for span, _ in scored], [score for _, score in scored]
    assert {spans[i] for i in keep_flat(spans, scores, 0.5, 0.0)} == {Span(0, 4), Span(5, 9), Span(10, 12)}


def test_ties_and_thresholds() -> None:
    same = [Span(0, 3), Span(2, 5)]
    assert keep_flat(same, [0.7, 0.7], 0.5, 0.0) == [0]
    assert keep_flat(same[::-1], [0.7, 0.7], 0.5, 0.0) == [1]  # the earlier span again
    assert keep_flat([Span(0, 3)], [0.5], 0.5, 0.0) == [0]  # exactly at the threshold
    assert keep_flat([Span(0, 3)], [0.4999], 0.5, 0.0) == []
    assert keep_flat([Span(0, 3)], [0.0], 0.0, 0.0) == []  # 0 stands for "beaten by none"
    assert keep_flat([], [], 0.5, 0.0) == []


def test_nested_keeps_every_span_above_the_threshold() -> None:
    spans = [Span(0, 9), Span(0, 4), Span(5, 9)]
    assert keep(spans, [0.9, 0.3, 0.6], 0.5, "nested", 0.0) == [0, 2]
    assert keep(spans, [0.9, 0.3, 0.6], 0.5, "flat", 0.0) == [0]
    assert keep(spans, [0.0, 0.1, 0.2], 0.0, "nested", 0.0) == [1, 2]
