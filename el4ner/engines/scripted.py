"""An engine with fixed replies, for tests and dry runs: no model, same protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from el4ner.engines.base import Choose, Completion, FloatArray, Generate, Prompt, TokenStates
from el4ner.engines.batches import check_layers
from el4ner.errors import EngineError

GenerateScript = Callable[[Generate], str | Completion] | Mapping[str, str]
ChooseScript = Callable[[Choose], Sequence[float]] | Mapping[str, Mapping[str, float] | Sequence[float]]
ReadScript = Callable[[str, Sequence[int]], TokenStates]


class ScriptedEngine:
    """Replies as scripted (implements `engines.base.Engine`) and remembers what it was asked in `requests`.

    generate: a function of the request, or a mapping from the whole prompt to the reply.
    choose: a function of the request that returns one number per choice, or a mapping from the whole prompt to such
    numbers or to choice -> number. Numbers are log-probabilities and are returned as they are.
    read: a function of a text and the layers.
    Raises EngineError for whatever the script does not cover. Tokens are counted as words.
    """

    def __init__(
        self,
        name: str = "scripted",
        *,
        generate: GenerateScript | None = None,
        choose: ChooseScript | None = None,
        read: ReadScript | None = None,
        max_tokens: int = 4096,
        n_layers: int = 0,
    ) -> None:
        self.name = name
        self.source = f"scripted:{name}"
        self.requests: list[Generate | Choose | tuple[str, tuple[int, ...]]] = []
        self._generate = generate
        self._choose = choose
        self._read = read
        self._max_tokens = max_tokens
        self._n_layers = n_layers

    @property
    def max_tokens(self) -> int:
        """Longest prompt plus completion, in words."""
        return self._max_tokens

    @property
    def n_layers(self) -> int:
        """Number of layers that `read` knows."""
        return self._n_layers

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        """Words of each prompt."""
        return [len("".join(prompt).split()) for prompt in prompts]

    def generate(self, requests: Sequence[Generate]) -> list[Completion]:
        """The scripted completions."""
        return [self._complete(request) for request in requests]

    def _complete(self, request: Generate) -> Completion:
        self.requests.append(request)
        prompt = "".join(request.prompt)
        if callable(self._generate):
            reply = self._generate(request)
        elif self._generate is not None and prompt in self._generate:
            reply = self._generate[prompt]
        else:
            raise self._unscripted("generate", prompt)
        if isinstance(reply, Completion):
            return reply
        return Completion(reply, len(prompt.split()), len(reply.split()))

    def choose(self, requests: Sequence[Choose]) -> list[FloatArray]:
        """The scripted numbers (n_choices,) f32."""
        return [self._score(request) for request in requests]

    def _score(self, request: Choose) -> FloatArray:
        self.requests.append(request)
        prompt = "".join(request.prompt)
        if callable(self._choose):
            scores: Mapping[str, float] | Sequence[float] = self._choose(request)
        elif self._choose is not None and prompt in self._choose:
            scores = self._choose[prompt]
        else:
            raise self._unscripted("choose", prompt)
        if isinstance(scores, Mapping):
            missing = [choice for choice in request.choices if choice not in scores]
            if missing:
                raise EngineError(f"engine {self.name!r}: the script has no number for choice {missing[0]!r}")
            scores = [scores[choice] for choice in request.choices]
        if len(scores) != len(request.choices):
            raise EngineError(
                f"engine {self.name!r}: the script gives {len(scores)} numbers for {len(request.choices)} choices"
            )
        return np.asarray(scores, dtype=np.float32)

    def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:
        """The scripted states."""
        wanted = check_layers(layers, self._n_layers)
        states = []
        for text in texts:
            self.requests.append((text, tuple(wanted)))
            if self._read is None:
                raise self._unscripted("read", text)
            states.append(self._read(text, wanted))
        return states

    def read_ends(self, prompts: Sequence[Prompt], layers: Sequence[int]) -> list[FloatArray]:
        """The last of the scripted states of each prompt, read as one text."""
        found = self.read(["".join(prompt) for prompt in prompts], layers)
        return [np.stack([own.states[layer][-1] for layer in sorted(own.states)]) for own in found]

    def _unscripted(self, what: str, prompt: str) -> EngineError:
        shown = prompt if len(prompt) <= 80 else f"...{prompt[-77:]}"
        return EngineError(f"engine {self.name!r}: no scripted reply to {what} for the prompt {shown!r}")
