"""One OpenAI-compatible server: requests with a time limit, retries, a budget, and one clear line when it fails.

The key goes into the client and nowhere else: messages that quote a server are searched for it.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from el4ner.errors import ConfigError, EngineError

T = TypeVar("T")

BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 20.0
LONGEST_WAIT_S = 120.0
"""A server that asks for a longer pause (Retry-After) is not waited for."""
MAX_REPLY_BYTES = 64 << 20
GIVE_UP_AFTER = 5
"""Calls in a row in which nothing answered; after that nobody asks any more."""

_RETRIED = (408, 409, 425, 429)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How servers are asked.

    base_url, api_key: None for OPENAI_BASE_URL and OPENAI_API_KEY; a source may name its own URL. timeout_s: for one
    request; a reply that trickles in is given up at its first byte after that. retries: further tries after a time-out,
    a lost connection, a reply that cannot be used, or status 408, 409, 425, 429 or 5xx. concurrency: requests under way
    at once. max_requests, max_tokens: the budget of a run, tries and tokens of prompts and replies; None for no limit.
    context_tokens: longest prompt with its reply; None for what the server says, else 4096. choices: how choices are
    scored, "auto" for the first way of `openai.WAYS` that the server offers. extra: fields added to every request.
    """

    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    retries: int = 5
    concurrency: int = 8
    max_requests: int | None = None
    max_tokens: int | None = None
    context_tokens: int | None = None
    choices: str = "auto"
    extra: Mapping[str, Any] = field(default_factory=dict)


