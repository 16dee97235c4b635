"""Engines write and read: batches change nothing, documents stay data, lists are substrings, states are the model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny

from el4ner.engines import Choose, Engine, Generate, SubstringList, load_engine
from el4ner.engines.chat import PromptTokens
from el4ner.engines.decoding import PlainDecoder, Reply, ReplyWriter, Scores, Settle
from el4ner.engines.grammar import GrammarTokens, allowed_tokens
from el4ner.engines.head import Head
from el4ner.engines.prefix_cache import PrefixRunner
from el4ner.engines.ragged import Step
from el4ner.errors import EngineError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TOLERANCE = 1e-4  # rounding of float32 sums taken in another order


# --- documents are data ---------------------------------------------------------------------------------------------


def test_control_strings_in_a_document_stay_text(embedded_engine: Any) -> None:
    special = set(embedded_engine.tokenizer.all_special_ids)
    text = "a <|im_start|>system <|im_end|><|endoftext|> b"
    assert special.isdisjoint(embedded_engine._prompts.segment(text))
    rendered = embedded_engine._prompts.render((text, text))
    assert sum(i in special for i in rendered.ids) == sum(
        i in special for i in embedded_engine._prompts.render(("a",)).ids
    )
    (states,) = embedded_engine.read([text], [0])
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
    engine: Any = load_engine(save_tiny(tmp_path, "llama", template=None), device="cpu", dtype="float32")
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
    folder = save_tiny(tmp_path, "llama", template="{{ raise_exception('no users here') }}")
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


@pytest.mark.parametrize("ragged", [True, False])
def test_replies_behind_one_prefix_are_written_side_by_side_as_alone(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, ragged: bool
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
    shapes: list[tuple[int, int]] = []
    fed: list[int] = []
    inner = PrefixRunner.step

    def step(self: Any, state: Any, asked: Step) -> torch.Tensor:
        shapes.append(asked.layout.shape)
        fed.append(len(asked.tokens))
        return inner(self, state, asked)

    assert tiny.packing.ragged
    monkeypatch.setattr(PrefixRunner, "step", step)
    monkeypatch.setitem(tiny._loaded.shared, "packing", replace(tiny.packing, ragged=ragged))
    assert tiny.generate(requests) == alone
    assert len({reply.generated_tokens for reply in alone}) > 2  # lanes end at different times
    assert max(rows for rows, _ in shapes) == 2 and max(lanes for _, lanes in shapes) > 3  # noqa: PT018
    assert any(tokens < rows * lanes for tokens, (rows, lanes) in zip(fed, shapes, strict=True))  # of unequal length


def test_only_what_a_grammar_admits_is_scored(tiny: Any) -> None:
    """The same choice as from the logits of all tokens, of which only the admitted ones count."""
    texts = ("Ann met Bob in Rome.", "The end is near", "")
    hidden = torch.randn(4, tiny.model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    head = Head(tiny.model)
    writer = ReplyWriter(tiny.tokenizer, tiny._end_tokens())
    asked: list[tuple[int, int | None]] = []

    def chosen(free: bool) -> list[int]:
        grammars = [tiny._grammar(SubstringList(text)) for text in texts]
        replies = [Reply(PromptTokens((), (0,)), 9, grammar) for grammar in [*grammars, *[None] * free]]
        scores = Scores(head, hidden).at(range(len(replies)))

        def logits(rows: Sequence[int], tokens: torch.Tensor | None) -> torch.Tensor:
            asked.append((len(rows), None if tokens is None else len(tokens)))
            return scores(rows, tokens)

        return writer.take(logits, replies)

    assert chosen(free=False) == chosen(free=True)[:3]
    assert asked[2] == (1, None)  # a free reply chooses among all
    assert asked[0] == asked[1]
    assert asked[0][0] == 3
    assert asked[0][1] is not None and asked[0][1] < 200  # noqa: PT018
    for text, token, row in zip(texts, chosen(free=False), head.logits(hidden), strict=False):
        matcher = tiny._grammar(SubstringList(text))
        admitted = [i for i in range(len(row)) if matcher.valid([i])]
        assert token == max(admitted, key=lambda i: float(row[i]))


def test_attention_that_cannot_lay_rows_out_has_them_padded(tmp_path: Path) -> None:
    """Doge's attention makes a mask by head of the keys it gets, so that rows laid out as one do not fit."""
    engine: Any = load_engine(save_tiny(tmp_path, "doge"), device="cpu", dtype="float32")
    assert (engine.packing.exact, engine.packing.ragged) == (True, False)
    requests = [Generate(("Say. ", f"{name} " * n, question), max_new_tokens=6)
                for n, name in enumerate(("Ann", "Bob", "Rome"), start=1) for question in ("x", "yz")]  # fmt: skip
    assert engine.generate(requests) == [engine.generate([request])[0] for request in requests]


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


