"""Conversations as one text, by the model's own template, in which what people wrote stays plain text.

A template cannot be told to leave special tokens alone that a message spells, so they are rendered as stand-ins:
characters of the planes for private use, put back afterwards. Knows nothing of tokens or of how templates work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum

__all__ = ["ConversationEnd", "Message", "Render", "RenderedText", "TemplateRefusedError", "rendered"]

_FIRST_STAND_IN = 0xF0000
_STAND_INS = "[\U000f0000-\U0010ffff]"

Message = tuple[str, str]
"""Role and content."""


class ConversationEnd(Enum):
    """Where the rendered text of a conversation ends; the values are the contract's numbers."""

    ASSISTANT_HEADER = 1
    CLOSED = 2
    CONTINUE_LAST = 3


class TemplateRefusedError(ValueError):
    """The template does not take this conversation; the message says why."""


Render = Callable[[Sequence[Message], ConversationEnd], str]
"""The model's template. Raises TemplateRefusedError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedText:
    """A text, and the ranges of it, in characters, where it spells special tokens that are plain text."""

    text: str
    plain: tuple[tuple[int, int], ...]


def rendered(
    render: Render, messages: Sequence[Message], end: ConversationEnd, special_names: Collection[str]
) -> RenderedText:
    """Renders a conversation.

    Args:
        special_names: how special tokens are spelled.
    Raises:
        TemplateRefusedError: the template does not take it.
    """
    names = "|".join(re.escape(name) for name in sorted(special_names, key=len, reverse=True))
    if not names or not any(re.search(names, part) for message in messages for part in message):
        return RenderedText(text=render(messages, end), plain=())
    stand_ins: dict[str, str] = {}

    def hide(match: re.Match[str]) -> str:
        return stand_ins.setdefault(match[0], chr(_FIRST_STAND_IN + len(stand_ins)))

    hidden = [tuple(re.sub(f"{names}|{_STAND_INS}", hide, part) for part in message) for message in messages]
    spellings = {stand_in: spelling for spelling, stand_in in stand_ins.items()}
    try:
        return _restored(render([(role, content) for role, content in hidden], end), spellings)
    except TemplateRefusedError as error:
        raise TemplateRefusedError(_restored(str(error), spellings).text) from error


def _restored(text: str, spellings: dict[str, str]) -> RenderedText:
    """Puts back what stand-ins stand for."""
    whole, plain, length, at = [], [], 0, 0
    for match in re.finditer(_STAND_INS, text):
        spelling = spellings.get(match[0], match[0])
        start = length + match.start() - at
        length = start + len(spelling)
        whole += [text[at : match.start()], spelling]
        at = match.end()
        if len(spelling) > 1:
            plain.append((start, length))
    return RenderedText(text="".join([*whole, text[at:]]), plain=tuple(plain))
