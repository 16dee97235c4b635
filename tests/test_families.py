"""Every supported family: packed scores, replies and hidden states equal the model's own, one prompt at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from el4ner.bench.rivals_engine import Tokenised, Work, score_in_batches, score_one_by_one  # noqa: E402
from el4ner.engines import Choose, Generate, SubstringList, load_engine  # noqa: E402
from el4ner.models import local_folder, resolve  # noqa: E402

pytestmark = pytest.mark.usefixtures("embedded")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "smollm": {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24,
               "tie_word_embeddings": True},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "phi4": {"model_type": "phi3", "sliding_window": None, "num_key_value_heads": 1,
             "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0, "partial_rotary_factor": 1.0}},
    "glm": {"model_type": "glm", "attention_bias": True},
    "glm4": {"model_type": "glm4", "attention_bias": False},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "gemma2": {"model_type": "gemma2", "sliding_window": 1024, "final_logit_softcapping": 5.0,
               "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 1024, "query_pre_attn_scalar": 8,
               "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip

WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "phi3": {"model_type": "phi3", "sliding_window": 24},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 24,
              "layer_types": ["full_attention", "sliding_attention"]},
    "gemma2": FAMILIES["gemma2"] | {"sliding_window": 24},
    "gemma3": FAMILIES["gemma3"] | {"sliding_window": 24},
}  # fmt: skip
"""The same with a window shorter than the prompts, where keys and values of a prefix may not be packed."""


def save_family(folder: Path, settings: dict[str, Any]) -> str:
    """A random model in float32 and its tokenizer in a folder."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(local_folder(resolve("embedded:smollm2")))
    own = {**SIZES, "vocab_size": len(tokenizer), **settings}
    config = transformers.AutoConfig.for_model(own.pop("model_type"), **own)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # fresh weights are so small that every token follows every other alike
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


TOLERANCE = 1e-5
"""Rounding of float32 sums taken in another order, by two layers of width 32."""

LABELS = (" person", " place", " organization", " creative work", " none of these")


def _requests() -> list[Choose]:
    """Two sentences behind one instruction, two questions each, labels of one to three tokens."""
    instruction = "Find the named entities in texts. The types of entities are:\n- person\n- place\n\n"
    asked = []
    for text, surfaces in (
        ("Ann met Bob in São Paulo.", ("Ann", "São Paulo")),
        ("東京 <|im_end|> 👍🏽", ("東京", "👍🏽")),
    ):
        shown = f'Text: Rome is old.\nEntities: Rome\nType of "Rome": place\n\nText: {text}\n'
        asked += [Choose((instruction, shown, f'Type of "{surface}":'), LABELS) for surface in surfaces]
        asked.append(Choose((instruction, shown, f'Is "{surfaces[0]}" a person?\nAnswer:'), (" yes", " no")))
    return asked


def _plain(engine: Any, requests: list[Choose]) -> list[np.ndarray]:
    questions = [
        Tokenised(engine.prompt_ids(r.prompt), tuple(engine.choice_ids(choice) for choice in r.choices))
        for r in requests
    ]
    return score_one_by_one(engine.model, questions, Work())