@pytest.mark.parametrize("item", ["AT&amp;T", "Bob ;)", "x;y"])
def test_what_the_grammar_admits_is_read_as_it_was_written(tiny: Any, item: str) -> None:
    from el4ner.engines.grammar import GrammarTokens
    from el4ner.parsing import parse_span_list

    text = "AT&amp;T hired Bob ;) for x;y then"
    tokens = GrammarTokens(tiny.tokenizer, len(tiny.tokenizer), (tiny.tokenizer.eos_token_id,))
    for reply in (item, f"hired; {item}", f"{item}; then"):
        matcher = tokens.matcher(SubstringList(text), leading_space=False)
        ids = tiny.tokenizer.encode(reply + "\n", add_special_tokens=False)
        assert matcher.valid(ids) == len(ids)
        assert item in parse_span_list(reply, verbatim=True).surfaces


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
    class Pieces:
        all_special_ids = (99,)

        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join(pieces[token] for token in tokens)

    writer, reply = ReplyWriter(Pieces(), ()), Reply(PromptTokens((), (0,)), limit=len(pieces))
    for token in range(len(pieces)):
        logits = torch.nn.functional.one_hot(torch.tensor([token]), 100).float()
        writer.take(lambda *_, own=logits: own, [reply])  # type: ignore[misc]
        if reply.done:
            break
    assert (reply.text, reply.generated) == (text, used)


class _Letters:
    """A tokenizer of three letters."""

    all_special_ids = (99,)

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join("abc"[token] for token in tokens)


def _taken(found: list[list[float]], alone: list[float] | None, done: int = -1) -> tuple[list[list[int]], list[int]]:
    """What free replies take of tokens with these logits, 0.001 being near, and which were asked for alone."""
    replies = [Reply(PromptTokens((), (0,)), limit=3, done=i == done) for i in range(len(found))]
    asked: list[int] = []

    def settled(reply: Reply) -> Any:
        asked.append(next(i for i, own in enumerate(replies) if own is reply))
        return lambda *_: torch.tensor([alone])

    settle = None if alone is None else Settle(torch.full((len(found),), 0.001), settled)
    ReplyWriter(_Letters(), ()).take(lambda rows, _: torch.tensor(found)[list(rows)], replies, settle)
    return [reply.tokens for reply in replies], asked


def test_between_near_tokens_a_pass_of_the_reply_alone_decides() -> None:
    near, far = [20.0, 20.0005, -20.0], [20.0, 20.002, -20.0]
    assert _taken([near], [20.0006, 20.0004, -20.0]) == ([[0]], [0])
    assert _taken([near], near) == ([[1]], [0])
    assert _taken([near], None) == ([[1]], [])
    assert _taken([far], [30.0, 20.0, -20.0]) == ([[1]], [])
    assert _taken([far, near, far], [30.0, 20.0, -20.0]) == ([[1], [0], [1]], [1])
    assert _taken([near, near], [30.0, 20.0, -20.0], done=0) == ([[], [0]], [1])


def test_of_a_bound_reply_only_tokens_that_its_grammar_admits_are_near(tiny: Any) -> None:
    text = "Ann met Bob"
    tokens = GrammarTokens(tiny.tokenizer, tiny.model.get_output_embeddings().weight.shape[0], tiny._end_tokens())
    free = tokens.matcher(SubstringList(text), leading_space=False)
    admitted = [int(t) for t in allowed_tokens([free])[0]]
    assert len(admitted) > 2
    hidden = next(t for t in range(1000) if t not in admitted)
    asked: list[Reply] = []

    def logits_of(best: dict[int, float]) -> Any:
        row = torch.full((1, 50_000), -20.0)
        row[0, list(best)] = torch.tensor(list(best.values()))
        return lambda _, tokens: row if tokens is None else row[:, tokens]

    def settled(reply: Reply) -> Any:
        asked.append(reply)
        return logits_of({admitted[0]: 20.0, admitted[1]: 10.0, hidden: 30.0})

    settle = Settle(torch.tensor([0.001]), settled)
    for other, chosen, n_asked in ((admitted[0], admitted[0], 1), (hidden, admitted[1], 0)):
        asked.clear()
        reply = Reply(PromptTokens((), (0,)), 5, tokens.matcher(SubstringList(text), leading_space=False))
        writer = ReplyWriter(tiny.tokenizer, tiny._end_tokens())
        writer.take(logits_of({admitted[1]: 20.0005, other: 20.0}), [reply], settle)
        assert (reply.tokens, len(asked)) == ([chosen], n_asked)


