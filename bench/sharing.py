"""Engines and encoders that several systems use, with or without memory of what was asked before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from el4ner.engines.base import Choose, Completion, FloatArray, Generate, Prompt, TokenStates
from el4ner.preparation import Preparation

_Reading: TypeAlias = "tuple[str, Any, tuple[int, ...]]"
"""What was read of a model: texts or ends of prompts, one of them, and the layers."""

STATES_BYTES = 1 << 30
"""Hidden states that are kept, the newest: those of a large pool, whose features are cached on disk, make room."""


class Remembering:
    """An engine or encoder that answers again from memory, so that systems share readings and replies.

    Answers do not depend on the batch, so what a system gets is what it would have got alone; its time is not, and is
    not reported. answered: how many answers came from memory.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._states: dict[_Reading, TokenStates | FloatArray] = {}
        self._replies: dict[Generate | Choose, Any] = {}
        self._bytes = 0
        self.answered = 0

    def generate(self, requests: Sequence[Generate]) -> list[Completion]:
        """As `Engine.generate`; what was asked before is not asked again."""
        return self._asked(requests, self._inner.generate)

    def choose(self, requests: Sequence[Choose]) -> list[FloatArray]:
        """As `Engine.choose`; what was asked before is not asked again."""
        return self._asked(requests, self._inner.choose)

    def read_ends(self, prompts: Sequence[Prompt], layers: Sequence[int]) -> list[FloatArray]:
        """As `Engine.read_ends`; what was read before is not read again, as long as there is room for it."""
        return self._read("ends", prompts, layers, self._inner.read_ends)

    def _asked(self, requests: Sequence[Any], ask: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        distinct = dict.fromkeys(requests)
        missing = [request for request in distinct if request not in self._replies]
        self.answered += len(distinct) - len(missing)
        if missing:
            self._replies.update(zip(missing, ask(missing), strict=True))
        return [self._replies[request] for request in requests]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:
        """As `Engine.read`; what was read before is not read again, as long as there is room for it."""
        return self._read("texts", texts, layers, self._inner.read)

    def _read(
        self, kind: str, asked: Sequence[Any], layers: Sequence[int], read: Callable[..., list[Any]]
    ) -> list[Any]:
        keys = [(kind, one, tuple(layers)) for one in asked]
        found: dict[_Reading, Any] = {key: self._states[key] for key in keys if key in self._states}
        self.answered += len(found)
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        for key, states in zip(missing, read([one for _, one, _ in missing], layers), strict=True):
            found[key] = self._states[key] = states
            self._bytes += _size(states)
        while self._bytes > STATES_BYTES:
            self._bytes -= _size(self._states.pop(next(iter(self._states))))
        return [found[key] for key in keys]


def _size(states: TokenStates | FloatArray) -> int:
    arrays = states.states.values() if isinstance(states, TokenStates) else [states]
    return sum(array.nbytes for array in arrays)


def shared_engines(loader: Preparation, *, remember: bool = True) -> dict[str, Any]:
    """An engine for every model that all its members ask in the same way, by model; it remembers if asked to."""
    members = loader.config.members
    first = {m.model: m for m in reversed(members) if all(m.chat == o.chat for o in members if o.model == m.model)}
    engines = {model: loader.engine(m.source, m.chat, adapter=m.adapter) for model, m in first.items()}
    return {model: Remembering(engine) if remember else engine for model, engine in engines.items()}


def answered(engines: Mapping[str, Any], encoder: Any) -> int:
    """How many answers of engines and encoder came from memory; 0 for those that do not remember."""
    return sum(int(one.answered) for one in (*engines.values(), encoder) if isinstance(one, Remembering))
