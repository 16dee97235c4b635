"""How many tokens were asked, computed and written."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class TokenCounts:
    """What one engine was asked and did.

    prompt: tokens of all prompts as if each were run alone. computed: those that were run; the rest was shared.
    run, padded: tokens that went through forward passes before the first token of a reply, inner tokens of choices
    included, without and with padding. generated: tokens of replies.
    """

    prompt: int = 0
    computed: int = 0
    generated: int = 0
    run: int = 0
    padded: int = 0

    @property
    def shared(self) -> int:
        """Prompt tokens that did not have to be computed."""
        return self.prompt - self.computed

    def add(self, prompt: int, computed: int, generated: int = 0) -> None:
        """Requests that were answered."""
        self.prompt += prompt
        self.computed += computed
        self.generated += generated

    def ran(self, run: int, padded: int) -> None:
        """Forward passes that were made."""
        self.run += run
        self.padded += padded

    def to_dict(self) -> dict[str, int]:
        """Plain types, for JSON."""
        return asdict(self) | {"shared": self.shared}
