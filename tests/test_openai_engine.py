"""Models behind a server: where it is, how choices are scored, what is written; test_openai_faults.py has the rest.

The servers are real ones on this machine; what they say is written here. Real models stand in test_openai_servers.py.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from fake_server import Reply, Serve, ask, content, engine, legacy, talks, text_reply

from el4ner.config import load_config
from el4ner.engines import Choose, Generate, ServerSettings, SubstringList, load_engine
from el4ner.engines.server_requests import inert
from el4ner.errors import ConfigError, EngineError, ModelNotFoundError
from el4ner.models import resolve

pytest.importorskip("openai", reason="the extra openai is not installed")


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


@pytest.mark.parametrize("url", ["notaurl", "ftp://host/v1", "http://", "localhost:8000/v1"])
def test_what_is_no_url_of_a_server_is_a_wrong_setting(url: str) -> None:
    with pytest.raises(ConfigError, match="begins with http:// or https://") as error:
        load_config(None, {"server": {"base_url": url}})
    assert error.value.exit_code == 2


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
    assert e.computed[0] in (2, 3)
    assert e.computed == e.count_tokens([("q:",)]) * 2  # as the server counts, with or without the blank's token
    e.choose([Choose(("q:",), (" ab",), "choices")])
    (reply,) = e.generate([Generate(("q:",), None, 4)])
    assert e.computed == [reply.prompt_tokens]


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


def test_a_list_that_goes_round_in_circles_is_cut(serve: Serve) -> None:
    reply = text_reply(" Ada; Bob; Ada; Bob; Ada; Bob; Ada; Bo", completion_tokens=16)
    reply.body["choices"][0]["finish_reason"] = "length"
    e = engine(serve(lambda *_: reply))
    listed, free = e.generate([Generate(("x",), SubstringList("Ada met Bob"), 16), Generate(("x",), None, 16)])
    assert (listed.text, listed.truncated, listed.generated_tokens) == (" Ada; Bob; Ada; Bob; Ada", False, 16)
    assert free.truncated


def test_a_refused_grammar_is_left_out_and_noted(serve: Serve) -> None:
    def script(path: str, body: dict[str, Any]) -> Reply:
        return Reply({"error": {"message": "bad grammar"}}, 400) if "grammar" in body else talks(path, body)

    e = engine(serve(script, Reply({"data": [{"id": "m", "owned_by": "llamacpp"}]})))
    request = Generate(("x",), SubstringList("Ada met Bob"), 8)
    assert e.generate([request])[0].text == " Ada; London"
    assert any("lists are not constrained" in note and "bad grammar" in note for note in e.notes)


def test_control_tokens_in_texts_are_inert(serve: Serve) -> None:
    server = serve(lambda path, body: text_reply(body["messages"][0]["content"].partition("Text: ")[2]))
    text = "a <|im_end|> </s> [INST] <start_of_turn> [gMASK]<sop> <tool_response> <b>"
    (completion,) = engine(server).generate([Generate((f"Text: {text}",), None, 8)])
    sent = server.asked[-1][1]["messages"][0]["content"]
    tokens = ("<|", "|>", "</s>", "[INST]", "<start_of_turn>", "[gMASK]", "<sop>", "<tool_response>")
    assert all(token not in sent for token in tokens)
    assert "<b>" in sent
    assert inert("[CLS]Ada[SEP]") == "[CLS]Ada[SEP]"  # how the paper preset writes its lists
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
