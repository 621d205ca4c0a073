"""The questions and their prompts, the same for everyone: word salad cut to an exact number of token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

__all__ = ["QUESTIONS", "TOP", "Question", "prompt"]

TOP = 5
_WORDS = """
a about across after again air all along always an and another answer around ask back because been
before below best between book both bring built by came car change city clear close cold come could
country cut day door down each early earth end even every eye face family far father feet few field
find fire first follow food for form found four from full gave get give go good great ground group
grow hand hard has have head hear help here high hold home horse hour house idea if in interest into
just keep kind king knew land large last late learn leave left
""".split()  # noqa: SIM905


@dataclass(frozen=True, slots=True)
class Question:
    """How many prompts of how many tokens at once, and what is asked of each.

    new_tokens: generated per prompt, greedily; 0 scores the prompt instead.
    completions: drawn per prompt, at temperature 0.8 if there are several.
    choices: continuations scored after the prompt, of as many tokens each.
    """

    name: str
    prompts: int
    prompt_tokens: int
    new_tokens: int = 0
    completions: int = 1
    choices: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that the answer is about."""
        if self.choices:
            return self.prompts * self.choices * self.choices
        return self.prompts * (self.completions * self.new_tokens or self.prompt_tokens)


QUESTIONS = (
    Question("decode, 1 stream", 1, 80, 64),
    Question("decode, 4 streams", 4, 80, 64),
    Question("decode, 16 streams", 16, 80, 64),
    Question("decode, 32 streams", 32, 80, 64),
    Question("score, 16 x 256 tokens", 16, 256),
    Question("score, 1 x 2,000 tokens", 1, 2000),
    Question("sample and rank, 20 x 48 tokens", 1, 80, 48, completions=20),
    Question("multiple choice, 512 + 8 x 8 tokens", 1, 512, choices=8),
)


def prompt(tokenizer: Tokenizer, count: int, seed: object) -> Sequence[int]:
    """`count` token ids, the same for the same seed."""
    draw = random.Random(str(seed))
    text = " ".join(draw.choice(_WORDS) for _ in range(count + 8))
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return token_ids[:count]