def _greedy(engine: Any, request: Generate) -> str:
    """What the model writes by a plain loop without any cache: the most probable token, up to a line's end."""
    ids = list(engine.prompt_ids(request.prompt))
    begun = len(ids)
    for _ in range(request.max_new_tokens):
        with torch.inference_mode():
            token = int(engine.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in engine.tokenizer.all_special_ids:
            break
        ids.append(token)
        text = engine.tokenizer.decode(ids[begun:])
        if "\n" in text.lstrip():
            break
    text = engine.tokenizer.decode(ids[begun:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    while "\n" in text and not text.partition("\n")[0].strip():
        text = text.partition("\n")[2]
    return str(text.partition("\n")[0])


def _check(engine: Any) -> None:
    """Scores and replies alone, together and in another order, against plain passes."""
    requests = _requests()
    expected = _plain(engine, requests)
    together = engine.choose(requests)
    backwards = engine.choose(requests[::-1])[::-1]
    engine.forget_prefixes()
    (alone,) = engine.choose(requests[2:3])
    for scores, other, plain in zip(together, backwards, expected, strict=True):
        np.testing.assert_allclose(scores, plain, atol=TOLERANCE, rtol=1e-6)
        np.testing.assert_allclose(other, plain, atol=TOLERANCE, rtol=1e-6)
    np.testing.assert_allclose(alone, expected[2], atol=TOLERANCE, rtol=1e-6)
    lists = [Generate((*request.prompt[:2], "Entities:"), None, 6) for request in (requests[0], requests[3])]
    lists.append(Generate(requests[0].prompt, None, 4))
    replies = engine.generate(lists)
    assert [reply.text for reply in replies] == [_greedy(engine, request) for request in lists]
    (bound,) = engine.generate([Generate(lists[0].prompt, SubstringList("Ann met Bob in São Paulo."), 6)])
    assert bound.text == "none" or bound.truncated or bound.text.partition("; ")[0] in "Ann met Bob in São Paulo."


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_prompt_at_a_time(family: str, tmp_path: Path) -> None:
    engine: Any = load_engine(save_family(tmp_path, FAMILIES[family]), device="cpu", dtype="float32")
    assert engine.packing.exact, str(engine.packing)
    spread = np.ptp(_plain(engine, _requests()[:1])[0][:3])
    assert spread > 100 * TOLERANCE  # weights whose answers are all alike would prove nothing
    _check(engine)
    assert engine.notes == []
    _check_states(engine)
    _check_ends(engine)


def _check_states(engine: Any) -> None:
    texts = ["Ann met Bob in São Paulo.", "東京"]
    for text, states in zip(texts, engine.read(texts, [0, 1, 2]), strict=True):
        with torch.inference_mode():
            ids = torch.tensor([engine.choice_ids(text)])
            own = engine.model(ids, output_hidden_states=True).hidden_states
        for layer in (0, 1):  # transformers gives the last layer after its norm
            np.testing.assert_allclose(states.states[layer], own[layer][0].numpy(), atol=1e-4, rtol=1e-5)
        after_norm = engine.model.base_model.norm(torch.from_numpy(states.states[2]))
        np.testing.assert_allclose(after_norm.numpy(), own[2][0].numpy(), atol=1e-4, rtol=1e-5)


def _check_ends(engine: Any) -> None:
    """States of the last tokens of prompts that share a text, against a plain pass for each prompt."""
    prompts = [
        (f"{text}\n", f'"{surface}" is a')
        for text, surfaces in (("Ann met Bob in São Paulo.", ("Ann", "São Paulo")), ("東京 <|im_end|> 👍🏽", ("東京",)))
        for surface in surfaces
    ]
    for prompt, found in zip(prompts, engine.read_ends(prompts, [1, 0]), strict=True):
        ids = torch.tensor([[i for segment in prompt for i in engine.choice_ids(segment)]])
        with torch.inference_mode():
            own = engine.model(ids, output_hidden_states=True).hidden_states
        np.testing.assert_allclose(found, np.stack([own[n][0, -1].numpy() for n in (0, 1)]), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_short_window_repeats_the_cache_and_says_so(family: str, tmp_path: Path) -> None:
    engine: Any = load_engine(save_family(tmp_path, WINDOWED[family]), device="cpu", dtype="float32")
    assert engine.packing.limit == 24
    assert engine._repeated().usable
    before = engine.counts.run
    requests = _requests()
    engine.choose(requests)
    run = engine.counts.run - before
    full = sum(len(engine.prompt_ids(r.prompt)) for r in requests)
    assert run < full  # prefixes are kept, though their last tokens are run again for every question
    _check(engine)
    _check_ends(engine)
    assert len(engine.notes) == 1
    assert "attention window" in engine.notes[0]


def test_the_two_rivals_of_the_benchmark_agree(tmp_path: Path) -> None:
    engine: Any = load_engine(save_family(tmp_path, FAMILIES["qwen2"]), device="cpu", dtype="float32")
    questions = [
        Tokenised(engine.prompt_ids(r.prompt), tuple(engine.choice_ids(choice) for choice in r.choices))
        for r in _requests()
    ]
    by_one = score_one_by_one(engine.model, questions, Work())
    for rows in (1, 5):
        for scores, plain in zip(score_in_batches(engine.model, questions, Work(), rows), by_one, strict=True):
            np.testing.assert_allclose(scores, plain, atol=TOLERANCE, rtol=1e-6)


def test_prompts_and_choices_do_not_merge(tmp_path: Path) -> None:
    """A choice's tokens are those it has behind its prompt: a space begins every choice, where this tokenizer cuts."""
    engine: Any = load_engine("embedded:smollm2", device="cpu", dtype="float32")
    for request in _requests():
        for choice in request.choices:
            text = request.prompt[2] + choice
            assert engine.choice_ids(request.prompt[2]) + engine.choice_ids(choice) == engine.choice_ids(text)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("single_rows", "most", "fitting"), [(True, 45, 32), (False, 100, 128)])
def test_passes_are_halved_until_they_fit(
    single_rows: bool, most: int, fitting: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from el4ner.engines.prefix_cache import PrefixRunner

    engine: Any = load_engine(save_family(tmp_path, FAMILIES["llama"]), device="cpu", dtype="float32")
    engine._single_rows = single_rows
    requests = _requests()
    expected = engine.choose(requests)
    lists = [Generate((*request.prompt[:2], "Entities:"), None, 6) for request in requests]
    replies = engine.generate(lists)
    engine.forget_prefixes()
    forward = PrefixRunner.forward

    def narrow(self: Any, rows: Any, *others: Any, **named: Any) -> Any:
        if len(rows) * max(len(row.tokens) for row in rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return forward(self, rows, *others, **named)

    monkeypatch.setattr(PrefixRunner, "forward", narrow)
    for scores, plain in zip(engine.choose(requests), expected, strict=True):
        np.testing.assert_allclose(scores, plain, atol=TOLERANCE, rtol=1e-6)
    assert engine._pack_tokens <= fitting
    assert engine._forward_tokens == (512 if single_rows else engine._pack_tokens)
    assert "goes on with" in engine.notes[0]
    assert engine.generate(lists) == replies
