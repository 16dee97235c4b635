"""Models behind any OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, transformers serve, or a hosted one.

Choices are scored in the first of these ways that the server offers, found out by one or two requests at the start:

    echo     plain text only: the server echoes prompt and choice with the log-probability of each token. Exact, as the
             `transformers` engine, up to how the server splits prompt and choice into tokens; one request a choice.
    listed   the likeliest tokens behind the prompt, as many as the server lists. Exact where every choice begins with
             a listed token that only it begins with; see `ListedChoices` for the rest. Mostly one request.
    schema   chats only: the answer is constrained to the choices by a JSON schema.
    answer   the answer is read, and abstains where it names no choice.

The last two know no probabilities: the choice that was written gets `ANSWERED`, the others share the rest.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from el4ner.engines.base import Choose, Completion, FloatArray, Generate, Prompt, TokenStates
from el4ner.engines.counts import TokenCounts
from el4ner.engines.server import Budget, Server, ServerLostError, ServerRefusedError, ServerSettings
from el4ner.engines.server_replies import (
    ListedChoices,
    ServerReply,
    answer_scores,
    chat_places,
    choice_path,
    first_line,
    parse_answer,
    path_scores,
    read_reply,
    spoken,
)
from el4ner.engines.server_requests import (
    answer_instruction,
    choice_schema,
    estimated_tokens,
    inert,
    list_constraint,
    restored,
)
from el4ner.errors import EngineError
from el4ner.models import resolve, server_url

Way = Literal["echo", "listed", "schema", "answer"]
WAYS: Mapping[Way, str] = {
    "echo": "log-probabilities of all their tokens",
    "listed": "log-probabilities of the likeliest first tokens",
    "schema": "constrained answers, without probabilities",
    "answer": "parsed answers, without probabilities",
}

CONTEXT_TOKENS = 4096
CHAT_TOKENS = 16
"""Tokens that a chat template puts around a prompt, as estimated; most take 5 to 30."""
ANSWER_TOKENS = 24
_LOOKED_AT = 4
"""Tokens of a chat's answer whose alternatives are asked for: choices differ in their first ones."""
# llama.cpp lists any number; OpenAI and vLLM at most 20 unless told otherwise, OpenAI's completions 5
_LISTED_TOKENS = {"llamacpp": (256, 20, 5)}
_KNOWN_REPLIES = 50_000

T = TypeVar("T")


