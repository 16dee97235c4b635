"""How much runs at once on each kind of device: what the engine does and the memory plan predicts."""

from __future__ import annotations

READ_TOKENS = {"cpu": 192, "cuda": 32768}
"""Padded tokens per forward pass of `read`."""
FORWARD_TOKENS = {"cpu": 512, "cuda": 8192}
"""Padded new tokens per packed forward pass, nodes of a trie of questions, and what `decode_replies` goes by. In
float32 on a CPU each prefix is a pass of its own whatever its length, and each trie. Per token a pass of 64 tokens
behind 300 takes 16% longer than one of 512, of 96 7%, of 128 3%; in bfloat16 32%, 19% and 17% (embedded model, one core
of an EPYC Zen 4, torch 2.13, 2026-11)."""
PREFIX_CACHE_BYTES = {"cpu": 512 << 20, "cuda": 8 << 30}
"""Keys and values of prefixes that are kept. On a CPU it keeps the embedded model's runs to about 2 GiB."""

STEP_TOKENS = {"cpu": 64, "cuda": 256}
"""Tokens in a step of writing that few replies fill up with drafts. With the embedded model in bfloat16 a step of 16
tokens takes a core as long as a step of one, which is the time to read the weights, and one of 63 half as long again
(Xeon with AMX, 2026-11)."""

_DECODE_REPLIES = {"cpu": 96, "cuda": 256}


def single_rows(device: str, dtype: str) -> bool:
    """Whether prefixes and questions are passes of their own on a kind of device in a precision ("cpu", "float32")."""
    return (device, dtype) == ("cpu", "float32")


def decode_replies(device: str, forward_tokens: int) -> int:
    """Replies that are written at once: fewer where passes are smaller than usual."""
    usual = FORWARD_TOKENS.get(device, 512)
    return max(1, _DECODE_REPLIES.get(device, 16) * min(forward_tokens, usual) // usual)
