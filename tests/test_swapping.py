"""Copies of pool sentences with mentions swapped: of the same label and fold, offsets right, nothing else changed."""

from __future__ import annotations

import pytest

from el4ner.pool import Label, Pool
from el4ner.records import Demonstration, LabelledSpan
from el4ner.voters.swapping import copies_within, swapped

PLACES = ("Kiruna", "Zürich", "Las Palmas", "İzmir", "東京", "Bath", "Oulu", "Nairobi")
PEOPLE = ("Aki", "Mina Harker", "Jo", "Ødegård", "Li Wei", "Ana", "Bo", "Zoë")


def marked(identity: str, text: str, *entities: tuple[str, str]) -> Demonstration:
    spans = tuple(LabelledSpan(text.index(s), text.index(s) + len(s), label) for s, label in entities)
    return Demonstration(identity, text, spans)


def pool_of(*sentences: Demonstration, folds: int = 2) -> Pool:
    labels = sorted({e.label for d in sentences for e in d.entities})
    return Pool(sentences=sentences, labels=tuple(Label(name) for name in labels), n_folds=folds)


@pytest.fixture
def pool() -> Pool:
    sentences = [
        marked(str(i), f"{who} left 😀 {where} again.", (who, "person"), (where, "place"))
        for i, (who, where) in enumerate(zip(PEOPLE, PLACES, strict=True))
    ]
    return pool_of(*sentences, marked("none", "Nothing happened."))


def test_a_copy_differs_in_its_mentions_alone(pool: Pool) -> None:
    copies, origins = swapped(pool, 3)
    assert len(copies) > len(pool.sentences)
    for copy, origin in zip(copies, origins, strict=True):
        person, place = copy.entities
        assert (person.label, place.label) == ("person", "place")
        who, where = copy.text[person.start : person.end], copy.text[place.start : place.end]
        assert who in PEOPLE
        assert where in PLACES
        assert copy.text == f"{who} left 😀 {where} again." != pool.sentences[origin].text


def test_no_name_crosses_to_another_fold(pool: Pool) -> None:
    assert len(set(pool.folds)) == 2
    names: dict[int, set[str]] = {0: set(), 1: set()}
    for sentence, fold in zip(pool.sentences, pool.folds, strict=True):
        names[fold] |= {sentence.text[e.start : e.end] for e in sentence.entities}
    for copy, origin in zip(*swapped(pool, 8), strict=True):
        assert {copy.text[e.start : e.end] for e in copy.entities} <= names[pool.folds[origin]]


def test_copies_depend_on_content_and_seed_alone(pool: Pool) -> None:
    turned = pool_of(*reversed(pool.sentences))
    assert [c.text for c in swapped(turned, 2)[0]] == [c.text for c in swapped(pool, 2)[0]]
    assert [c.text for c in swapped(pool, 2, seed=1)[0]] != [c.text for c in swapped(pool, 2)[0]]
    assert swapped(pool, 0) == ([], [])


@pytest.mark.parametrize(("most", "copies"), [(0, 0), (15, 0), (16, 2), (31, 3), (10_000, 4)])
def test_copies_are_limited_in_all_and_by_sentence(pool: Pool, most: int, copies: int) -> None:
    assert copies_within(pool, most) == copies


def test_a_pool_without_entities_gets_no_copies() -> None:
    empty = pool_of(marked("1", "Nothing."))
    assert swapped(empty, copies_within(empty, 800)) == ([], [])


def test_what_lies_in_a_mention_goes_with_it() -> None:
    one = marked("1", "the GATA-1 gene here", ("GATA-1 gene", "dna"), ("GATA-1", "protein"))
    other = marked("2", "of a promoter there", ("promoter", "dna"))
    texts = {
        copy.text: [(copy.text[e.start : e.end], e.label) for e in copy.entities]
        for copy in swapped(pool_of(one, other, folds=1), 20)[0]
    }
    assert texts == {
        "the promoter here": [("promoter", "dna")],
        "of a GATA-1 gene there": [("GATA-1 gene", "dna"), ("GATA-1", "protein")],
    }


def test_entities_that_cross_are_left_alone() -> None:
    crossing = Demonstration("1", "a b c", (LabelledSpan(0, 3, "x"), LabelledSpan(2, 5, "x")))
    plain = marked("2", "d e", ("e", "x"))
    copies, _ = swapped(pool_of(crossing, plain, folds=1), 20)
    assert copies == []  # and its names go nowhere: the other sentence knows its own alone
