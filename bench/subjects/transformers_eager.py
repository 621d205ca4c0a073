"""transformers: its own `generate`, in static batches, in this process; the best tokens taken at every step.

Log probabilities are those that a user takes of its logits: log-softmax of them in float32.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
import transformers

from bench.exchange import Answer, Stream, Task, Told
from bench.subjects.subject import serve

__all__ = ["FLOAT32_LOGITS", "Batches", "opened"]

FLOAT32_LOGITS = "float32-logits"
"""Argument that has the head compute in float32, whatever the layers do."""

_SCORED_AT_ONCE = 4
"""Prompts; all at once would hold gigabytes of logits."""


class _Steps(transformers.LogitsProcessor):  # type: ignore[misc]
    """Takes the log probabilities of the best tokens at every step, and notes when; and those of what was drawn."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.times: list[float] = []
        self.logprobs: list[list[float]] = []
        self._last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.drawn(input_ids[:, -1:])
        self._last = scores.float().log_softmax(-1)
        self._last.topk(self.top)
        self.times.append(time.perf_counter())
        return scores

    def drawn(self, token_ids: torch.Tensor) -> None:
        """Notes the log probabilities of the tokens [rows, 1] drawn at the last step, if there was one."""
        if self._last is not None:
            self.logprobs.append(self._last.gather(-1, token_ids).squeeze(-1).tolist())


class _Float32Head(torch.nn.Module):
    """A head that multiplies in float32, by weights of whatever type."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self._weight = weight.float()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.float(), self._weight)


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
        told: list[Told] = []
        for batch in map(list, zip(*task.prompts, strict=True)):
            if task.new_tokens:
                self._generate(batch, task, streams, told)
            elif task.choices:
                chosen = self._score([batch[0] + choice for choice in task.choices], len(task.choices[0]), task.top)
                told.append(list(chain.from_iterable(chosen)))
            else:
                for first in range(0, len(batch), _SCORED_AT_ONCE):
                    told += self._score(batch[first : first + _SCORED_AT_ONCE], len(batch[0]) - 1, task.top)
        by_client = chain.from_iterable(told[client :: len(task.prompts)] for client in range(len(task.prompts)))
        return Answer(seconds=time.perf_counter() - start, streams=streams, told=list(by_client))

    def _score(self, batch: Sequence[Sequence[int]], scored: int, top: int) -> list[Told]:
        """The last tokens of every row."""
        told: list[Told] = []
        token_ids = torch.tensor(batch)
        logits = self._model(token_ids, use_cache=False, logits_to_keep=scored + 1).logits
        for row, ids in zip(logits, token_ids, strict=True):
            logprobs = row[:-1].float().log_softmax(-1)
            own = logprobs.gather(-1, ids[-scored:, None]).squeeze(-1)
            logprobs.topk(top)
            told.append(list(zip(ids[-scored:].tolist(), own.tolist(), strict=True)))
        return told

    def _generate(self, batch: Sequence[Sequence[int]], task: Task, streams: list[Stream], told: list[Told]) -> None:
        """Completions of the batch's prompts: adds when, and what, each was told."""
        start, steps, sampled = time.perf_counter(), _Steps(task.top), task.temperature > 0
        token_ids = torch.tensor(batch)
        output = self._model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=task.new_tokens,
            do_sample=sampled,
            temperature=task.temperature if sampled else None,
            top_k=0 if sampled else None,
            num_return_sequences=task.completions,
            logits_processor=transformers.LogitsProcessorList([steps]),
            pad_token_id=0,
        )
        assert output.shape == (len(batch) * task.completions, len(batch[0]) + task.new_tokens)
        steps.drawn(output[:, -1:])
        counts = [task.completions] * len(steps.times)
        streams += [Stream(start=start, times=steps.times, counts=counts) for _ in batch]
        new = output[:, len(batch[0]) :].reshape(len(batch), -1).tolist()
        logprobs = torch.tensor(steps.logprobs).T.reshape(len(batch), -1).tolist()
        told += [list(zip(*both, strict=True)) for both in zip(new, logprobs, strict=True)]


@contextmanager
def opened(folder: str, dtype: str, *variants: str) -> Iterator[Batches]:
    """The model of the folder, which goes on after its end of text."""
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    if FLOAT32_LOGITS in variants:
        model.set_output_embeddings(_Float32Head(model.get_output_embeddings().weight))
    yield Batches(model)


if __name__ == "__main__":
    serve(opened(*sys.argv[1:]))
