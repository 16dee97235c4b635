"""One line of text that cannot end its own line: how documents stand inside prompts.

A line ends at a line break, so a text whose line breaks are written as "\\n" can neither begin another "Text:" line
nor add a label. Reversible: `unescape_line(escape_line(x)) == x`.
"""

from __future__ import annotations

import re
import unicodedata

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
_LONG = {"n": "\n", "r": "\r", "t": "\t"}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
# Control characters, every line break of str.splitlines, and lone surrogates, which no tokenizer can encode.
_UNSAFE = frozenset({"Cc", "Zl", "Zp", "Cs"})


def escape_line(text: str, also: str = "") -> str:
    """`text` on one line: line breaks, controls and backslashes escaped, and a backslash before each character of
    `also` (which must not contain "n", "r", "t" or "u")."""
    if text.isprintable() and "\\" not in text and not any(character in text for character in also):
        return text
    return "".join(_escape(character, also) for character in text)


def _escape(character: str, also: str) -> str:
    if character in _SHORT:
        return _SHORT[character]
    if character in also:
        return "\\" + character
    if unicodedata.category(character) in _UNSAFE:
        return escape_code(character)
    return character


def escape_code(character: str) -> str:
    """A character of the basic plane as a backslash, "u" and four hexadecimal digits."""
    return f"\\u{ord(character):04x}"


def unescape_line(text: str) -> str:
    """The text that `escape_line` was given. A backslash at the very end stays as it is."""
    return _ESCAPE.sub(_unescape, text)


def _unescape(match: re.Match[str]) -> str:
    code, character = match.groups()
    return chr(int(code, 16)) if code else _LONG.get(character, character)


def split_unescaped(text: str, separator: str) -> list[str]:
    """`text` cut at each `separator` whose first character has no escaping backslash before it; not unescaped."""
    pieces: list[str] = []
    begin = at = 0
    while at < len(text):
        if text[at] == "\\":
            at += 2
        elif text.startswith(separator, at):
            pieces.append(text[begin:at])
            at = begin = at + len(separator)
        else:
            at += 1
    pieces.append(text[begin:])
    return pieces