class ServerRefusedError(EngineError):
    """The server understood a request and does not want it; asking again does not help."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerLostError(EngineError):
    """Nothing came back: no connection, or no answer in time."""


class Budget:
    """Requests and tokens that a run may spend; shared by all servers of a run."""

    def __init__(self, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = 0
        self._lock = threading.Lock()

    def take(self, tokens: int) -> None:
        """Before a request of so many tokens at most. Raises EngineError where that would exceed the budget."""
        with self._lock:
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise EngineError(
                    f"the budget of {self.max_requests} requests is spent (server.max_requests); raise it, or leave it "
                    "out for no limit"
                )
            if self.max_tokens is not None and self.tokens + tokens > self.max_tokens:
                raise EngineError(
                    f"the budget of {self.max_tokens} tokens does not suffice for another {tokens}, {self.tokens} are "
                    "spent (server.max_tokens); raise it, or leave it out for no limit"
                )
            self.requests += 1
            self.tokens += tokens

    def settle(self, taken: int, used: int) -> None:
        """After a request: what it really took."""
        with self._lock:
            self.tokens += used - taken


class _Failure(Exception):  # noqa: N818 - never leaves this file
    """A try that may be repeated. wait_s: what the server asks for."""

    def __init__(self, error: EngineError, wait_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.wait_s = error, wait_s


class Server:
    """A server behind the `openai` client; safe to use from several threads.

    url: with the path that the endpoints stand under, as in http://localhost:8000/v1. Raises EngineError where the
    client is not installed or the URL cannot be one.
    """

    def __init__(self, url: str, settings: ServerSettings, budget: Budget | None = None) -> None:
        self.url = checked_url(url)
        self.settings = settings
        self.budget = budget or Budget(settings.max_requests, settings.max_tokens)
        self._key = settings.api_key or os.environ.get("OPENAI_API_KEY") or ""
        self._openai = _import_client()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                "the server's API key holds what no key can, such as a letter with an accent; copy it anew"
            )
        self._client = self._new_client(settings.timeout_s)
        weakref.finalize(self, self._client.close)  # connections do not outlive the server they lead to
        # the client's HTTP library, whichever it is built on: reading a reply fails with that one's errors
        http = importlib.import_module(type(self._client.base_url).__module__.partition(".")[0])
        self._transport_errors: tuple[type[Exception], ...] = (http.HTTPError, http.StreamError, http.InvalidURL)
        self._jitter = random.Random()
        self._stopped = threading.Event()
        self._silent = False
        self.silent_calls = 0

    def _new_client(self, timeout_s: float) -> Any:
        try:
            return self._openai.OpenAI(
                base_url=self.url,
                api_key=self._key or "none",  # most servers of one's own want no key; the client wants one
                max_retries=0,
                timeout=self._openai.Timeout(timeout_s, connect=min(10.0, timeout_s)),
            )
        except Exception as error:  # noqa: BLE001  its HTTP library has many kinds for addresses and proxies
            reason = self._clean(" ".join(str(error).split()) or type(error).__name__)
            raise EngineError(
                f"server {self.url}: no connection can be set up ({reason}); check the URL, and HTTP_PROXY, "
                "HTTPS_PROXY and ALL_PROXY"
            ) from None

    # Asking

    def models(self) -> list[dict[str, Any]]:
        """What the server lists at /models: nothing where it has no such list, or fails to make one.

        Raises EngineError if it cannot be reached or refuses the key.
        """
        try:
            data = self._ask(lambda: self._client.models.with_streaming_response.list(), _any_json, 0, 1)
        except ServerLostError:
            raise
        except EngineError as error:
            if isinstance(error, ServerRefusedError) and error.status in (401, 403):
                raise
            return []
        rows = data.get("data") if isinstance(data, dict) else None
        return [row for row in rows or [] if isinstance(row, dict) and isinstance(row.get("id"), str)]

    def complete(self, body: Mapping[str, Any], read: Callable[[Any], T], tokens: int) -> T:
        """POST /completions. read: makes a result of the JSON, or ValueError. tokens: what it takes at most."""
        return self._post(self._client.completions, body, read, tokens)

    def chat(self, body: Mapping[str, Any], read: Callable[[Any], T], tokens: int) -> T:
        """POST /chat/completions, as `complete`."""
        return self._post(self._client.chat.completions, body, read, tokens)

    def _post(self, endpoint: Any, body: Mapping[str, Any], read: Callable[[Any], T], tokens: int) -> T:
        known = {name: body[name] for name in ("model", "prompt", "messages") if name in body}
        rest = {name: value for name, value in body.items() if name not in known} | dict(self.settings.extra)
        create = endpoint.with_streaming_response.create
        return self._ask(lambda: create(**known, extra_body=rest), read, tokens, self.settings.retries)

    def stop(self) -> None:
        """Nobody waits for another try; for a run that is interrupted."""
        self._stopped.set()

    @property
    def given_up(self) -> bool:
        """Whether the server was silent for so long that it is not asked any more."""
        return self.silent_calls >= GIVE_UP_AFTER

    def _ask(self, send: Callable[[], Any], read: Callable[[Any], T], tokens: int, retries: int) -> T:
        """Tries until something comes back. Raises EngineError with the last failure."""
        if self.given_up:
            raise ServerLostError(
                f"server {self.url} did not answer {GIVE_UP_AFTER} calls in a row and is not asked any more; see to it "
                "and run again"
            )
        tries = 1 + (0 if self._silent else retries)
        for tried in range(1, tries + 1):
            self.budget.take(tokens)
            used = 0
            try:
                data = self._once(send)
                result, used = self._read(data, read), _used_tokens(data, tokens)
                self._silent = False
                return result
            except _Failure as failure:
                self._wait_or_raise(failure, tried, tries)
            finally:
                self.budget.settle(tokens, used)
        raise AssertionError("the last try returns or raises")

    def _wait_or_raise(self, failure: _Failure, tried: int, tries: int) -> None:
        error = failure.error
        wait_s = failure.wait_s
        if wait_s is not None and wait_s > LONGEST_WAIT_S:
            raise EngineError(f"{error}; it asks to wait {wait_s:.0f} s, {LONGEST_WAIT_S:.0f} s is waited at most")
        if tried == tries:
            self._silent = isinstance(error, ServerLostError)
            if tries > 1:
                error = type(error)(f"{error} ({tries} tries)")
            raise error
        if wait_s is None:
            longest = min(LONGEST_BACKOFF_S, BACKOFF_S * 2 ** (tried - 1))
            wait_s = longest * self._jitter.uniform(0.5, 1.0)
        if self._stopped.wait(wait_s):
            raise error

    def _read(self, data: Any, read: Callable[[Any], T]) -> T:
        try:
            return read(data)
        except ValueError as error:
            raise _Failure(EngineError(f"server {self.url} sent a reply that cannot be used: {error}")) from None

    # One try

    def _once(self, send: Callable[[], Any]) -> Any:
        """The JSON of one reply. Raises _Failure where another try may help, EngineError where not."""
        received = self._receive(send)
        if isinstance(received, Exception):
            raise received  # outside the client's own exceptions, whose texts may quote the key
        try:
            return _with_whole_characters(json.loads(received))
        except ValueError:
            start = self._clean(received[:60].decode("utf-8", "replace"))
            raise _Failure(
                EngineError(f"server {self.url} sent a reply that is no JSON ({start!r}); is it the right URL?")
            ) from None

    def _receive(self, send: Callable[[], Any]) -> bytes | Exception:
        """The bytes of one reply, or what went wrong."""
        deadline = time.monotonic() + self.settings.timeout_s
        client = self._openai
        body = bytearray()
        try:
            with send() as response:
                for part in response.iter_bytes():
                    body += part
                    if time.monotonic() > deadline:
                        return _Failure(self._late())
                    if len(body) > MAX_REPLY_BYTES:
                        return EngineError(f"server {self.url} sent more than {MAX_REPLY_BYTES >> 20} MiB in one reply")
        except client.APITimeoutError:
            return _Failure(self._late())
        except client.APIConnectionError as error:
            return _Failure(self._unreachable(error.__cause__ or error))
        except client.APIStatusError as error:
            return self._status(error)
        except client.OpenAIError as error:
            return EngineError(f"server {self.url}: {self._clean(error)}")
        except self._transport_errors as error:
            late = "Timeout" in type(error).__name__
            lost = ServerLostError(f"server {self.url} broke off its reply ({self._clean(error)})")
            return _Failure(self._late() if late else lost)
        return bytes(body)

    def _late(self) -> ServerLostError:
        return ServerLostError(
            f"server {self.url} did not answer within {self.settings.timeout_s:g} s (server.timeout_s); raise that, or "
            "lower server.concurrency"
        )

    def _unreachable(self, cause: BaseException) -> ServerLostError:
        return ServerLostError(
            f"server {self.url} cannot be reached ({self._clean(cause)}); start it, or correct the URL (--base-url, "
            "OPENAI_BASE_URL or the member's source)"
        )

    def _status(self, error: Any) -> Exception:
        """What a status above 399 means."""
        status = int(error.status_code)
        said = self._clean(_server_message(error.body) or error.message)
        if status in _RETRIED or status >= 500:
            failed = EngineError(f"server {self.url} answered with status {status} ({said})")
            return _Failure(failed, retry_after_s(error.response.headers))
        if status in (401, 403):
            return ServerRefusedError(
                f"server {self.url} refused the key ({status}: {said}); set OPENAI_API_KEY or server.api_key",
                status,
            )
        return ServerRefusedError(f"server {self.url} refused the request ({status}: {said})", status)

    def _clean(self, words: object) -> str:
        """What somebody else wrote, on one line, cut, and without the key."""
        text = " ".join(str(words).split()) or type(words).__name__
        if self._key:
            text = text.replace(self._key, "***")
        return text if len(text) <= 300 else f"{text[:297]}..."


def _with_whole_characters(data: Any) -> Any:
    """The data with U+FFFD for halves of a character (lone surrogates), which JSON can hold and no tokenizer reads."""
    if isinstance(data, str):
        return data if data.isascii() else data.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if isinstance(data, list):
        return [_with_whole_characters(value) for value in data]
    if isinstance(data, dict):
        return {_with_whole_characters(key): _with_whole_characters(value) for key, value in data.items()}
    return data


def checked_url(url: str) -> str:
    """The URL without a closing slash. Raises EngineError, without quoting it, where it holds a password or a query."""
    if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", url):
        raise EngineError(
            "the server's URL is none of http or https, or holds a user name, a password or a query; give one like "
            "http://localhost:8000/v1, and the key by OPENAI_API_KEY"
        )
    return url.rstrip("/")


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: `retry-after-ms`, or `retry-after` as seconds or a date; None without."""
    from email.utils import parsedate_to_datetime

    for name, factor in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * factor
        except (KeyError, ValueError):
            continue
        return seconds if 0 <= seconds < float("inf") else None
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError):
        return None


def _any_json(data: Any) -> Any:
    return data


def _used_tokens(data: Any, otherwise: int) -> int:
    usage = data.get("usage") if isinstance(data, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) and total >= 0 else otherwise


def _server_message(body: Any) -> str | None:
    """The message in an error's body, which servers nest in different ways."""
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    if isinstance(body, dict):
        return json.dumps(body)
    return str(body) if body else None


def _import_client() -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise EngineError(
            f"models behind a server need the openai client ({error}); install it: pip install 'el4ner[openai]'"
        ) from error
