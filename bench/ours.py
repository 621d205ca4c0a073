"""The service, over its port: answers each question with concurrent calls of the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from logprobs import AsyncClient
from tokenizers import Tokenizer

from bench.workload import TOP, Question, prompt

__all__ = ["answer"]


def answer(target: str, tokenizer: Tokenizer, question: Question, run: int) -> float:
    """Seconds from the first request to the last answer."""
    return asyncio.run(_answer(target, tokenizer, question, run))


async def _answer(target: str, tokenizer: Tokenizer, question: Question, run: int) -> float:
    prompts = [prompt(tokenizer, question.prompt_tokens, (question.name, run, i)) for i in range(question.prompts)]
    choices = [prompt(tokenizer, question.choices, (question.name, run, "c", i)) for i in range(question.choices)]
    async with AsyncClient(target) as client:
        await client.model()
        start = time.perf_counter()
        await asyncio.gather(*(_call(client, question, token_ids, choices) for token_ids in prompts))
        return time.perf_counter() - start


async def _call(
    client: AsyncClient, question: Question, token_ids: Sequence[int], choices: Sequence[Sequence[int]]
) -> None:
    if not question.new_tokens:
        await client.score(token_ids, choices, top=TOP)
        return
    several = question.completions > 1
    stream = client.generate(
        token_ids,
        completion_count=question.completions,
        max_tokens=question.new_tokens,
        temperature=0.8 if several else 0.0,
        seed=1,
        top=TOP,
        ignore_eos=True,
    )
    generation = await stream.collect()
    assert sum(len(c.tokens) for c in generation.completions) == question.completions * question.new_tokens
