"""The questions and their prompts, the same for every subject: word salad cut to an exact number of token ids."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

from tokenizers import Tokenizer

from bench.exchange import Task

__all__ = ["QUESTIONS", "TOP", "Kind", "Question", "make_task", "prompt", "warm_up"]

TOP = 5
_WARM_UP_TOKENS = 4
_TEMPERATURE = 0.8
"""At which several completions are drawn."""
_WORDS = """
a about across after again air all along always an and another answer around ask back because been
before below best between book both bring built by came car change city clear close cold come could
country cut day door down each early earth end even every eye face family far father feet few field
find fire first follow food for form found four from full gave get give go good great ground group
grow hand hard has have head hear help here high hold home horse hour house idea if in interest into
just keep kind king knew land large last late learn leave left
""".split()  # noqa: SIM905

Kind = Literal["generate", "late", "score", "choose"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, of whom, and by how many clients at once.

    requests: of each client, one after the other.
    new_tokens, completions, top: as in a Task.
    choices: continuations scored after the prompt, of as many tokens each.
    late_tokens: length of a prompt that comes in while the clients' completions decode.
    of: the one of our own programs that is asked; everyone who can is if None.
    warm: what short task of the same shape goes before: one with other prompts, one with the same, which are then in
        the prefix cache, or none.
    """

    key: str
    name: str
    prompt_tokens: int
    clients: int = 1
    requests: int = 1
    new_tokens: int = 0
    completions: int = 1
    choices: int = 0
    top: int = TOP
    late_tokens: int = 0
    of: Literal["ours", "engine", "wide"] | None = None
    warm: Literal["others", "same"] | None = "others"

    @property
    def kind(self) -> Kind:
        """What a subject must be able to do."""
        if self.late_tokens:
            return "late"
        if self.new_tokens:
            return "generate"
        return "choose" if self.choices else "score"

    @property
    def tokens(self) -> int:
        """Tokens that the answer is about."""
        each = self.completions * self.new_tokens or self.choices**2 or self.prompt_tokens
        return self.clients * self.requests * each


def _streams(key: str, name: str, clients: int, requests: int, **others: object) -> Question:
    """A question about completions of 80 tokens' prompts by 64 tokens."""
    question = Question(key=key, name=name, clients=clients, requests=requests, prompt_tokens=80, new_tokens=64)
    return replace(question, **others)  # type: ignore[arg-type]


def _growth(prompt_tokens: int) -> Question:
    """A question about steps of 16 streams that long; the prompts are known, so that all streams start at once."""
    return Question(
        key=f"context{prompt_tokens}",
        name=f"16 streams, {prompt_tokens:,} tokens of context",
        clients=16,
        prompt_tokens=prompt_tokens,
        new_tokens=96,
        of="ours",
        warm="same",
    )


QUESTIONS = (
    *(_streams(f"decode{n}", f"{n} stream{'s' * (n > 1)}", n, r) for n, r in ((1, 4), (4, 3), (16, 2), (32, 1))),
    Question(key="score", name="score 16 x 256 tokens", clients=16, prompt_tokens=256),
    Question(key="score2000", name="score 1 x 2,000 tokens", prompt_tokens=2000),
    Question(key="rank", name="sample and rank, 20 x 48 tokens", prompt_tokens=80, new_tokens=48, completions=20),
    Question(key="choice", name="multiple choice, 512 + 8 x 8 tokens", prompt_tokens=512, choices=8),
    _streams("late", "16 streams, a prompt of 2,000 tokens comes in", 16, 1, new_tokens=320, late_tokens=2000),
    *(_streams(f"top{k}", f"16 streams, {k} alternatives", 16, 1, top=k, of="ours") for k in (0, 1, 5, 20, 100)),
    _streams("service", "32 streams, over gRPC", 32, 1, of="ours"),
    _streams("engine", "32 streams, the engine alone", 32, 1, of="engine"),
    _growth(128),
    _growth(2048),
    Question(key="wide", name="score 1 x 2,000 tokens of 250,880", prompt_tokens=2000, of="wide", warm=None),
)


def prompt(tokenizer: Tokenizer, count: int, seed: object) -> list[int]:
    """`count` token ids, the same for the same seed."""
    draw = random.Random(str(seed))
    text = " ".join(draw.choice(_WORDS) for _ in range(count + 8))
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return token_ids[:count]


def make_task(question: Question, tokenizer: Tokenizer, seed: object) -> Task:
    """The question with prompts of its own: another seed shares none, and no prefix cache helps."""

    def fresh(count: int, *place: object) -> list[int]:
        return prompt(tokenizer, count, (question.key, seed, *place))

    return Task(
        prompts=[
            [fresh(question.prompt_tokens, client, request) for request in range(question.requests)]
            for client in range(question.clients)
        ],
        new_tokens=question.new_tokens,
        completions=question.completions,
        temperature=_TEMPERATURE if question.completions > 1 else 0.0,
        choices=[fresh(question.choices, "choice", index) for index in range(question.choices)],
        top=question.top,
        late=fresh(question.late_tokens, "late"),
    )


def warm_up(question: Question) -> Question:
    """The same shape, over sooner."""
    return replace(question, requests=1, new_tokens=min(question.new_tokens, _WARM_UP_TOKENS), late_tokens=0)
