"""transformers: its own `generate`, in static batches, in this process; the best tokens taken at every step."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import transformers

from bench.exchange import Answer, Stream, Task
from bench.subjects.subject import SAMPLING_TEMPERATURE, serve

__all__ = ["Batches", "opened"]

_SCORED_AT_ONCE = 4
"""Prompts; all at once would hold gigabytes of logits."""


class _Steps(transformers.LogitsProcessor):  # type: ignore[misc]
    """Takes the log probabilities of the best tokens at every step, and notes when."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores.float().log_softmax(-1).topk(self.top)
        self.times.append(time.perf_counter())
        return scores


class Batches:
    """The clients' first prompts are one batch, their second ones the next."""

    ready_s: float | None = None

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self._model = model

    @torch.inference_mode()
    async def answer(self, task: Task) -> Answer:
        """Does the task, batch after batch."""
        start = time.perf_counter()
        streams: list[Stream] = []
        for batch in map(list, zip(*task.prompts, strict=True)):
            if task.new_tokens:
                streams += self._generate(batch, task)
            elif task.choices:
                self._score([batch[0] + choice for choice in task.choices], len(task.choices[0]), task.top)
            else:
                for first in range(0, len(batch), _SCORED_AT_ONCE):
                    self._score(batch[first : first + _SCORED_AT_ONCE], len(batch[0]) - 1, task.top)
        return Answer(seconds=time.perf_counter() - start, streams=streams)

    def _score(self, batch: Sequence[Sequence[int]], scored: int, top: int) -> None:
        """The last tokens of every row."""
        token_ids = torch.tensor(batch)
        logits = self._model(token_ids, use_cache=False, logits_to_keep=scored + 1).logits
        for row, ids in zip(logits, token_ids, strict=True):
            logprobs = row[:-1].float().log_softmax(-1)
            logprobs.gather(-1, ids[-scored:, None])
            logprobs.topk(top)

    def _generate(self, batch: Sequence[Sequence[int]], task: Task) -> list[Stream]:
        start, steps, several = time.perf_counter(), _Steps(task.top), task.completions > 1
        token_ids = torch.tensor(batch)
        output = self._model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=task.new_tokens,
            min_new_tokens=task.new_tokens,
            do_sample=several,
            temperature=SAMPLING_TEMPERATURE if several else None,
            top_k=0 if several else None,
            num_return_sequences=task.completions,
            logits_processor=transformers.LogitsProcessorList([steps]),
            pad_token_id=0,
        )
        assert output.shape == (len(batch) * task.completions, len(batch[0]) + task.new_tokens)
        counts = [task.completions] * len(steps.times)
        return [Stream(start=start, times=steps.times, counts=counts) for _ in batch]


@contextmanager
def opened(folder: str, dtype: str) -> Iterator[Batches]:
    """The model of the folder."""
    transformers.logging.disable_progress_bar()
    yield Batches(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval())


if __name__ == "__main__":
    serve(opened(*sys.argv[1:]))
