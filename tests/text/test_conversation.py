"""What people write in a conversation comes out as they wrote it, with every special token in it marked as plain."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from logprobs_server.text.conversation import ConversationEnd, Message, TemplateRefusedError, rendered

NAMES = ("<a>", "<ab>", "</a>", "\U000f0001<a>")
PARTS = st.text("<ab>/ \U000f0000\U000f0001\U0010fffd", max_size=12) | st.lists(st.sampled_from(NAMES)).map("".join)
MESSAGES = st.lists(st.tuples(PARTS, PARTS), min_size=1, max_size=4)


def template(messages: Sequence[Message], end: ConversationEnd) -> str:
    """Special tokens of its own around what was said."""
    return "".join(f"<a>{role}</a>{content}<ab>" for role, content in messages)


@given(MESSAGES)
@example([("<a>", "<ab></a>")])
@example([("user", "\U000f0000<a>\U000f0000")])
def test_a_conversation_is_rendered_as_it_is_and_its_special_tokens_are_marked(messages: list[Message]) -> None:
    text = rendered(template, messages, ConversationEnd.CLOSED, NAMES)
    assert text.text == template(messages, ConversationEnd.CLOSED)
    marked = [text.text[start:stop] for start, stop in text.plain]
    assert set(marked) <= set(NAMES)
    assert list(text.plain) == sorted(text.plain)
    hidden = "".join("\0" * (stop - start) for start, stop in text.plain)
    rest = list(text.text)
    for start, stop in text.plain:
        rest[start:stop] = "\0" * (stop - start)
    left = "".join(rest)
    assert left.count("\0") == len(hidden)
    # What is still spelled is the template's own: so many of each as it writes, and of the longest none.
    assert left.count("<ab>") + left.count("</a>") + left.count("<a>") == 3 * len(messages)


def test_without_special_tokens_nothing_is_marked() -> None:
    assert rendered(template, [("user", "<a>")], ConversationEnd.CLOSED, ()).plain == ()


def test_a_refusal_tells_what_was_written() -> None:
    def refuses(messages: Sequence[Message], end: ConversationEnd) -> str:
        raise TemplateRefusedError(f"no {messages[0][1]}")

    with pytest.raises(TemplateRefusedError, match=r"^no x<ab>y$"):
        rendered(refuses, [("user", "x<ab>y")], ConversationEnd.CLOSED, NAMES)
