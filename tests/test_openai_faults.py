"""Servers that misbehave: slow, silent, cut off, overloaded, wrong; keys stay secret; one record fails alone."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_server import Reply, Script, Serve, ask, content, engine, talks, text_reply

from el4ner import El4ner
from el4ner.cli import main
from el4ner.config import load_config
from el4ner.engines import ServerSettings, load_engine
from el4ner.engines import server as server_module
from el4ner.engines.openai import OpenAIEngine
from el4ner.engines.server import Budget, retry_after_s
from el4ner.errors import ConfigError, EngineError

pytest.importorskip("openai", reason="the extra openai is not installed")

KEY = "sk-0123456789abcdef"


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


def test_half_a_character_in_a_reply_fails_no_record(serve: Serve, labels_file: str) -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        reply = member_script(path, body)
        prompt = body["messages"][0]["content"]
        return text_reply("Ada; \ud800; London") if "logprobs" not in body and "BAD" not in prompt else reply

    server = serve(script)
    model = El4ner.from_config(members=[f"m=openai:m@{server.url}"], labels=labels_file, voters=["m"])
    (found,) = model.predict(["Ada left London."])
    assert found.status == "ok", found.error
    assert [e.text for e in found.entities] == ["Ada", "London"]


@pytest.mark.parametrize(
    ("variables", "url", "said"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "http://127.0.0.1:1/v1", "no connection can be set up"),
        ({"HTTP_PROXY": "foo://bar"}, "http://127.0.0.1:1/v1", "no connection can be set up"),
        ({}, "http://[::1/v1", "no connection can be set up"),
        ({"OPENAI_API_KEY": "cl\u00e9"}, "http://127.0.0.1:1/v1", "API key holds what no key can"),
        ({"OPENAI_API_KEY": "key\n"}, "http://127.0.0.1:1/v1", "API key holds what no key can"),
    ],
)
def test_proxies_addresses_and_keys_that_cannot_be_are_one_line(
    variables: dict[str, str], url: str, said: str, labels_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "http_proxy", "https_proxy", "EL4NER_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = ["--members", f"m=openai:m@{url}", "--labels", labels_file, "--voters", "m", "-q"]
    done = CliRunner().invoke(main, ["predict", "--text", "Ada left London.", *options])
    assert done.exit_code in (1, 2)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "unexpected" not in done.stderr
    assert variables.get("OPENAI_API_KEY", "nowhere") not in done.stderr