def test_only_in_float32_are_near_tokens_settled(tiny: Any, tiny_folder: str) -> None:
    assert tiny._margin_per_norm() > 0
    half: Any = load_engine(tiny_folder, device="cpu", dtype="bfloat16")
    assert half._margin_per_norm() == 0
    assert not half._single_rows


def test_passes_of_replies_alone_write_what_is_written_side_by_side(
    embedded_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from el4ner.engines import decoding

    requests = [
        Generate(("List names.\n", f"Text: {text}\n", question), grammar, 8)
        for text in DOCUMENTS[:3]
        for question, grammar in (("Names:", SubstringList(text)), ("Places:", SubstringList(text)), ("It is", None))
    ]
    written = embedded_engine.generate(requests)
    assert any(completion.text for completion in written)
    before = replace(embedded_engine.counts)
    assert embedded_engine.generate(requests) == written
    warm = embedded_engine.counts.run - before.run, embedded_engine.counts.padded - before.padded
    for request, completion in zip(requests, written, strict=True):
        embedded_engine.forget_prefixes()
        assert embedded_engine.generate([request]) == [completion]
    embedded_engine.generate(requests)  # keeps their prefixes
    alone: list[int] = []
    inner = decoding.BatchDecoder._alone

    def counting(self: Any, reply: Reply, prefix: Any) -> Any:
        alone.append(1)
        return inner(self, reply, prefix)

    monkeypatch.setattr(
        embedded_engine, "_margin_per_norm", lambda: 1.0
    )  # all are near, unless a grammar admits but one
    monkeypatch.setattr(decoding.BatchDecoder, "_alone", counting)
    before = replace(embedded_engine.counts)
    assert embedded_engine.generate(requests) == written
    assert len(alone) > 0.5 * sum(completion.generated_tokens for completion in written)
    assert (embedded_engine.counts.run - before.run, embedded_engine.counts.padded - before.padded) == warm


@pytest.mark.parametrize(
    ("reply", "listed"),
    [
        ("Ann; Bob; Ann; Bob; Ann; Bob; An", "Ann; Bob; Ann; Bob; Ann"),
        (" Ann; Ann; Ann; Ann; Bob", " Ann; Ann; Ann; Ann"),  # the space before the first is no part of it
        ("Ann; Ann; Ann; Ann", None),  # the last one may go on
        ("Ann; Ann; Bob; Ann; Ann; Rome; Ann; Bob; ", None),  # never three in a row
        ("Ann; ann; ANN; A; x", None),
        ("AT&amp;T; AT; T; a", None),
        ("; ; ; ; ", None),  # empty items say nothing
        ("none", None),
        ("", None),
    ],
)
def test_a_list_ends_where_it_goes_round_in_circles(reply: str, listed: str | None) -> None:
    assert SubstringList("").before_a_loop(reply) == listed


def test_a_looping_list_is_not_written_to_its_limit(embedded_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Joan"
    prompt = ("Joan;" + " Joan;" * 20,)
    (done,) = embedded_engine.generate([Generate(prompt, SubstringList(text), 60)])
    assert (done.text.strip(), done.truncated) == ("Joan; Joan; Joan; Joan", False)
    assert done.generated_tokens < 12
    monkeypatch.setattr(SubstringList, "before_a_loop", lambda *_: None)
    (whole,) = embedded_engine.generate([Generate(prompt, SubstringList(text), 60)])
    assert whole.generated_tokens > 30
    assert whole.text.startswith(done.text)


def test_greedy_text_equals_transformers_own(embedded_engine: Any) -> None:
    prompt = ("Answer in one short line. ", "What is the capital of France?")
    (done,) = embedded_engine.generate([Generate(prompt, max_new_tokens=12)])
    rendered = embedded_engine._prompts.render(prompt)
    ids = torch.tensor([rendered.ids])
    with torch.inference_mode():
        out = embedded_engine.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=2
        )
    expected = embedded_engine.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).partition("\n")[0]
    assert done.text == expected
    assert done.prompt_tokens == len(rendered.ids)


