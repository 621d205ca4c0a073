"""transformers, in a process of its own: the same questions in static batches, with the same alternatives.

Reads questions' names from standard input, one a line with the run's number, and writes seconds, one a line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer

from bench.workload import QUESTIONS, TOP, Question, prompt

__all__ = ["main"]


class _Alternatives(transformers.LogitsProcessor):  # type: ignore[misc]
    """Takes the log probabilities of the best tokens at every step."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores.float().log_softmax(-1).topk(TOP)
        return scores


def main() -> None:
    """Loads the model of the folder given, then answers."""
    folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    questions = {question.name: question for question in QUESTIONS}
    print("ready", flush=True)
    for line in sys.stdin:
        name, _, run = line.strip().rpartition(" ")
        print(_answer(model, tokenizer, questions[name], int(run)), flush=True)


@torch.inference_mode()
def _answer(model: object, tokenizer: Tokenizer, question: Question, run: int) -> float:
    prompts = [prompt(tokenizer, question.prompt_tokens, (question.name, run, i)) for i in range(question.prompts)]
    choices = [prompt(tokenizer, question.choices, (question.name, run, "c", i)) for i in range(question.choices)]
    start = time.perf_counter()
    if question.choices:
        _score(model, [[*prompts[0], *choice] for choice in choices], question.choices)
    elif question.new_tokens:
        _generate(model, prompts, question)
    else:
        for first in range(0, len(prompts), 4):  # all at once would hold gigabytes of logits
            _score(model, prompts[first : first + 4], question.prompt_tokens)
    return time.perf_counter() - start


def _score(model: object, batch: Sequence[Sequence[int]], tail: int) -> None:
    logits = model(torch.tensor(batch), logits_to_keep=tail + 1).logits  # type: ignore[operator]
    for row in logits:
        row.float().log_softmax(-1).topk(TOP)


def _generate(model: object, prompts: Sequence[Sequence[int]], question: Question) -> None:
    several = question.completions > 1
    model.generate(  # type: ignore[attr-defined]
        torch.tensor(prompts),
        max_new_tokens=question.new_tokens,
        min_new_tokens=question.new_tokens,
        do_sample=several,
        temperature=0.8 if several else None,
        num_return_sequences=question.completions,
        logits_processor=transformers.LogitsProcessorList([_Alternatives()]),
        pad_token_id=0,
    )


if __name__ == "__main__":
    main()
