"""Engines choose: packed and cached computation equals plain computation, batches change nothing; loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import ARCHITECTURES, save_tiny

from el4ner.engines import Choose, Completion, Engine, Generate, load_engine
from el4ner.engines.prefix_cache import PrefixRunner
from el4ner.engines.sizes import size_of_config
from el4ner.errors import EngineError, ModelNotFoundError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

TOLERANCE = 1e-4  # rounding of float32 sums taken in another order


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


@pytest.mark.parametrize("single_rows", [True, False])  # as on a CPU in float32, as elsewhere
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_scores_equal_plain_forward_passes(kind: str, single_rows: bool, tmp_path: Path) -> None:
    engine: Any = load_engine(save_tiny(tmp_path, kind), device="cpu", dtype="float32")
    assert engine.packing.exact, str(engine.packing)
    assert engine._single_rows
    engine._single_rows = single_rows
    requests = _requests()
    for request, scores in zip(requests, engine.choose(requests), strict=True):
        np.testing.assert_allclose(scores, _reference(engine, request), atol=TOLERANCE)


def test_packing_is_refused_where_a_window_would_be_ignored(tmp_path: Path) -> None:
    engine: Any = load_engine(save_tiny(tmp_path, "mistral", sliding_window=40), device="cpu", dtype="float32")
    assert engine.packing.limit == 40
    requests = [*_requests(), Choose(("abc",), ("d", "ef"))]
    for request, scores in zip(requests, engine.choose(requests), strict=True):
        np.testing.assert_allclose(scores, _reference(engine, request), atol=TOLERANCE)


def test_a_model_without_attention_is_scored_plainly(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "mamba", state_size=4, n_layer=2)
    engine: Any = load_engine(folder, device="cpu", dtype="float32")
    assert not engine.packing.exact
    request = _requests()[0]
    np.testing.assert_allclose(engine.choose([request])[0], _reference(engine, request), atol=TOLERANCE)
    assert isinstance(engine.generate([Generate(("Hello",), max_new_tokens=3)])[0], Completion)
    import transformers

    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
    assert not hasattr(config, "num_attention_heads")
    assert size_of_config(config).kv_width == 0  # its state does not grow with the text


def test_embedded_scores_equal_plain_forward_passes_alone_batched_and_cached(embedded_engine: Any) -> None:
    requests = _requests()
    embedded_engine._cache.clear()
    batched = embedded_engine.choose(requests)
    again = embedded_engine.choose(requests)
    for request, first, second in zip(requests[::3], batched[::3], again[::3], strict=True):
        np.testing.assert_allclose(first, _reference(embedded_engine, request), atol=TOLERANCE)
        np.testing.assert_allclose(second, first, atol=TOLERANCE)
    for request, scores in zip(requests[::2], batched[::2], strict=True):
        (alone,) = embedded_engine.choose([request])
        np.testing.assert_allclose(alone, scores, atol=TOLERANCE)
        assert alone.argmax() == scores.argmax()


@pytest.mark.parametrize("normalise", ["vocab", "choices"])
def test_other_prefixes_and_small_passes_move_no_bit_of_an_embedded_score(
    normalise: str, embedded_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is asked behind a prefix is asked at once; what else is asked, before or beside, changes nothing."""
    requests = _requests(normalise)
    embedded_engine.forget_prefixes()
    together = dict(zip(requests, embedded_engine.choose(requests), strict=True))
    by_prefix: dict[Any, list[Choose]] = {}
    for request in requests:
        by_prefix.setdefault(request.prompt[:-1], []).append(request)
    assert len(by_prefix) == 5

    def check(asked: list[Choose]) -> None:
        for scores, request in zip(embedded_engine.choose(asked), asked, strict=True):
            np.testing.assert_array_equal(scores, together[request])

    for own in by_prefix.values():
        check(own)  # behind kept prefixes
        embedded_engine.forget_prefixes()
        check(own)
    turned = [own for part in reversed(by_prefix.values()) for own in part]
    check([*turned, *turned])
    monkeypatch.setattr(embedded_engine, "_forward_tokens", 16)  # as of a plan under a limit of memory
    monkeypatch.setattr(embedded_engine._cache, "limit_bytes", 1 << 20)
    embedded_engine.forget_prefixes()
    check(turned)


