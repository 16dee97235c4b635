"""A real HTTP server on this machine that answers as a model behind one would, by a script; and what it says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from el4ner.engines import Generate, ServerSettings
from el4ner.engines.openai import OpenAIEngine
from el4ner.engines.server import Budget

pytest.importorskip("openai", reason="the extra openai is not installed")


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
