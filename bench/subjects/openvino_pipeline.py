"""OpenVINO GenAI, continuous batching in this process. It tells tokens' own log probabilities, no alternatives."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import openvino
import openvino_genai

from bench.exchange import Task, Told
from bench.subjects.subject import Note, Scoring, serve

__all__ = ["Pipeline", "opened"]

_CACHE_GIB = 1
_SEQUENCES = 32


class Pipeline(Scoring):
    """Steps for as long as a request is under way, and reads what each step gave."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._numbers = count()
        self._under_way: list[tuple[Any, Note, asyncio.Event]] = []
        self._stepping: asyncio.Task[None] | None = None

    async def generate(self, prompt: Sequence[int], task: Task, note: Note) -> None:
        """One request, the best tokens unless it has a temperature."""
        config = _config(task.new_tokens, task.top)
        config.num_return_sequences = task.completions
        if task.temperature > 0:
            config.do_sample, config.temperature = True, task.temperature
        await self._ask(prompt, config, note)

    def tokens(self, message: Mapping[int, Any], top: int) -> Told:
        """Those of all completions."""
        return [
            token
            for output in message.values()
            for token in zip(output.generated_ids, output.generated_log_probs, strict=True)
        ]

    async def score(self, prompt: Sequence[int], task: Task) -> list[float]:
        """Has the prompt repeated, after it each choice; every token comes with its log probability."""
        config = _config(1, task.top)
        config.echo = True
        texts = [[*prompt, *choice] for choice in task.choices] or [list(prompt)]
        told: list[list[Mapping[int, Any]]] = [[] for _ in texts]
        await asyncio.gather(*(self._ask(text, config, note.append) for text, note in zip(texts, told, strict=True)))
        lengths = [len(choice) for choice in task.choices] or [len(prompt) - 1]
        found: list[float] = []
        for text, messages, length in zip(texts, told, lengths, strict=True):
            logprobs = [p for each in messages for output in each.values() for p in output.generated_log_probs]
            assert len(logprobs) == len(text) + 1  # one is of a token after the text
            found += logprobs[len(text) - length : len(text)]
        return found

    async def _ask(self, prompt: Sequence[int], config: Any, note: Note) -> None:
        token_ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        finished = asyncio.Event()
        self._under_way.append((self._pipeline.add_request(next(self._numbers), token_ids, config), note, finished))
        if self._stepping is None:
            self._stepping = asyncio.create_task(self._step())
        await finished.wait()

    async def _step(self) -> None:
        while self._under_way:
            self._pipeline.step()
            for request in list(self._under_way):
                handle, note, finished = request
                while handle.can_read():
                    note(handle.read())
                if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                    finished.set()
                    self._under_way.remove(request)
            await asyncio.sleep(0)
        self._stepping = None


def _config(new_tokens: int, top: int) -> Any:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = new_tokens
    config.ignore_eos, config.do_sample, config.logprobs = True, False, top
    return config


@contextmanager
def opened(model: str, dtype: str, threads: str) -> Iterator[Pipeline]:
    """The model of the file, its keys and values as precise as its products; without bfloat16 ones in float32."""
    able = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = "bf16" if dtype == "bfloat16" and able else "f32"
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs, scheduler.enable_prefix_caching = _CACHE_GIB, _SEQUENCES, True
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": int(threads),
    }
    yield Pipeline(openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties))


if __name__ == "__main__":
    serve(opened(*sys.argv[1:]))
