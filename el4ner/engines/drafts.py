"""Drafts: what a reply may go on with, looked up where its last tokens stood before.

A reply that quotes its prompt goes on as the prompt did ("prompt lookup decoding", A. Saxena 2023). A draft is read in
the same pass as the token before it, and kept as far as it is what the model writes anyway; so it changes no reply.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST = 3


class Lookup:
    """The tokens of a prompt and its reply, by the runs of one to three tokens in them."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token; it is what the runs that ended before it go on with, last come."""
        end = len(self._tokens)
        for length in range(1, min(_LONGEST, end) + 1):
            self._after[tuple(self._tokens[end - length :])] = end
        self._tokens.append(token)

    def draft(self, limit: int) -> list[int]:
        """Up to `limit` tokens that followed the last occurrence of the longest run at the end; none if it is new."""
        end = len(self._tokens)
        for length in range(min(_LONGEST, end), 0, -1):
            start = self._after.get(tuple(self._tokens[end - length :]))
            if start is not None:
                return self._tokens[start : start + limit]
        return []
