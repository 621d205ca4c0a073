"""Makes text fit to be shown: nothing invisible in a table, nothing that steers a terminal anywhere. No colours."""

from __future__ import annotations

import unicodedata

from logprobs.v1 import logprobs_pb2 as pb

__all__ = ["one_line", "readable", "spelled", "visible"]

_SIGNS = {" ": "·", "\n": "↵"}


def visible(data: bytes) -> str:
    """Every byte to be seen: spaces as ·, line feeds as ↵, the rest of what is not printable escaped."""
    text = data.decode("utf-8", "backslashreplace")
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else _escaped(c)) for c in text)


def spelled(token: pb.Token | pb.Alternative) -> str:
    """A token or an alternative as shown in a table; special ones by their name."""
    return visible(token.bytes or token.special_name.encode())


def readable(text: str) -> str:
    """Text as it is, but for control characters other than line feed and tab, which are escaped."""
    return "".join(_escaped(c) if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def one_line(text: str) -> str:
    """The same in one line, line feeds as ↵ and tabs escaped."""
    return readable(text).replace("\n", "↵").replace("\t", "\\t")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
