"""Models behind a server, against servers that misbehave: slow, silent, cut off, overloaded, malformed, wrong.

The servers are real ones on this machine; what they say is written here. Real models stand in test_openai_servers.py.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from el4ner import El4ner
from el4ner.cli import main
from el4ner.config import load_config
from el4ner.engines import Choose, Generate, ServerSettings, SubstringList, load_engine
from el4ner.engines import server as server_module
from el4ner.engines.openai import OpenAIEngine
from el4ner.engines.server import Budget, retry_after_s
from el4ner.errors import ConfigError, EngineError, ModelNotFoundError
from el4ner.models import resolve

pytest.importorskip("openai", reason="the extra openai is not installed")

KEY = "sk-0123456789abcdef"


@dataclass
class Reply:
    """What a server does with one request: the body as it is, a pause before it, bytes that never come."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause_s: float = 0.0
    missing: int = 0
    trickle_s: float = 0.0


Script = Callable[[str, dict[str, Any]], Reply]


class FakeServer:
    """Answers by a script of (path, body), and remembers what it was asked, when, and how much at once."""

    def __init__(self, script: Script, models: list[str] | Reply) -> None:
        self.script, self.models = script, models
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.times: list[float] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                models = outer.models
                rows = [{"id": name, "object": "model"} for name in models] if isinstance(models, list) else []
                outer.send(self, models if isinstance(models, Reply) else Reply({"object": "list", "data": rows}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.answer(self, body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            self.asked.append((handler.path, body))
            self.times.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            self.send(handler, self.script(handler.path, body))
        finally:
            with self._lock:
                self._now -= 1

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        time.sleep(reply.pause_s)
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        try:
            handler.send_response(reply.status)
            headers = {"content-type": "application/json", "content-length": str(len(data) + reply.missing)}
            for name, value in (headers | reply.headers).items():
                handler.send_header(name, value)
            handler.end_headers()
            for position in range(len(data) if reply.trickle_s else 0):
                handler.wfile.write(data[position : position + 1])
                handler.wfile.flush()
                time.sleep(reply.trickle_s)
            if not reply.trickle_s:
                handler.wfile.write(data)
        except OSError:
            pass  # the client has gone
        handler.close_connection = bool(reply.missing) or handler.close_connection

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


Serve = Callable[..., FakeServer]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(server_module, "BACKOFF_S", 0.01)
    servers: list[FakeServer] = []

    def start(script: Script, models: list[str] | Reply | None = None) -> FakeServer:
        servers.append(FakeServer(script, ["m"] if models is None else models))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def text_reply(text: str, logprobs: Any = None, **usage: int) -> Reply:
    """A completion that also reads as a chat completion."""
    choice = {"index": 0, "text": text, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return Reply({"choices": [choice | {"logprobs": logprobs}], "usage": usage or None})


def legacy(*places: dict[str, float], tokens: list[str] | None = None) -> dict[str, Any]:
    """Log-probabilities in the older form, from probabilities at each place."""
    texts = tokens or [max(place, key=lambda t: place[t]) for place in places]
    logs = [{t: float(np.log(p)) for t, p in place.items()} for place in places]
    return {
        "tokens": texts,
        "token_logprobs": [own[t] for own, t in zip(logs, texts, strict=True)],
        "top_logprobs": logs,
    }


def content(*places: dict[str, float]) -> dict[str, Any]:
    """The same as chats have it; the first token of each place is the one that was written."""
    rows = []
    for place in places:
        listed = [{"token": t, "logprob": float(np.log(p))} for t, p in place.items()]
        rows.append(listed[0] | {"top_logprobs": listed})
    return {"content": rows}


def talks(path: str, body: dict[str, Any]) -> Reply:
    """A server without log-probabilities and schemas."""
    return text_reply(" Ada; London\n")


def engine(server: FakeServer, *, chat: bool = True, budget: Budget | None = None, **settings: Any) -> OpenAIEngine:
    settings = {"timeout_s": 5.0, "retries": 2, **settings}
    return OpenAIEngine("e", f"openai:m@{server.url}", chat=chat, settings=ServerSettings(**settings), budget=budget)


def ask(text: str = "Text: Ada met London.\nEntities:") -> Generate:
    return Generate((text,), None, 16)


# Where it is, what it is called


@pytest.mark.parametrize(
    ("source", "name", "url"),
    [
        ("openai:qwen", "qwen", ""),
        ("openai:org/qwen:7b@http://localhost:8000/v1", "org/qwen:7b", "http://localhost:8000/v1"),
        ("openai:@cf/meta@https://host/v1", "@cf/meta", "https://host/v1"),
        ("https://host:8000/v1", "", "https://host:8000/v1"),
    ],
)
def test_sources(source: str, name: str, url: str) -> None:
    found = resolve(source)
    assert (found.kind, found.name, found.location) == ("server", name, url)


def test_a_source_without_model_or_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ModelNotFoundError, match="names no model"):
        resolve("openai:")
    with pytest.raises(EngineError, match=r"no server is named.*OPENAI_BASE_URL"):
        load_engine("openai:m")


def test_the_server_comes_from_source_settings_or_environment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = serve(talks), serve(talks)
    monkeypatch.setenv("OPENAI_BASE_URL", one.url + "/")
    assert f"openai:m@{one.url} (" in load_engine("openai:m").source
    assert f"@{two.url} (" in load_engine("openai:m", settings=ServerSettings(base_url=two.url)).source
    assert f"@{two.url} (" in load_engine(two.url, settings=ServerSettings(base_url=one.url)).source


def test_a_url_alone_means_its_only_model(serve: Serve) -> None:
    assert load_engine(serve(talks, ["only"]).url).source.startswith("openai:only@")
    with pytest.raises(EngineError, match="lists these models: a, b; name one"):
        load_engine(serve(talks, ["a", "b"]).url)


def test_a_server_without_a_list_of_models_is_used(serve: Serve) -> None:
    server = serve(talks, Reply({"error": "no"}, 500))
    assert load_engine(f"openai:m@{server.url}").generate([ask()])[0].text == " Ada; London"


@pytest.mark.parametrize("url", ["http://user:secret@host/v1", "https://host/v1?key=secret", "http://host/v1#secret"])
def test_urls_with_secrets_are_refused_without_quoting_them(url: str) -> None:
    for place in ({"server": {"base_url": url}}, {"members": [{"name": "m", "source": f"openai:m@{url}"}]}):
        with pytest.raises(ConfigError, match="password") as config_error:
            load_config(None, place)
        assert "secret" not in str(config_error.value)
    with pytest.raises(EngineError, match="password") as error:
        load_engine(f"openai:m@{url}")
    assert "secret" not in str(error.value)


def test_no_hidden_states(serve: Serve) -> None:
    e = engine(serve(talks))
    assert e.n_layers == 0
    with pytest.raises(EngineError, match="hidden states"):
        e.read(["a"], [0])


# Choices


CHOICES = (" person", " creative work", " none of these")


def test_listed_tokens_are_shared_out_and_normalised(serve: Serve) -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        return text_reply(
            " person", legacy({" person": 0.4, " creative": 0.2, " the": 0.3, " no": 0.004, " none": 0.1})
        )

    server = serve(script)
    e = engine(server, chat=False)
    assert e.way == "listed"
    (scores,) = e.choose([Choose(("Type of x:",), CHOICES, "choices")])
    np.testing.assert_allclose(np.exp(scores), np.array([4, 2, 1]) / 7, rtol=1e-5)
    assert server.asked[-1] == ("/v1/completions", server.asked[-1][1])
    assert server.asked[-1][1]["logprobs"] == 20
    with pytest.raises(EngineError, match="normalise='vocab' needs"):
        e.choose([Choose(("Type of x:",), CHOICES, "vocab")])


def test_a_token_that_settles_nothing_is_looked_into(serve: Serve) -> None:
    """ " no" may go on as anything, " creat" means one choice only if it does, " music" is shared by two."""
    behind = {
        "": {" no": 0.4, " creat": 0.2, " music": 0.3, " x": 0.1},
        " no": {"body": 0.9, "ne": 0.1},
        " creat": {"ive": 0.9, "ure": 0.1},
        " music": {" artist": 0.5, " album": 0.25, "ian": 0.25},
    }

    def script(path: str, body: dict[str, Any]) -> Reply:
        rest = body["prompt"].partition("Type of x:")[2]
        return text_reply("", legacy(behind.get(rest, {"?": 0.5, "!": 0.5})))

    e = engine(serve(script), chat=False, choices="listed")
    choices = (" none of these", " creative work", " music artist", " music album")
    (scores,) = e.choose([Choose(("Type of x:",), choices, "choices")])
    mass = np.array([0.4 * 0.1, 0.2 * 0.9, 0.3 * 0.5, 0.3 * 0.25])
    np.testing.assert_allclose(np.exp(scores), mass / mass.sum(), rtol=1e-5)


def test_a_choice_that_begins_another_takes_what_the_other_leaves(serve: Serve) -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        top = {" work": 0.25, "\n": 0.7} if body["prompt"].endswith(" art") else {" art": 0.8, " it": 0.2}
        return text_reply("", legacy(top))

    e = engine(serve(script), chat=False, choices="listed")
    (scores,) = e.choose([Choose(("Type:",), (" art", " art work"), "choices")])
    np.testing.assert_allclose(np.exp(scores), [0.75, 0.25], rtol=1e-5)


def test_what_is_not_listed_is_bounded_and_counted(serve: Serve) -> None:
    e = engine(serve(lambda path, body: text_reply("", legacy({" yes": 0.6, " it": 0.2}))), chat=False)
    yes_no, neither = e.choose([Choose(("a?",), (" yes", " no"), "choices"), Choose(("b?",), (" x", " y"), "choices")])
    np.testing.assert_allclose(np.exp(yes_no), [0.75, 0.25], rtol=1e-5)
    assert np.isnan(neither).all()  # an abstention
    assert any("least probability listed, an upper bound: 1" in note for note in e.notes)
    assert any("which abstain: 1" in note for note in e.notes)


def test_chats_answer_in_any_case(serve: Serve) -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        assert path == "/v1/chat/completions"
        return text_reply("Yes", content({"Yes": 0.5, " yes": 0.1, "No": 0.2, "Maybe": 0.2}, {".": 0.9, "!": 0.1}))

    e = engine(serve(script))
    assert e.way == "listed"
    (scores,) = e.choose([Choose(("Is it?",), (" yes", " no"), "choices")])
    np.testing.assert_allclose(np.exp(scores), [0.75, 0.25], rtol=1e-5)


def test_a_chat_is_followed_along_what_it_wrote(serve: Serve) -> None:
    places = ({"Music": 0.6, "Person": 0.4}, {" artist": 0.75, " album": 0.25}, {".": 1.0})
    e = engine(serve(lambda path, body: text_reply("Music artist", content(*places))))
    (scores,) = e.choose([Choose(("?",), (" music artist", " music album", " person"), "choices")])
    np.testing.assert_allclose(np.exp(scores), [0.45, 0.15, 0.4], rtol=1e-5)


def echo_script(path: str, body: dict[str, Any]) -> Reply:
    """Every letter is a token; its log-probability is minus its place in the alphabet over ten."""
    written = [*body["prompt"], "!"]
    numbers = [None, *(-(ord(c.lower()) % 32) / 10 for c in written[1:])]
    logprobs = {"tokens": written, "token_logprobs": numbers, "top_logprobs": None}
    return text_reply("".join(written), logprobs, prompt_tokens=len(written) - 1, completion_tokens=1)


def test_echoed_choices_are_exact(serve: Serve) -> None:
    e = engine(serve(echo_script), chat=False)
    assert e.way == "echo"
    assert "log-probabilities of all their tokens" in e.source
    sums, nodes = e.choose([Choose(("q:",), (" ab", " ac"), "vocab"), Choose(("q:",), (" ab", " ac"), "choices")])
    np.testing.assert_allclose(sums, [-0.3, -0.4], atol=1e-6)  # a blank is place 0
    odds = np.exp([-0.2, -0.3])
    np.testing.assert_allclose(np.exp(nodes), odds / odds.sum(), rtol=1e-5)
    assert e.count_tokens([("q:",)]) in ([2], [3])  # as the server counts, with or without the blank's token


def test_a_server_that_ignores_echo_is_noticed(serve: Serve) -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        return text_reply(" a", legacy({" a": 0.5, " b": 0.5}), prompt_tokens=3, completion_tokens=1)

    assert engine(serve(script), chat=False).way == "listed"


def test_without_log_probabilities_answers_are_constrained(serve: Serve) -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        if "response_format" not in body:
            return text_reply("whatever")
        enum = body["response_format"]["json_schema"]["schema"]["properties"]["answer"]["enum"]
        return text_reply(json.dumps({"answer": enum[-1]}))

    e = engine(serve(script))
    assert e.way == "schema"
    assert "constrained answers, without probabilities" in e.source
    (scores,) = e.choose([Choose(("?",), CHOICES, "choices")])
    np.testing.assert_allclose(np.exp(scores), [0.05, 0.05, 0.9], rtol=1e-5)


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("None of these.", 2), ('"person"', 0), ("\n\nCreative work: a novel", 1), ("It is a person", 0),
        ("personal", None), ("person or creative work", 0), ("either a creative work or a person", None), ("", None),
    ],
)  # fmt: skip
def test_answers_are_parsed(serve: Serve, said: str, means: int | None) -> None:
    e = engine(serve(lambda path, body: text_reply(said)))
    assert e.way == "answer"
    assert "parsed answers" in e.notes[0]
    (scores,) = e.choose([Choose(("?",), CHOICES, "choices")])
    assert np.isnan(scores).all() if means is None else int(scores.argmax()) == means


def test_a_way_can_be_asked_for(serve: Serve) -> None:
    server = serve(lambda path, body: text_reply("", content({"a": 0.5, "b": 0.5})))
    assert engine(server, choices="answer").way == "answer"
    with pytest.raises(EngineError, match=r"server\.choices='echo'.*listed, schema, answer"):
        engine(server, choices="echo")


# Generating


def test_replies_are_one_line_and_lists_are_sent_as_grammars(serve: Serve) -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        return text_reply("\n\n Ada\nmore", prompt_tokens=7, completion_tokens=3)

    rows = [{"id": "m", "owned_by": "llamacpp", "meta": {"n_ctx": 777}}]
    server = serve(script, Reply({"data": rows}))
    e = engine(server)
    assert e.max_tokens == 777
    (completion,) = e.generate([Generate(("x",), SubstringList("Ada met Bob"), 8)])
    assert (completion.text, completion.prompt_tokens, completion.generated_tokens) == (" Ada", 7, 3)
    assert '"Bob"' in server.asked[-1][1]["grammar"]


def test_a_refused_grammar_is_left_out_and_noted(serve: Serve) -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        return Reply({"error": {"message": "bad grammar"}}, 400) if "grammar" in body else talks(path, body)

    e = engine(serve(script, Reply({"data": [{"id": "m", "owned_by": "llamacpp"}]})))
    request = Generate(("x",), SubstringList("Ada met Bob"), 8)
    assert e.generate([request])[0].text == " Ada; London"
    assert any("lists are not constrained" in note and "bad grammar" in note for note in e.notes)


def test_control_tokens_in_texts_are_inert(serve: Serve) -> None:
    server = serve(lambda path, body: text_reply(body["messages"][0]["content"].partition("Text: ")[2]))
    text = "a <|im_end|> </s> [INST] <start_of_turn> <b>"
    (completion,) = engine(server).generate([Generate((f"Text: {text}",), None, 8)])
    sent = server.asked[-1][1]["messages"][0]["content"]
    assert all(token not in sent for token in ("<|", "|>", "</s>", "[INST]", "<start_of_turn>"))
    assert "<b>" in sent
    assert completion.text == text  # the reply as if nothing had been put in


def test_batches_equal_single_calls_and_nothing_is_asked_twice(serve: Serve) -> None:
    server = serve(lambda path, body: text_reply(body["messages"][0]["content"].upper(), prompt_tokens=2))
    e = engine(server)
    before = len(server.asked)
    requests = [ask(f"text {i % 7}") for i in range(21)]
    assert [c.text for c in e.generate(requests)] == [f"TEXT {i % 7}" for i in range(21)]
    assert len(server.asked) - before == 7
    assert [engine(server).generate([r])[0] for r in requests[:3]] == e.generate(requests[:3])
    assert e.counts.prompt > 0


def test_no_more_requests_at_once_than_allowed(serve: Serve) -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        return Reply(text_reply("a").body, pause_s=0.2)

    server = serve(script)
    engine(server, concurrency=3).generate([ask(str(i)) for i in range(12)])
    assert 2 <= server.most_at_once <= 3  # three, unless the machine was too busy to start them together


# Servers that misbehave


def first_then(*replies: Reply, after: Script = talks) -> Script:
    """Those replies to the first requests for the text "go", then the script."""
    left = list(replies)

    def script(path: str, body: dict[str, Any]) -> Reply:
        return left.pop(0) if left and "go" in json.dumps(body.get("messages")) else after(path, body)

    return script


def test_retry_after_is_honoured(serve: Serve) -> None:
    server = serve(first_then(Reply({}, 429, {"Retry-After": "0.4"})))
    e = engine(server)
    before = len(server.times)
    assert e.generate([ask("go")])[0].text == " Ada; London"
    assert 0.4 <= server.times[before + 1] - server.times[before] < 2.0


def test_too_long_a_pause_is_not_waited_for(serve: Serve) -> None:
    e = engine(serve(first_then(Reply({"error": {"message": "quota"}}, 429, {"Retry-After": "3600"}))))
    with pytest.raises(EngineError, match=r"status 429 \(quota\); it asks to wait 3600 s"):
        e.generate([ask("go")])


def test_retry_after_in_all_its_forms() -> None:
    assert retry_after_s({"retry-after": "7"}) == 7
    assert retry_after_s({"retry-after-ms": "1500", "retry-after": "7"}) == 1.5
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < (retry_after_s({"retry-after": soon}) or 0) <= 30
    for wrong in ({}, {"retry-after": "soon"}, {"retry-after": "nan"}, {"retry-after": "-1"}, {"retry-after": "inf"}):
        assert retry_after_s(wrong) is None


BROKEN = {
    "500": Reply({"error": "broken"}, 500),
    "503": Reply(b"<html>", 503),
    "no JSON": Reply(b"{'choices': "),
    "no choices": Reply({"choices": []}),
    "a list": Reply([1]),
    "no text": Reply({"choices": [{"text": 5}]}),
    "cut off": Reply(text_reply("a").body, missing=50),
    "empty": Reply(b""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_reply_is_asked_for_again(serve: Serve, kind: str) -> None:
    e = engine(serve(first_then(BROKEN[kind], BROKEN[kind])))
    assert e.generate([ask("go")])[0].text == " Ada; London"


@pytest.mark.parametrize("kind", BROKEN)
def test_a_reply_that_stays_broken_is_one_clear_line(serve: Serve, kind: str) -> None:
    server = serve(first_then(*[BROKEN[kind]] * 3))
    with pytest.raises(EngineError, match=r"^server http://127.*\(3 tries\)$") as error:
        engine(server).generate([ask("go")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reply", [Reply({}, pause_s=1.5), Reply({"choices": "x" * 200}, trickle_s=0.05)])
def test_slow_servers_are_given_up(serve: Serve, reply: Reply) -> None:
    e = engine(serve(first_then(reply, reply)), timeout_s=0.3, retries=1)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"did not answer within 0\.3 s.*\(2 tries\)"):
        e.generate([ask("go")])
    assert time.monotonic() - began < 2.0


def test_an_unreachable_server_is_one_line(serve: Serve) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(EngineError, match=r"cannot be reached.*start it, or correct the URL") as error:
        load_engine(f"openai:m@{url}")
    assert "\n" not in str(error.value)


def test_a_wrong_model_is_named_with_those_that_are_there(serve: Serve) -> None:
    server = serve(lambda path, body: Reply({"error": {"message": "model not found"}}, 404), ["qwen", "phi"])
    with pytest.raises(EngineError, match=r"404: model not found\).*no model 'm'.*it lists qwen, phi"):
        engine(server)


def test_a_refused_key_is_never_shown(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(lambda path, body: Reply({"error": {"message": f"wrong key {KEY}"}}, 401))
    settings = ServerSettings(api_key=KEY)
    with pytest.raises(EngineError, match=r"refused the key \(401: wrong key \*\*\*\)") as error:
        OpenAIEngine("e", f"openai:m@{server.url}", settings=settings)
    assert KEY not in repr(settings) + caplog.text + repr(error.value) + repr(error.value.__context__)
    assert len(server.asked) == 1  # no use in trying again


def test_one_failure_does_not_fail_the_others(serve: Serve) -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        return Reply({"error": "too long"}, 400) if "BAD" in json.dumps(body["messages"]) else talks(path, body)

    server = serve(script)
    e = engine(server)
    requests = [ask("a"), ask("BAD"), ask("b")]
    with pytest.raises(EngineError, match="400: too long"):
        e.generate(requests)
    before = len(server.asked)
    assert len(e.generate([requests[0], requests[2]])) == 2
    assert len(server.asked) == before  # both were answered in the batch that failed


def test_a_server_that_falls_silent_is_not_asked_for_ever(serve: Serve) -> None:
    silent = threading.Event()

    def script(path: str, body: dict[str, Any]) -> Reply:
        return Reply({}, pause_s=0.4) if silent.is_set() else talks(path, body)

    server = serve(script)
    e = engine(server, timeout_s=0.1, retries=1, concurrency=2)
    silent.set()
    for i in range(server_module.GIVE_UP_AFTER):
        with pytest.raises(EngineError, match="did not answer within"):
            e.generate([ask(f"{i} {j}") for j in range(8)])
    time.sleep(0.5)  # what was on its way has arrived
    before = len(server.asked)
    assert before < 30  # of 40 and their retries
    with pytest.raises(EngineError, match="5 calls in a row and is not asked any more"):
        e.generate([ask("x")])
    assert len(server.asked) == before


def test_budgets(serve: Serve) -> None:
    server = serve(talks)
    e = engine(server, budget=Budget(max_requests=6))
    probes = len(server.asked) + 1  # the list of models is a request too
    assert e.generate([ask(str(i)) for i in range(6 - probes)])
    with pytest.raises(EngineError, match="budget of 6 requests is spent"):
        e.generate([ask("x")])
    assert len(server.asked) + 1 == 6
    tight = Budget(max_tokens=400)
    e = engine(
        serve(lambda path, body: text_reply("a", prompt_tokens=9, completion_tokens=1, total_tokens=10)), budget=tight
    )
    spent = tight.tokens
    e.generate([ask("x")])
    assert tight.tokens == spent + 10  # what the server counted, not what was set aside
    with pytest.raises(EngineError, match="budget of 400 tokens does not suffice"):
        e.generate([ask("word " * 500)])


# Settings, pipeline, command line


def test_the_key_is_in_no_report_and_no_message(serve: Serve) -> None:
    server = serve(talks)
    config = load_config(
        None, {"members": [f"m=openai:m@{server.url}"], "server": {"api_key": KEY}, "voters": ["m"], "preset": "paper"}
    )
    model = El4ner.from_config(config, seed=1)
    assert KEY not in json.dumps(model.report()) + repr(model.config)
    assert model.config.server.api_key is not None
    assert model.config.server.api_key.get_secret_value() == KEY
    with pytest.raises(ConfigError) as error:
        load_config(None, {"server": {"api_key": [KEY]}})
    assert KEY not in str(error.value)


@pytest.fixture
def labels_file(tmp_path: Path) -> str:
    path = tmp_path / "labels.yaml"
    path.write_text("- name: person\n- name: place\n", encoding="utf-8")
    return str(path)


def member_script(path: str, body: dict[str, Any]) -> Reply:
    """Lists Ada and London, says person to Ada and place to London, and confirms what it is asked about them."""
    prompt = body["messages"][0]["content"]
    if "BAD" in prompt:
        return Reply({"error": {"message": "content filter"}}, 400)
    if "logprobs" not in body:
        return text_reply("Ada; London", prompt_tokens=50, completion_tokens=4)
    if prompt.endswith("Answer:"):
        return text_reply("Yes", content({"Yes": 0.9, "No": 0.1}), prompt_tokens=60)
    surface = prompt.rpartition('Type of "')[2].partition('"')[0]
    label = {"Ada": "Person", "London": "Place"}.get(surface, "None")
    return text_reply(
        label, content({label: 0.8} | {other: 0.05 for other in ("Person", "Place", "None") if other != label})
    )


def test_one_record_fails_and_the_rest_goes_on(serve: Serve, labels_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(member_script)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    model = El4ner.from_config(members=["m=openai:m"], labels=labels_file, voters=["m"])
    good, bad, last = model.predict(["Ada left London.", "BAD text.", "London likes Ada."])
    assert [(e.text, e.label) for e in good.entities] == [("Ada", "person"), ("London", "place")]
    assert [(e.text, e.label) for e in last.entities] == [("London", "place"), ("Ada", "person")]
    assert good.entities[0].verified == pytest.approx(0.9)
    assert set(good.to_dict()) == {"id", "text", "entities", "status", "error", "usage", "extra"}
    assert (bad.status, bad.entities) == ("failed", ())
    assert bad.error is not None
    assert "refused the request (400: content filter)" in bad.error
    assert model.report()["records"] == {"ok": 2, "failed": 1}


def test_the_command_line_takes_server_and_key(serve: Serve, labels_file: str, tmp_path: Path) -> None:
    server = serve(member_script)
    report = tmp_path / "report.json"
    options = ["--members", "m=openai:m", "--labels", labels_file, "--voters", "m", "--report", str(report)]
    done = CliRunner().invoke(
        main, ["predict", "--text", "Ada left London.", *options, "--base-url", server.url, "--api-key", KEY, "-q"]
    )
    assert done.exit_code == 0, done.output
    assert [e["text"] for e in json.loads(done.stdout)["entities"]] == ["Ada", "London"]
    assert KEY not in done.output + report.read_text(encoding="utf-8")


def test_an_unreachable_server_ends_the_command_with_one_line(
    labels_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "BACKOFF_S", 0.01)
    monkeypatch.delenv("EL4NER_DEBUG", raising=False)
    options = ["--members", "m=openai:m@http://127.0.0.1:9/v1", "--labels", labels_file, "--voters", "m", "-q"]
    done = CliRunner().invoke(main, ["predict", "--text", "Ada left London.", *options])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("el4ner: error: server http://127.0.0.1:9/v1 cannot be reached")
    assert done.stderr.count("\n") == 1