def test_what_is_asked_twice_is_computed_once(tiny: Any) -> None:
    tiny.forget_prefixes()
    request = Choose(("Rome is a place.\n", "Ann met Bob.\n", "Ann is a"), (" place", " person"))
    first, second = tiny.choose([request, request])
    np.testing.assert_array_equal(first, second)
    assert first is not second
    assert tiny.computed == [tiny._prompts.render(request.prompt).length, 0]


def test_what_a_tokenizer_would_merge_across_a_border_stays_apart(tmp_path: Path) -> None:
    """A prompt's tokens do not depend on the choice behind it: else no two choices would continue the same prefix."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = save_tiny(tmp_path, "llama", None)
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c != "!"]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, ":Ġ"])}, [(":", "Ġ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # as SentencePiece: no cuts
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    engine: Any = load_engine(folder, device="cpu", dtype="float32")
    together = engine.tokenizer("is: place", add_special_tokens=False)["input_ids"]
    apart = engine.prompt_ids(("is:",)) + engine.choice_ids(" place")
    assert len(together) == len(apart) - 1  # one token where prompt and choice meet
    assert engine.tokenizer.decode(apart) == "is: place"
    requests = [
        Choose(("Rome ", "is:"), (" place", " person", "x")),
        Choose(("Rome ", "was: here\n", "is:"), (" place", " p")),
    ]
    for request, scores in zip(requests, engine.choose(requests), strict=True):
        np.testing.assert_allclose(scores, _reference(engine, request), atol=TOLERANCE)


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
    folder = save_tiny(tmp_path, "qwen2")
    requests = _requests()
    roomy: Any = load_engine(folder, device="cpu", dtype="float32")
    expected = roomy.choose(requests)
    assert len(roomy._cache) > 0
    del roomy
    tight: Any = load_engine(folder, device="cpu", dtype="float32", prefix_cache_bytes=30_000, forward_tokens=16)
    for scores, other in zip(tight.choose(requests), expected, strict=True):
        np.testing.assert_array_equal(scores, other)
    assert tight._cache.n_bytes <= 30_000
    assert tight._cache.n_bytes == sum(chunk.n_bytes for chunk in tight._cache._chunks.values())


def test_prefixes_are_computed_once_across_calls(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    assert tiny.packing.exact  # found out here, lest its own passes be counted
    tiny._cache.clear()
    seen: list[int] = []
    forward = PrefixRunner.forward

    def counting(self: Any, rows: Any, *others: Any, **named: Any) -> Any:
        seen.append(sum(len(row.tokens) for row in rows))
        return forward(self, rows, *others, **named)

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


# --- loading --------------------------------------------------------------------------------------------------------


def test_engines_of_one_source_share_one_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    first: Any = load_engine(folder, name="a", device="cpu", dtype="float32")
    second: Any = load_engine(folder, name="b", device="cpu", dtype="float32")
    third: Any = load_engine(folder, name="c", device="cpu", dtype="bfloat16")
    assert first.model is second.model
    assert first._cache is second._cache
    assert third.model is not first.model
    assert (first.name, second.name) == ("a", "b")


def test_bad_devices_dtypes_and_models_are_one_line(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "good", "llama")
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


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "vendor", "chosen"),
    [
        (True, True, "GenuineIntel", "bfloat16"),
        (False, True, "GenuineIntel", "float32"),
        (False, True, "AuthenticAMD", "bfloat16"),
        (False, False, "AuthenticAMD", "float32"),
    ],
)
def test_auto_is_the_precision_that_a_processor_is_faster_in(
    amx: bool, avx512_bf16: bool, vendor: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from el4ner.engines import loading

    read_text = Path.read_text
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(
        Path, "read_text",
        lambda self, **how: f"vendor_id : {vendor}\n" if str(self) == "/proc/cpuinfo" else read_text(self, **how),
    )  # fmt: skip
    assert loading.choose_dtype("auto", torch.device("cpu")) == getattr(torch, chosen)
    assert loading.choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert loading.choose_dtype("auto", torch.device("cuda")) == torch.bfloat16

    def nothing(*_: Any, **__: Any) -> str:
        raise OSError("no such file")

    monkeypatch.setattr(Path, "read_text", nothing)  # not Linux
    monkeypatch.setattr(loading.platform, "processor", lambda: f"Family 6 Model 143, {vendor}")
    assert loading.choose_dtype("auto", torch.device("cpu")) == getattr(torch, chosen)


def test_importing_engines_imports_no_torch() -> None:
    code = "import sys, el4ner.engines.scripted, el4ner.models, el4ner.cache; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
