"""Prompts to token ids: the tokenizer's own chat template around inert segments.

The template is rendered once, in transformers' sandbox, with a placeholder as the user's message. What stands before it
becomes the head and what follows the tail of every prompt, so no document ever passes through a template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from el4ner.engines.base import Prompt
from el4ner.engines.tokens import TextTokens
from el4ner.errors import EngineError

_PLACEHOLDER = "QxUserTurnGoesHereZx"

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A rendered prompt: parts that other prompts may share, in order, and what comes after them.

    shared: ids of the leading segments, the template's head joined to the first. rest: ids of the last segment and the
    template's tail; never empty.
    """

    shared: tuple[TokenIds, ...]
    rest: TokenIds

    @property
    def length(self) -> int:
        """Tokens of the whole prompt."""
        return sum(len(part) for part in self.shared) + len(self.rest)

    @property
    def ids(self) -> TokenIds:
        """All ids of the prompt."""
        return tuple(i for part in self.shared for i in part) + self.rest


class PromptRenderer:
    """Renders prompts for one tokenizer. `templated`: it has a chat template, and chat says to use it."""

    def __init__(self, tokenizer: Any, name: str, chat: bool = True) -> None:
        self._text = TextTokens(tokenizer)
        self.templated = chat and bool(tokenizer.chat_template)
        if self.templated:
            self.head, self.tail = _split_template(tokenizer, name)
        else:
            self.head, self.tail = _plain_head(tokenizer), ()
        self._memo: dict[str, TokenIds] = {}

    def segment(self, text: str) -> TokenIds:
        """Ids of one segment, or of one choice."""
        found = self._memo.get(text)
        if found is None:
            if len(self._memo) > 20_000:  # demonstrations repeat, sentences do not
                self._memo.clear()
            found = self._memo[text] = self._text.segment(text)
        return found

    def render(self, prompt: Prompt) -> PromptTokens:
        """The tokens of a prompt. Raises EngineError for a prompt without any token."""
        segments = [self.segment(text) for text in prompt]
        parts: list[TokenIds] = []
        if len(segments) > 1:
            parts = [self.head + segments[0], *segments[1:-1], segments[-1] + self.tail]
        else:
            parts = [self.head, (segments[0] if segments else ()) + self.tail]
        parts = [part for part in parts if part]
        if not parts:
            raise EngineError("a prompt without any text cannot be asked; give it at least one non-empty segment")
        return PromptTokens(tuple(parts[:-1]), parts[-1])


def _split_template(tokenizer: Any, name: str) -> tuple[TokenIds, TokenIds]:
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACEHOLDER}],
            tokenize=False,
            add_generation_prompt=True,
            # switches that some templates know: no reasoning before the answer, and no date of today in the prompt
            enable_thinking=False,
            date_string="26 Jul 2024",
        )
    except Exception as error:  # a template is code of the model's; it may raise anything jinja can
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EngineError(f"model {name!r}: its chat template cannot render one user message ({reason})") from error
    if text.count(_PLACEHOLDER) != 1:
        raise EngineError(
            f"model {name!r}: its chat template writes the user message {text.count(_PLACEHOLDER)} times, not once"
        )
    before, _, after = text.partition(_PLACEHOLDER)
    return _template_ids(tokenizer, before), _template_ids(tokenizer, after)


def _template_ids(tokenizer: Any, text: str) -> TokenIds:
    if not text:
        return ()
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])


def _plain_head(tokenizer: Any) -> TokenIds:
    """What the tokenizer puts before a plain text, such as a beginning-of-text token."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(framed) - len(inner) + 1):
        if framed[start : start + len(inner)] == inner:
            return tuple(framed[:start])
    return ()
