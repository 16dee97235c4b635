"""Several models on one device: all stay in memory if they fit, else they take turns, whoever rested longest leaving.

Stages ask one model about the whole chunk at a time, so a model that was sent away comes back once a stage.
"""

from __future__ import annotations

from typing import Protocol


class Resident(Protocol):
    """What takes its turn: a model that can leave memory and come back by itself when it is used."""

    n_bytes: int

    def release(self) -> None:
        """Leave memory."""


class Residency:
    """Keeps loaded models within `limit_bytes` (None: no limit).

    beside: what each of them takes beside its weights, for the prefixes it keeps. arrivals: how often a model came or
    came back; departures: how often one was sent away.
    """

    def __init__(self, limit_bytes: int | None = None, beside: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self.beside = beside
        self.arrivals = 0
        self.departures = 0
        self._held: list[Resident] = []

    @property
    def n_bytes(self) -> int:
        """What the models in memory take."""
        return sum(model.n_bytes + self.beside for model in self._held)

    def admit(self, newcomer: Resident) -> None:
        """Make room for a model that is about to load, sending away what was used longest ago.

        A model larger than the limit is let in alone: there is nothing left to send away for it.
        """
        if self.limit_bytes is not None:
            while self._held and self.n_bytes + newcomer.n_bytes + self.beside > self.limit_bytes:
                self._held.pop(0).release()
                self.departures += 1
        self._held.append(newcomer)
        self.arrivals += 1

    def use(self, model: Resident) -> None:
        """A model is used: it is the last to leave."""
        if self._held and self._held[-1] is not model and model in self._held:
            self._held.remove(model)
            self._held.append(model)
