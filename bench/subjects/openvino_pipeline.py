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

from bench.exchange import Task
from bench.subjects.subject import SAMPLING_TEMPERATURE, Note, Streaming, serve

__all__ = ["Pipeline", "opened"]

_CACHE_GIB = 1
_SEQUENCES = 32


class Pipeline(Streaming):
    """Steps for as long as a request is under way, and reads what each step gave."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._numbers = count()
        self._under_way: list[tuple[Any, Note, asyncio.Event]] = []
        self._stepping: asyncio.Task[None] | None = None

    async def generate(self, prompt: Sequence[int], task: Task, note: Note) -> None:
        """One request, greedy unless it wants several completions."""
        config = _config(task.new_tokens, task.top)
        if task.completions > 1:
            config.do_sample, config.temperature = True, SAMPLING_TEMPERATURE
            config.num_return_sequences = task.completions
        await self._ask(prompt, config, note)

    def count(self, message: Mapping[int, Any], top: int) -> int:
        """Tokens of all completions."""
        return sum(len(output.generated_ids) for output in message.values())

    async def score(self, prompt: Sequence[int], task: Task) -> int:
        """Has the prompt repeated, after it each choice; every token comes with its log probability."""
        config = _config(1, task.top)
        config.echo = True
        texts = [[*prompt, *choice] for choice in task.choices] or [list(prompt)]
        told: list[list[Mapping[int, Any]]] = [[] for _ in texts]
        await asyncio.gather(*(self._ask(text, config, note.append) for text, note in zip(texts, told, strict=True)))
        for text, messages in zip(texts, told, strict=True):
            assert sum(len(output.generated_log_probs) for m in messages for output in m.values()) == len(text) + 1
        return sum(map(len, task.choices)) or len(prompt) - 1

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
    """The model of the file, its keys and values as precise as its products."""
    precision = {"bfloat16": "bf16", "float32": "f32"}[dtype]
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