class OpenAIEngine:
    """A model behind a server (implements `engines.base.Engine`).

    source: `openai:MODEL@URL`, `openai:MODEL` for the server of the settings or of OPENAI_BASE_URL, or a URL that
    serves one model. chat: ask within the server's chat template (/chat/completions), or let the model continue the
    plain text (/completions). Answers are remembered, so that a batch that failed for one request costs the others
    nothing when it is asked again. Raises EngineError where the server cannot be reached or has no such model,
    ModelNotFoundError where none is named.
    """

    n_layers = 0

    def __init__(
        self, name: str, source: str, *, chat: bool = True, settings: ServerSettings | None = None,
        budget: Budget | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.settings = settings or ServerSettings()
        self.chat = chat
        self.counts = TokenCounts()
        resolved = resolve(source)
        self._server = Server(server_url(source, self.settings.base_url), self.settings, budget)
        listed = self._server.models()
        self.model = resolved.name or self._only(listed)
        self._models = [str(row["id"]) for row in listed]
        own = next((row for row in listed if row["id"] == self.model), listed[0] if len(listed) == 1 else {})
        self._dialect = str(own.get("owned_by") or "").lower()
        self._max_tokens = self.settings.context_tokens or _context_of(own) or CONTEXT_TOKENS
        self._lock = threading.Lock()
        self._told: Counter[str] = Counter()
        self._known: dict[Generate | Choose, Any] = {}
        self._prompt_tokens: dict[Prompt, int] = {}
        self.computed: list[int] = []
        """Prompt tokens of each request of the last `choose` or `generate`: servers do not say what they shared."""
        self._constrains = True
        self._top = 0
        self.way = self._probe()

    def _only(self, listed: Sequence[Mapping[str, Any]]) -> str:
        if len(listed) == 1:
            return str(listed[0]["id"])
        names = ", ".join(str(row["id"]) for row in listed[:20]) or "none"
        raise EngineError(f"server {self._server.url} lists these models: {names}; name one: openai:MODEL@URL")

    # What it is

    @property
    def source(self) -> str:
        """Model, URL, what is added to requests, and how choices are scored: what answers depend on."""
        extra = f" {dict(sorted(self.settings.extra.items()))}" if self.settings.extra else ""
        asked = "chat" if self.chat else "plain text"
        return f"openai:{self.model}@{self._server.url}{extra} ({asked}, choices by {WAYS[self.way]})"

    @property
    def notes(self) -> list[str]:
        """What a run's report should say about how this server answered so far."""
        who = f"{self.model} at {self._server.url}"
        told = [f"{who}: {what}: {count}" for what, count in sorted(self._told.items())]
        return [f"{who}: choices are scored by {WAYS[self.way]}", *told]

    @property
    def max_tokens(self) -> int:
        """Longest prompt plus completion, as the settings or the server say."""
        return self._max_tokens

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt: what the server counted for those of the last `choose`, else an estimate.

        The estimate is rather too high; counting exactly would take a request a prompt, on servers that can.
        """
        counted, self._prompt_tokens = self._prompt_tokens, {}
        return [counted.get(prompt) or self._estimate("".join(prompt)) for prompt in prompts]

    def _estimate(self, text: str) -> int:
        return estimated_tokens(text) + (CHAT_TOKENS if self.chat else 1)

    def read_ends(self, prompts: Sequence[Prompt], layers: Sequence[int]) -> list[FloatArray]:  # noqa: ARG002
        """A server shows no hidden states: raises EngineError."""
        raise EngineError(f"{self.source}: a server shows no hidden states")

    def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:  # noqa: ARG002 - the protocol's
        """Raises EngineError: servers show no hidden states."""
        raise EngineError(f"engine {self.name!r}: hidden states cannot be read from a server; use a local model")

    # Generating

    def generate(self, requests: Sequence[Generate]) -> list[Completion]:
        """Greedy replies: the first line that is not blank. Grammars are sent to servers whose dialect is known.

        A list that was cut off while it went round in circles is what it says before that, and not `truncated`.
        Raises EngineError where a request fails; the others of the batch are remembered.
        """
        replies = self._answers(requests, self._write)
        self.computed = [reply.prompt_tokens for reply in replies]
        return replies

    def _write(self, request: Generate) -> Completion:
        prompt = "".join(request.prompt)
        limit = request.max_new_tokens
        if limit < 1:
            return Completion("", self._estimate(prompt), 0, truncated=True)
        reply = self._constrained(request, prompt, limit)
        if reply is None:
            stop = {} if self.chat else {"stop": ["\n"]}
            reply = self._ask(prompt, limit, stop)
            if not self.chat and not reply.text.strip() and not reply.truncated:
                reply = self._ask(prompt, limit, {})  # it may have begun with a line break
        text = restored(first_line(reply.text))
        cut = reply.truncated and "\n" not in reply.text.lstrip("\n")
        listed = request.grammar.before_a_loop(text) if cut and request.grammar is not None else None
        if listed is not None:  # cut off while it went round in circles: all that it has to say is there
            text, cut = listed, False
        generated = reply.generated_tokens
        return Completion(
            text,
            reply.prompt_tokens or self._estimate(prompt),
            estimated_tokens(reply.text) if generated is None else generated,
            cut,
        )

    def _constrained(self, request: Generate, prompt: str, limit: int) -> ServerReply | None:
        """The reply under a grammar; None without one, or where the server has no dialect for it or refuses it."""
        if request.grammar is None or not self._constrains:
            return None
        fields = list_constraint(self._dialect, request.grammar, leading_space=not self.chat)
        if fields is None:
            return None
        try:
            return self._ask(prompt, limit, fields)
        except ServerRefusedError as refusal:
            reply = self._ask(prompt, limit, {} if self.chat else {"stop": ["\n"]})  # raises if it was not the grammar
            with self._lock:
                if self._constrains:
                    self._told[f"grammars are refused, so lists are not constrained ({refusal}); refused"] += 1
                self._constrains = False
            return reply

    # Choosing

    def choose(self, requests: Sequence[Choose]) -> list[FloatArray]:
        """Log-probabilities (n_choices,) f32 in the way of this server (`way`); NaN where it gave no usable answer.

        Raises EngineError where a request fails, for a choice without text, and for normalise "vocab" unless the way
        is "echo": other ways only tell choices from one another.
        """
        for request in requests:
            if not all(choice.strip() for choice in request.choices):
                raise EngineError(f"choices {list(request.choices)!r}: every choice must be non-empty text")
            if request.normalise not in ("vocab", "choices"):
                raise EngineError(f"normalise={request.normalise!r} is unknown; choose 'vocab' or 'choices'")
            if request.normalise == "vocab" and self.way != "echo":
                raise EngineError(
                    f"engine {self.name!r}: normalise='vocab' needs the log-probability of every token of a choice; "
                    f"this server gives {WAYS[self.way]}; use normalise='choices'"
                )
        scored = self._answers(requests, self._score)
        self._prompt_tokens = {
            request.prompt: tokens for request, (_, tokens) in zip(requests, scored, strict=True) if tokens
        }
        counted = self._prompt_tokens
        self.computed = [counted.get(request.prompt) or self._estimate("".join(request.prompt)) for request in requests]
        return [scores.copy() for scores, _ in scored]

    def _score(self, request: Choose) -> tuple[FloatArray, int | None]:
        """Scores, and the prompt's tokens as the server counted them."""
        if not request.choices:
            return answer_scores(None, 0), None
        prompt = "".join(request.prompt)
        if self.way == "echo":
            scores, tokens = self._score_echoed(prompt, request)
            if scores is not None:
                return scores, tokens
            self._tell("questions answered by parsed answers, since no token begins with the choice")
        if self.way == "listed":
            return self._score_listed(prompt, request)
        return self._score_written(prompt, request)

    def _score_echoed(self, prompt: str, request: Choose) -> tuple[FloatArray | None, int | None]:
        paths = []
        tokens = None
        for choice in request.choices:
            reply = self._ask(prompt + inert(choice), 1, {"echo": True, "logprobs": 1})
            path = choice_path(reply, inert(choice))
            if path is None:
                return None, tokens
            paths.append(path)
            tokens = None if reply.prompt_tokens is None else reply.prompt_tokens - len(path)
        return path_scores(paths, request.normalise == "choices"), tokens

    def _score_listed(self, prompt: str, request: Choose) -> tuple[FloatArray, int | None]:
        tokens: int | None = None

        def behind(text: str) -> Mapping[str, float] | None:
            nonlocal tokens
            reply = self._ask(prompt + text, 1, {"logprobs": self._top})
            tokens = tokens or reply.prompt_tokens
            return reply.tokens[0].listed if reply.tokens else None

        if self.chat:
            reply = self._ask(prompt, _LOOKED_AT, {"logprobs": True, "top_logprobs": self._top})
            tokens = reply.prompt_tokens
            places = chat_places(reply.tokens or ())
            found = ListedChoices(places.get, [spoken(choice) for choice in request.choices]).spread()
        else:
            found = ListedChoices(behind, request.choices).spread()
        if found is None:
            self._tell("questions where no choice was among the tokens listed, which abstain")
            return answer_scores(None, len(request.choices)), tokens
        if found.bounded:
            self._tell("choices not listed, which got the least probability listed, an upper bound", found.bounded)
        return found.scores, tokens

    def _score_written(self, prompt: str, request: Choose) -> tuple[FloatArray, int | None]:
        fields: dict[str, Any] = {} if self.chat else {"stop": ["\n"]}
        if self.chat:
            prompt += answer_instruction(request.choices)
        if self.way == "schema":
            fields["response_format"] = choice_schema(request.choices)
        reply = self._ask(prompt, ANSWER_TOKENS + max(map(estimated_tokens, request.choices)), fields)
        answer = parse_answer(restored(reply.text), request.choices)
        if answer is None:
            self._tell("answers that name no choice, which abstain")
        return answer_scores(answer, len(request.choices)), reply.prompt_tokens

    # Asking

    def _ask(self, prompt: str, limit: int, fields: Mapping[str, Any]) -> ServerReply:
        """One request, greedy. Raises EngineError in words that name the model where that is what is wrong."""
        estimate = self._estimate(prompt) + limit
        body: dict[str, Any] = {"model": self.model, "max_tokens": limit, "temperature": 0, **fields}
        try:
            if self.chat:
                body["messages"] = [{"role": "user", "content": inert(prompt)}]
                reply = self._server.chat(body, read_reply, estimate)
            else:
                body["prompt"] = inert(prompt)
                reply = self._server.complete(body, read_reply, estimate)
        except ServerRefusedError as refusal:
            if refusal.status != 404:
                raise
            path = "/chat/completions" if self.chat else "/completions"
            names = ", ".join(self._models[:20]) or "no models"
            raise ServerRefusedError(
                f"{refusal}; it has no model {self.model!r}, or no {path} (chat: {str(not self.chat).lower()} asks the "
                f"other endpoint); it lists {names}",
                404,
            ) from None
        prompt_tokens = reply.prompt_tokens or self._estimate(prompt)
        with self._lock:
            self.counts.add(prompt_tokens, prompt_tokens - reply.cached_tokens, reply.generated_tokens or 0)
        return reply

    def _tell(self, what: str, count: int = 1) -> None:
        """Count something for the run's report."""
        with self._lock:
            self._told[what] += count

    def _answers(self, requests: Sequence[Any], answer: Callable[[Any], T]) -> list[T]:
        """One answer a request, several requests at a time. All are asked before the first failure is raised."""
        wanted = [request for request in dict.fromkeys(requests) if request not in self._known]
        found = {request: self._known[request] for request in requests if request in self._known}
        errors = self._all(wanted, answer, found) if wanted else {}
        if len(self._known) + len(found) > _KNOWN_REPLIES:
            self._known.clear()
        self._known.update(found)
        for request in requests:
            if request in errors:
                raise errors[request]
        return [found[request] for request in requests]

    def _all(self, wanted: Sequence[Any], answer: Callable[[Any], T], found: dict[Any, T]) -> dict[Any, EngineError]:
        """Fills `found`; returns what failed. A server that is silent at the start is not asked the rest."""
        errors: dict[Any, EngineError] = {}
        at_once = min(self.settings.concurrency, len(wanted))
        pool = ThreadPoolExecutor(at_once, thread_name_prefix="el4ner-server")
        futures: list[tuple[Any, Future[T]]] = []
        try:
            futures = [(request, pool.submit(answer, request)) for request in wanted]
            for position, (request, future) in enumerate(futures):
                try:
                    found[request] = future.result()
                except EngineError as error:
                    errors[request] = error
                    silent = isinstance(error, ServerLostError) and len(errors) == position + 1 >= at_once
                    if silent and not any(f.done() and not f.exception() for _, f in futures[position:]):
                        break
        except BaseException:
            self._server.stop()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        lost = [error for error in errors.values() if isinstance(error, ServerLostError)]
        answered = len(errors) < min(len(wanted), position + 1)
        self._server.silent_calls = 0 if answered else self._server.silent_calls + bool(lost)
        return errors | {request: lost[0] for request in wanted if lost and request not in errors | found}

    # What the server offers

    def _probe(self) -> Way:
        """The first way that works. Raises EngineError where the server answers nothing at all."""
        wanted = self.settings.choices
        ways: tuple[Way, ...] = ("listed", "schema", "answer") if self.chat else ("echo", "listed", "answer")
        if wanted != "auto":
            if wanted not in ways:
                asked = "chats" if self.chat else "plain text"
                raise EngineError(
                    f"server.choices={wanted!r} is no way of scoring choices in {asked}; choose auto or one of "
                    f"{', '.join(ways)}"
                )
            ways = ways[ways.index(wanted) :]
        for way in ways:
            try:
                if {"echo": self._echoes, "listed": self._lists, "schema": self._keeps_schemas, "answer": self._talks}[
                    way
                ]():
                    return way
            except ServerRefusedError as refusal:
                if refusal.status in (401, 403, 404) or way == "answer":
                    raise
        raise EngineError(f"model {self.model!r} at {self._server.url} answers nothing")

    def _echoes(self) -> bool:
        choice = " London"
        reply = self._ask("Paris or" + choice, 1, {"echo": True, "logprobs": 1})
        return reply.text.startswith("Paris or London") and choice_path(reply, choice) is not None

    def _lists(self) -> bool:
        for top in _LISTED_TOKENS.get(self._dialect, (20, 5)):
            fields = {"logprobs": True, "top_logprobs": top} if self.chat else {"logprobs": top}
            try:
                reply = self._ask("Is Paris a city? yes or no?\nAnswer:", 1, fields)
            except ServerRefusedError as refusal:
                if refusal.status in (401, 403, 404):
                    raise
                continue
            if reply.tokens and len(reply.tokens[0].listed) > 1:
                self._top = top
                return True
            return False
        return False

    def _keeps_schemas(self) -> bool:
        """A server that ignores the schema would hardly name a choice that makes no sense as its answer."""
        choices = ("xylophone", "quartz")
        reply = self._ask("Is Paris a city?", ANSWER_TOKENS, {"response_format": choice_schema(choices)})
        return parse_answer(reply.text, choices) is not None and reply.text.lstrip().startswith("{")

    def _talks(self) -> bool:
        self._ask("Is Paris a city? yes or no?\nAnswer:", 1, {})
        return True


def _context_of(row: Mapping[str, Any]) -> int | None:
    """The context length that a server lists for a model: vLLM and SGLang, llama.cpp, others."""
    meta = row.get("meta")
    values = [
        row.get("max_model_len"),
        meta.get("n_ctx") if isinstance(meta, dict) else None,
        row.get("context_length"),
    ]
    return next((value for value in values if isinstance(value, int) and value > 0), None)
