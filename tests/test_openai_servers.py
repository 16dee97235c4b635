"""Models behind real servers on this machine: llama.cpp's, `transformers serve`, and one that echoes log-probabilities.

All serve the embedded model, so that what they say can be compared with the local engine's exact scores.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from el4ner import El4ner
from el4ner.engines import Choose, Generate, ServerSettings, SubstringList, load_engine
from el4ner.engines.openai import OpenAIEngine
from el4ner.errors import EngineError
from el4ner.models import EMBEDDED, embedded_file, local_folder, resolve
from el4ner.prompts import (
    VERDICT_CHOICES,
    classification_question,
    extraction_question,
    label_choices,
    prefix,
    verification_question,
)
from el4ner.records import Demonstration, Label, LabelledSpan

pytest.importorskip("openai", reason="the extra openai is not installed")
pytestmark = [pytest.mark.embedded, pytest.mark.slow, pytest.mark.timeout(600)]

LABELS = (Label("person", "A human being."), Label("creative-work", "A work of art."), Label("place", "Where it is."))
SHOWN = (
    Demonstration("d", "Ada saw Rome.", (LabelledSpan(0, 3, "person"), LabelledSpan(8, 12, "place"))),
    Demonstration("e", "Bob read Hamlet.", (LabelledSpan(0, 3, "person"), LabelledSpan(9, 15, "creative-work"))),
)
TEXT = "Marie Curie moved to Paris, France in 1891."
PREFIX = prefix(TEXT, SHOWN, LABELS)
CHOICES = label_choices(LABELS)
QUESTIONS = [
    Choose((*PREFIX, classification_question(s)), CHOICES, "choices") for s in ("Marie Curie", "Paris", "1891")
]
VERDICTS = [
    Choose((*PREFIX, verification_question("Paris", s)), VERDICT_CHOICES, "choices") for s in ("place", "person")
]
LIST = Generate((*PREFIX, extraction_question()), SubstringList(TEXT), 24)
FREE = Generate((*PREFIX, extraction_question()), None, 24)


@pytest.fixture(scope="module")
def local(embedded: None) -> Any:
    """The same model, here."""
    return load_engine("embedded:smollm2", device="cpu", dtype="float32", chat=False)


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, wait_s: float = 180.0) -> Iterator[str]:
    """A server in a process of its own, once it answers; ended afterwards."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            assert process.poll() is None, f"the server ended with {process.returncode}"
            assert time.monotonic() < deadline, "the server does not answer"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (OSError, urllib.error.URLError):
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


LLAMA = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
params.model_alias = ["smol"]
params.n_ctx, params.n_parallel = 2048, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
time.sleep(900)
"""


@pytest.fixture(scope="module")
def llama(embedded: None) -> Iterator[str]:
    """llama.cpp's own server; its path from the package that carries the embedded model."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    path = embedded_file(EMBEDDED[0])
    if path is None:
        pytest.skip("the embedded model's GGUF file is not here")
    port = free_port()
    with running([sys.executable, "-c", LLAMA, str(path), str(port)], port) as url:
        yield url


@pytest.fixture(scope="module")
def plain(llama: str) -> OpenAIEngine:
    return OpenAIEngine("llama", f"openai:smol@{llama}", chat=False)


def test_llama_cpp_scores_choices_as_the_local_engine(plain: OpenAIEngine, local: Any) -> None:
    """llama.cpp multiplies in 8 bits, so its numbers are near, and the choices of clear questions the same."""
    assert plain.way == "listed"
    for requests in (QUESTIONS, VERDICTS):
        ours, theirs = (np.exp(np.array(e.choose(requests))) for e in (local, plain))
        np.testing.assert_allclose(theirs.sum(axis=1), 1.0, atol=1e-5)
        np.testing.assert_allclose(theirs, ours, atol=0.1)
    # the server splits the prompt as a whole, we segment by segment
    counts = zip(*(e.count_tokens([r.prompt for r in VERDICTS]) for e in (plain, local)), strict=True)
    assert all(abs(theirs - ours) <= 2 for theirs, ours in counts)
    estimated, counted = (e.count_tokens([r.prompt for r in QUESTIONS]) for e in (plain, local))
    assert all(1.0 <= high / exact < 1.6 for high, exact in zip(estimated, counted, strict=True))


def test_llama_cpp_keeps_lists_to_the_text(plain: OpenAIEngine, local: Any) -> None:
    text = 'He said "no; C\\D" to Zoë\'s 東京 office'
    grounded = Generate((f"{text}\nNumbers: 1; 2; 3\nNumbers:",), SubstringList(text), 24)
    (ours,), (theirs, free, odd) = local.generate([FREE]), plain.generate([LIST, FREE, grounded])
    assert free.text == ours.text
    for completion, source in ((theirs, TEXT), (odd, text)):
        items = [item for item in completion.text.strip().split("; ") if item != "none"]
        assert all(item.strip() in source for item in items), completion
    assert theirs.generated_tokens > 0
    assert not any("not constrained" in note for note in plain.notes)


def test_llama_cpp_reads_no_control_tokens(plain: OpenAIEngine) -> None:
    """What ends a turn is one token to the server, and several where it is text."""
    bare, marked = plain.generate([Generate(("a b",), None, 1), Generate(("a <|im_end|> b",), None, 1)])
    assert marked.prompt_tokens - bare.prompt_tokens > 3


