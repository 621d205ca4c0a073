"""A long text has the tokens that it would have if it were short, and holds nobody up while it is tokenised."""

from __future__ import annotations

import sys
import threading

import pytest
import tiny_tokenizers
from logprobs_server.text import vocabulary
from logprobs_server.text.vocabulary import Vocabulary

LONG = "<s>The horse, né 7 日本語 \n" * 1000


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
def test_a_long_text_has_the_tokens_that_the_tokenizer_gives_it(kind: str, special: bool) -> None:
    tokenizer = tiny_tokenizers.KINDS[kind]()
    found = Vocabulary(tokenizer, size=tokenizer.get_vocab_size()).encode(LONG, special)
    assert list(found.token_ids) == tokenizer.encode(LONG, add_special_tokens=special).ids


def test_other_threads_run_while_a_long_text_is_tokenised() -> None:
    tokenizer = tiny_tokenizers.KINDS["byte-level"]()
    begun, ran, before = threading.Event(), threading.Event(), sys.getswitchinterval()

    def other() -> None:
        begun.wait()
        ran.set()

    thread = threading.Thread(target=other)
    thread.start()
    sys.setswitchinterval(60)  # no thread stops for another unless it says so itself
    try:
        begun.set()
        vocabulary._encoded(tokenizer, LONG * 40, False)
        meanwhile = ran.is_set()
    finally:
        sys.setswitchinterval(before)
        thread.join()
    assert meanwhile