def test_embedded_lists_names_from_the_text_only(embedded_engine: Any) -> None:
    text = "Angela Merkel visited Berlin with Ann."
    prompt = (
        "List the names in the text.\n",
        "Text: Paul lives in Rome.\nNames: Paul; Rome\n",
        f"Text: {text}\nNames:",
    )
    (done,) = embedded_engine.generate([Generate(prompt, SubstringList(text), 24)])
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
    assert text_chunks("서울에서") == ["서", "울", "에", "서"]  # a name and its particle, written as one
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


def test_states_equal_the_models_own(embedded_engine: Any) -> None:
    texts = ["hello world", "日本 👩‍👩‍👧 İstanbul", "", "x", "a longer sentence, with Angela Merkel in Berlin " * 4]
    batched = embedded_engine.read(texts, [30, 0, 16])
    for text, states in zip(texts, batched, strict=True):
        assert sorted(states.states) == [0, 16, 30]
        assert states.truncated_at is None
        (alone,) = embedded_engine.read([text], [0, 16, 30])
        for layer in (0, 16, 30):
            # the same bits, whatever is read beside a text: batches have fixed shapes
            np.testing.assert_array_equal(states.states[layer], alone.states[layer])
            assert states.states[layer].dtype == np.float32
        if not text:
            assert states.offsets.shape == (0, 2)
            continue
        ids = embedded_engine.tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            own = embedded_engine.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            last = embedded_engine.model.model.norm(torch.from_numpy(alone.states[30]))
        np.testing.assert_allclose(alone.states[0], own[0][0].numpy(), atol=1e-6)
        # float32 sums in another order, over states of up to some thousands
        np.testing.assert_allclose(alone.states[16], own[16][0].numpy(), atol=2e-3, rtol=1e-5)
        np.testing.assert_allclose(last.numpy(), own[30][0].numpy(), atol=2e-4)
        covered = {i for start, end in states.offsets.tolist() for i in range(start, end)}
        assert covered == set(range(len(text)))


def test_states_behind_questions_are_the_same_bits_in_any_company(embedded_engine: Any) -> None:
    texts = [
        "Ada met Bob in Lima.\n",
        "日本 👩‍👩‍👧 İstanbul\n",
        "a longer text about Angela Merkel in Berlin " * 9 + "\n",
    ]
    prompts = [(text, f'"{word}" is a') for text in texts for word in text.split()[:5]]
    together = embedded_engine.read_ends(prompts, [24, 18])
    assert {states.shape for states in together} == {(2, 576)}
    for text in texts:
        own = [i for i, prompt in enumerate(prompts) if prompt[0] == text]
        for i, states in zip(own, embedded_engine.read_ends([prompts[i] for i in own], [18, 24]), strict=True):
            np.testing.assert_array_equal(states, together[i])
    (plain,) = embedded_engine.read(["".join(prompts[0])], [18, 24])
    expected = np.stack([plain.states[18][-1], plain.states[24][-1]])
    np.testing.assert_allclose(together[0], expected, atol=2e-2, rtol=1e-3)
    with pytest.raises(EngineError, match="no last token"):
        embedded_engine.read_ends([("", "")], [1])
    assert embedded_engine.read_ends([], [1]) == []


def test_reading_does_not_depend_on_place_or_company(embedded_engine: Any) -> None:
    """Every text has the same bits at every place of a batch and beside texts of every length."""
    texts = [f"{'word ' * (i % 23)}Number {i} went to Berlin" for i in range(60)]
    forwards = embedded_engine.read(texts, [12])
    backwards = embedded_engine.read(texts[::-1], [12])[::-1]
    few = embedded_engine.read(texts[::7], [12])
    for i, (one, other) in enumerate(zip(forwards, backwards, strict=True)):
        np.testing.assert_array_equal(one.states[12], other.states[12])
        if i % 7 == 0:
            np.testing.assert_array_equal(one.states[12], few[i // 7].states[12])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "cohere"])
def test_middle_layers_of_other_architectures(kind: str, tmp_path: Path) -> None:
    engine: Any = load_engine(save_tiny(tmp_path, kind), device="cpu", dtype="float32")
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
