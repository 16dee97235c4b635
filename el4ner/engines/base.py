"""What an engine is: batches of requests in, completions, choice scores or token states out.

A stage decides what is asked and what an answer means; an engine decides how a model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

REPLY_VERSION = 2
"""Part of every cache key whose value depends on replies; raised whenever a prompt would be replied to otherwise."""

Prompt = tuple[str, ...]
"""Segments of one user turn, joined without separator. Requests that share leading segments share their
computation. Segments are tokenised one by one, and special-token strings inside them are inert text."""


_REPEATED = 3
"""Items in a row, all listed before, that show a loop."""


@dataclass(frozen=True, slots=True)
class SubstringList:
    """Decoding is constrained to a list of verbatim substrings of `text`, on word boundaries where the script
    has them: `separator`-joined, ended by a newline; or `empty` (also ended by a newline) for an empty list.
    It also ends where it goes round in circles (`before_a_loop`)."""

    text: str
    separator: str = "; "
    empty: str = "none"
    max_items: int = 32

    def before_a_loop(self, reply: str) -> str | None:
        """What a reply lists up to the third item in a row that it had listed before; None where it does not do that.

        Greedy decoding that has begun to repeat itself goes on up to the token limit: of the items that SmolLM2-135M
        lists for 20 dev sentences each of CrossNER AI and BC5CDR, 79% come behind a repeated one. To end at three in a
        row cost none of the F1 of spans (0.612 and 0.613; 0.480 and 0.481), at two 0.010 on the first, at one 0.018.
        """
        *items, _ = reply.split(self.separator)  # the last one may go on
        listed: set[str] = set()
        in_a_row = 0
        for n, item in enumerate(map(str.strip, items), start=1):
            if not item:
                continue
            in_a_row = in_a_row + 1 if item in listed else 0
            if in_a_row == _REPEATED:
                return self.separator.join(items[:n])
            listed.add(item)
        return None


@dataclass(frozen=True, slots=True)
class Generate:
    """Ask for free text (grammar None) or a list of substrings. A reply is one line: blank lines before it are
    passed over, and generation ends at the next line break, at the end of the turn, or where a list goes round in
    circles."""

    prompt: Prompt
    grammar: SubstringList | None = None
    max_new_tokens: int = 96


@dataclass(frozen=True, slots=True)
class Choose:
    """Ask for the log-probability of each choice as the continuation of the prompt.

    normalise "vocab": sum of a choice's token log-probabilities over the whole vocabulary.
    normalise "choices": at each node of the choices' token trie, normalised over that node's children only (an end
    node where one choice is a prefix of another), so the probabilities of the choices sum to one.
    """

    prompt: Prompt
    choices: tuple[str, ...]
    normalise: Literal["vocab", "choices"] = "vocab"


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote. `truncated`: the token limit ended it. Tokens are counted per request, before sharing."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class TokenStates:
    """Hidden states of one text.

    offsets (T, 2) i64: half-open code-point offsets of each token that covers at least one character.
    states: layer -> (T, D) f32; layer 0 is the embedding output, layer n the output of the n-th block.
    truncated_at: code-point offset up to which the text was read, None if it was read to its end.
    """

    offsets: IntArray
    states: dict[int, FloatArray]
    truncated_at: int | None = None


@runtime_checkable
class Engine(Protocol):
    """A language model that answers batches. Results come in request order and do not depend on the batch.

    Rounding apart: in float32 on a CPU, as long as memory suffices, nothing but other requests with the same leading
    segments may move the last bit of a number (el4ner asks all that it asks behind them at once); in reduced precision
    anything beside may.
    """

    name: str

    @property
    def source(self) -> str:
        """What was loaded (with revision or checksum), for reports and cache keys."""
        ...

    def generate(self, requests: Sequence[Generate]) -> list[Completion]:
        """One completion per request, decoded greedily."""
        ...

    def choose(self, requests: Sequence[Choose]) -> list[FloatArray]:
        """One array (n_choices,) f32 of log-probabilities per request."""
        ...

    def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:
        """Hidden states of plain texts, without template or special tokens."""
        ...

    def read_ends(self, prompts: Sequence[Prompt], layers: Sequence[int]) -> list[FloatArray]:
        """Hidden states (n_layers, D) f32 of the last token of each prompt, layers ascending; no template or special
        tokens. Prompts that share leading segments share their computation."""
        ...

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each rendered prompt, chat template included."""
        ...

    @property
    def max_tokens(self) -> int:
        """Longest prompt plus completion, in tokens."""
        ...

    @property
    def n_layers(self) -> int:
        """Number of blocks; 0 where hidden states cannot be read."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """A sentence encoder."""

    source: str

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        ...

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """texts (N) -> unit vectors (N, D) f32."""
        ...

    def read(self, texts: Sequence[str], layers: Sequence[int]) -> list[TokenStates]:
        """Hidden states of every token of every text, like Engine.read."""
        ...


def without_numbers(name: str) -> str:
    """The source of a model without the device and the precision that `loading.numbers_of` adds."""
    return name.rpartition(" (")[0] or name
