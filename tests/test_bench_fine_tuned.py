"""The supervised reference: training on a few sentences with the real embedded model, and a bounded, early end."""

from __future__ import annotations

import pytest

from el4ner import hub
from el4ner.bench.baseline_fine_tuned import FineTuned
from el4ner.bench.system import Workbench
from el4ner.bench.systems import make_system
from el4ner.bench.tagger import Tagger, TrainingSettings, strict_f1, tag_names, train
from el4ner.config import make_config
from el4ner.errors import EngineError, ModelNotFoundError
from el4ner.pool import Pool, labels_of
from el4ner.records import Demonstration, LabelledSpan, Sentence

pytestmark = pytest.mark.embedded


def labelled(text: str, *entities: tuple[str, str]) -> Demonstration:
    spans = tuple(LabelledSpan(text.index(s), text.index(s) + len(s), label) for s, label in entities)
    return Demonstration(text, text, spans)


SENTENCES = (
    labelled("Ada Lovelace saw Rome.", ("Ada Lovelace", "person"), ("Rome", "place")),
    labelled("it rains", ),
    labelled("Paris is far from Rome", ("Paris", "place"), ("Rome", "place")),
)  # fmt: skip


def test_a_silent_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: list[dict[str, object]] = []

    def from_pretrained(_: str, **options: object) -> None:
        asked.append(options)
        raise OSError("it is not there")

    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ModelNotFoundError, match="not in the local cache and not fetched"):
        Tagger.load("nobody/nothing", "cpu")
    assert asked == [{"trust_remote_code": False, "local_files_only": True}]


@pytest.fixture(params=["float32", "bfloat16"])
def small(request: pytest.FixtureRequest) -> Tagger:
    """A random model of two narrow layers that reads the embedded model's tokens, in both kinds of products."""
    import torch
    import transformers

    from el4ner.models import local_folder, resolve

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(local_folder(resolve("embedded:smollm2")))
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    dtype = getattr(torch, request.param)
    return Tagger(transformers.LlamaModel(config), tokenizer, "small", torch.device("cpu"), dtype)


def test_training_learns_its_sentences_and_keeps_the_best_epoch(small: Tagger) -> None:
    tagger = small
    tagger.begin(tag_names(["person", "place"]), 0, twice=True, max_tokens=64)
    before = strict_f1(tagger, SENTENCES)
    settings = TrainingSettings(epochs=60, steps=50, patience=60, rate=3e-3, warm_up=0.1, decay=0.0, rows=3, seed=0)
    history = train(tagger, SENTENCES, SENTENCES, settings, lambda _: None)
    assert len(history) == 50  # one update an epoch; the bound on updates ends it
    assert before < 0.5 < max(history)
    assert strict_f1(tagger, SENTENCES) == max(history)
    worse = TrainingSettings(epochs=9, steps=0, patience=1, rate=5.0, warm_up=0.0, decay=0.0, rows=3, seed=0)
    ruined = train(tagger, SENTENCES, SENTENCES, worse, lambda _: None)
    assert len(ruined) < 9  # no better for two epochs
    assert strict_f1(tagger, SENTENCES) == max(ruined)
    (cut, empty) = tagger.tag(["word " * 80, ""])
    assert cut.read_up_to is not None
    assert 0 < cut.read_up_to < 400
    assert (empty.entities, empty.read_up_to) == ((), None)


def test_the_system_trains_a_copy_of_the_embedded_model() -> None:
    """The real model, one update."""
    bench = Workbench(make_config({"device": "cpu"}), 4, 0)
    system = make_system("fine-tuned", bench, {}, {"fine-tuned": {"epochs": 1, "steps": 1, "held_out": 0.3}})
    assert isinstance(system, FineTuned)
    system.load()
    fresh = system._fresh
    assert fresh is not None
    first = next(iter(fresh.body.parameters())).clone()
    system.prepare(Pool(SENTENCES, labels_of(SENTENCES), 2), lambda _: None)
    assert first.equal(next(iter(fresh.body.parameters())))
    assert not first.equal(next(iter(system._tagger.body.parameters())))  # type: ignore[union-attr]
    (predicted,) = system.predict([Sentence("1", "Ada Lovelace saw Rome.")])
    assert predicted.status == "ok"
    assert all(0 <= e.score <= 1 and e.label in ("person", "place") for e in predicted.entities)
    assert system.models()["embedded:smollm2"].startswith("embedded:smollm2@")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_stay_float32_and_only_bfloat16_changes_the_products(dtype: str) -> None:
    import torch

    tagger = Tagger.load("embedded:smollm2", "cpu", dtype)
    tagger.begin(tag_names(["person"]), 0, twice=False, max_tokens=64)
    assert {parameter.dtype for parameter in tagger.parameters()} == {torch.float32}
    assert tagger.source.endswith("products in bfloat16)") == (dtype == "bfloat16")
    (scores,) = tagger.scores(tagger.rows(["Ada Lovelace saw Rome."]))
    assert scores.dtype == torch.float32
    tagger.dtype = torch.float32
    (exact,) = tagger.scores(tagger.rows(["Ada Lovelace saw Rome."]))
    assert torch.equal(scores, exact) == (dtype != "bfloat16")
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.1)


def test_a_server_cannot_be_trained() -> None:
    with pytest.raises(EngineError, match="is a server and cannot be trained"):
        Tagger.load("http://localhost:1/v1")