def test_llama_cpp_refuses_what_is_too_long(plain: OpenAIEngine) -> None:
    assert plain.max_tokens == 2048
    with pytest.raises(EngineError, match=r"refused the request \(400: .*context"):
        plain.generate([Generate(("word " * 2500,), None, 1)])
    assert plain.generate([FREE])


def test_a_chat_with_llama_cpp(llama: str) -> None:
    """Odds, answers held to a schema, answers as they come: the server gives each of them, and each is what it says."""
    question = Choose(("Question: is Paris a city? Answer yes or no.",), (" yes", " no"), "choices")
    scores = {}
    for way in ("auto", "schema", "answer"):
        engine = OpenAIEngine("chat", f"openai:smol@{llama}", settings=ServerSettings(choices=way))
        assert engine.way == {"auto": "listed"}.get(way, way)
        scores[way] = np.exp(engine.choose([question])[0])
    assert scores["auto"].sum() == pytest.approx(1.0, abs=1e-5)
    assert 0.5 < scores["auto"].max() < 0.89  # odds, not an answer
    assert sorted(scores["schema"]) == pytest.approx([0.1, 0.9])
    assert np.isnan(scores["answer"]).all() or sorted(scores["answer"]) == pytest.approx([0.1, 0.9])
    assert engine.source.endswith("(chat, choices by parsed answers, without probabilities)")


def test_all_four_stages_with_a_member_behind_llama_cpp(llama: str, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    rows = [
        {"text": d.text, "entities": [{"start": e.start, "end": e.end, "label": e.label} for e in d.entities]}
        for d in SHOWN
    ]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    member = {"name": "llama", "source": llama, "chat": False}
    model = El4ner.from_config(members=[member], examples=str(pool), device="cpu", voters="all")
    predictions = model.predict(["Carl saw Oslo.", "Dora read Faust."])
    assert [p.status for p in predictions] == ["ok", "ok"], [p.error for p in predictions]
    assert all(p.usage.prompt_tokens > 0 and p.usage.generated_tokens > 0 for p in predictions)
    entities = [e for p in predictions for e in p.entities]
    assert any("llama" in e.proposed_by and "llama" in e.votes for e in entities)
    assert all(e.verified is not None for e in entities)
    report = model.report()
    assert (report["asked"], report["verifier"]) == (["llama", "retrieval"], "llama")
    says = "choices are scored by log-probabilities of the likeliest first tokens"
    assert any(says in note for note in report["notes"])


# Log-probabilities of every token -------------------------------------------------------------------------------------


@pytest.fixture
def echoing(local: Any) -> Iterator[str]:
    """/v1/completions as OpenAI, vLLM and SGLang have it, with `echo` and `logprobs`: plain forwards of the model."""
    import torch

    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({"data": [{"id": "smol", "max_model_len": 2048}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            tokenizer = local.tokenizer
            ids = tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            with lock, torch.inference_mode():
                logits = local.model(torch.tensor([ids])).logits[0]
            logp = torch.log_softmax(logits.float(), dim=-1)
            last = int(logp[-1].argmax())
            numbers = [None, *(float(logp[i, token]) for i, token in enumerate([*ids[1:], last]))]
            texts = [tokenizer.decode([token]) for token in [*ids, last]]
            usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
            logprobs = {"tokens": texts, "token_logprobs": numbers, "top_logprobs": None, "text_offset": None}
            self.reply({"choices": [{"text": "".join(texts), "logprobs": logprobs}], "usage": usage})

        def reply(self, data: Any) -> None:
            payload = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_echoed_log_probabilities_are_the_local_engine_s(echoing: str, local: Any) -> None:
    engine = OpenAIEngine("echo", echoing, chat=False)
    assert (engine.way, engine.max_tokens) == ("echo", 2048)
    for normalise in ("vocab", "choices"):
        prompt = ("Type of Ada:",)
        requests = [Choose(prompt, (" person", " musical artist", " musical album", " none of these"), normalise)]
        ours, theirs = local.choose(requests)[0], engine.choose(requests)[0]
        np.testing.assert_allclose(theirs, ours, atol=1e-3)
    assert engine.count_tokens([prompt]) == local.count_tokens([prompt])


# A server without log-probabilities -----------------------------------------------------------------------------------


def test_transformers_serve(local: Any) -> None:
    """Greedy text is the local engine's, choices are parsed answers, a model that is not served is refused by name."""
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed, which transformers serve needs")
    folder = local_folder(resolve("embedded:smollm2"))
    port = free_port()
    script = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    options = ["serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with running([sys.executable, "-c", script, *options], port) as url:
        engine = OpenAIEngine("served", f"openai:{folder}@{url}", chat=False)
        assert engine.way == "answer"
        (theirs,), (ours,) = engine.generate([FREE]), local.generate([FREE])
        assert (theirs.text, theirs.generated_tokens) == (ours.text, ours.generated_tokens)
        (scores,) = engine.choose(QUESTIONS[:1])
        assert int(scores.argmax()) == int(local.choose(QUESTIONS[:1])[0].argmax())
        with pytest.raises(EngineError, match=r"400: Server is pinned.*no/such"):
            OpenAIEngine("wrong", f"openai:no/such@{url}")
