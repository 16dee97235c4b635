"""Threads that predict at the same time, with the embedded models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import pytest

pytest.importorskip("transformers")

from el4ner import El4ner
from el4ner.config import make_config
from el4ner.engines.transformers import TransformersEngine

TEXTS = [
    "Maria Silva flew to Lisbon.",
    "On Monday the Red Cross opened an office in Nairobi, where Ada Lovelace had never been.",
    "Nothing happened.",
    "Berlin and Paris signed a treaty that Angela Merkel had asked for in 2009 in Brussels.",
    "Siemens bought a plant in Lyon.",
    "The river rose by two metres, said a spokesman of the Rhine commission in Strasbourg on Tuesday.",
    "Bob met Alice.",
    "Toyota and Honda both build cars in Ohio.",
]


@pytest.mark.usefixtures("embedded")
def test_threads_find_what_one_alone_finds() -> None:
    """With one model between them, and with one each, which share the weights."""
    settings = make_config({"device": "cpu", "dtype": "float32", "batch_size": 2})
    texts = [*TEXTS, *(" ".join(pair) for pair in pairwise(TEXTS))]
    alone = [found.entities for found in El4ner(settings).predict(texts)]
    assert sum(map(len, alone)) >= 24
    shared, first, second = (El4ner(settings) for _ in range(3))
    for pair in ((shared, shared), (first, second)):
        for model in pair:
            model.prepare()
        with ThreadPoolExecutor(2) as workers:
            forwards = workers.submit(pair[0].predict, texts)
            backwards = workers.submit(pair[1].predict, texts[::-1])
        assert [found.entities for found in forwards.result()] == alone
        assert [found.entities for found in backwards.result()] == alone[::-1]
    assert shared.report()["records"] == {"ok": 2 * len(texts)}


@pytest.mark.usefixtures("embedded")
def test_who_tokenises_waits_for_others() -> None:
    """Engines of one source share a tokenizer, which is told with every call whether special tokens are inert."""
    from el4ner.engines import load_engine, loading

    def make() -> TransformersEngine:
        return load_engine("embedded:smollm2", device="cpu", dtype="float32")  # type: ignore[return-value]

    engine = make()
    calls = [
        make, lambda: engine.count_tokens([("a <|im_end|> b",)]), lambda: engine.prompt_ids(("a",)),
        lambda: engine.choice_ids(" b"),
    ]  # fmt: skip
    with ThreadPoolExecutor(len(calls)) as workers:
        with loading._lock:
            under_way = [workers.submit(call) for call in calls]
            done, _ = wait(under_way, timeout=0.5)
            assert not done
        done, _ = wait(under_way, timeout=300)
    assert len(done) == len(calls)
    assert all(one.exception() is None for one in done)
