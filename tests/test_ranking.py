"""Demonstrations by other means than spans: the same pool sentences, other orders, never the sentence's own copy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from el4ner.cache import ArrayCache
from el4ner.config import RetrieveConfig
from el4ner.pool import Pool, labels_of
from el4ner.records import Demonstration, LabelledSpan, Sentence
from el4ner.stages.ranking import Bm25Ranking, RandomRanking, SentenceRanking, best
from el4ner.stages.retrieve import Retriever


class Letters:
    """Encodes a text as counts of letters."""

    source = "letters"
    n_layers = 1

    def encode(self, texts: Any) -> np.ndarray:
        rows = np.array([[t.count(c) for c in "abcdefgh"] for t in texts], dtype=np.float32).reshape(len(texts), 8)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

    def read(self, texts: Any, layers: Any) -> Any:
        raise AssertionError("not asked")


def test_best_breaks_ties_by_position() -> None:
    scores = np.array([1.0, 3.0, 3.0, -np.inf, 2.0])
    assert best(scores, 3, ()) == [1, 2, 4]
    assert best(scores, 9, {1}) == [2, 4, 0]
    assert best(scores, 0, ()) == []


def test_bm25_is_the_formula() -> None:
    pool = ["a cat sat", "the cat and the dog", "nothing"]
    mean = (3 + 5 + 1) / 3
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    wanted = idf * 1 * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 3 / mean))
    scores = Bm25Ranking(pool).scores("Cat Cat bird")
    assert scores[0] == pytest.approx(wanted)
    assert scores[0] > scores[1] > scores[2] == 0
    assert Bm25Ranking(pool).top(["dog cat", "cat"], 2, [(), {0}]) == [[1, 0], [1, 2]]
    assert Bm25Ranking([]).top(["x"], 2, [()]) == [[]]
    assert Bm25Ranking(["", "  "]).scores("x").tolist() == [0, 0]


def test_random_is_the_same_for_the_same_text_and_seed() -> None:
    first = RandomRanking(50, 1).top(["a", "b"], 5, [(), {1, 2}])
    assert first == RandomRanking(50, 1).top(["a", "b"], 5, [(), {1, 2}])
    assert first[0] != first[1]
    assert first != RandomRanking(50, 2).top(["a", "b"], 5, [(), {1, 2}])
    assert RandomRanking(3, 0).top(["a"], 9, [{1}])[0] in ([0, 2], [2, 0])


def test_sentences_rank_by_cosine(tmp_path: Path) -> None:
    ranking = SentenceRanking(["aab", "cc", "abb"], Letters(), ArrayCache(tmp_path))
    assert ranking.top(["ab", "c"], 2, [(), ()]) == [[0, 2], [1, 0]]
    assert SentenceRanking([], Letters(), ArrayCache(tmp_path)).top(["a"], 2, [()]) == [[]]


@pytest.mark.parametrize("by", ["spans", "sentence", "bm25", "random"])
def test_every_kind_leaves_out_copies_folds_and_empty_sentences(by: Any, tmp_path: Path) -> None:
    texts = ["ab cd", "ab ef", "cd gh", "ab gh", "cd ef"]
    demonstrations = [Demonstration(t, t, (LabelledSpan(0, 2, "x"),)) for t in texts]
    pool = Pool((*demonstrations, Demonstration("none", "ab ab", ())), labels_of(demonstrations), 2)
    retriever = Retriever(pool, Letters(), RetrieveConfig(k=9, by=by), ArrayCache(tmp_path), seed=1)
    sentence = Sentence("1", "ab cd")
    spans = [[LabelledSpan(0, 2, "x").span]]
    (found,) = retriever.find([sentence], spans)
    assert sorted(d.text for d in found) == sorted(texts[1:])
    (folded,) = retriever.find([sentence], spans, [0])
    inside = {d.text for d, fold in zip(pool.sentences, pool.folds, strict=True) if fold == 0}
    assert sorted(d.text for d in folded) == sorted(set(texts[1:]) - inside)
