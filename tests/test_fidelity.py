"""What the benchmark of fidelity stands on: a reference in float64 throughout, logprobs told of the right tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle
from tiny_models import VOCABULARY_SIZE, save_tiny_model
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from bench.deviation import Deviation, deviation, near_enough
from bench.exchange import Task, Told
from bench.fidelity import TEXTS, make_tasks
from bench.reference import Reference
from bench.subjects.llama_cpp import in_their_places
from bench.subjects.subject import Note, Scoring
from bench.subjects.transformers_eager import FLOAT32_LOGITS, opened

TEXT = list(range(7, VOCABULARY_SIZE, 5))
TASK = Task(
    prompts=[[TEXT[:9]], [TEXT[9:18]]], new_tokens=12, completions=1, temperature=1.0, choices=[], top=5, late=[]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama."""
    path = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", path)
    return path


class Kinds(TorchDispatchMode):
    """Notes the types of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.seen |= {each.dtype for each in torch.utils._pytree.tree_leaves(found) if isinstance(each, torch.Tensor)}
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_reference_is_computed_in_less_than_float64(folder: Path, dtype: torch.dtype) -> None:
    reference = Reference(folder, dtype)
    with Kinds() as kinds:
        assert reference.logprobs(TEXT).dtype == torch.float64
    assert {kind for kind in kinds.seen if kind.is_floating_point} == {torch.float64}


def test_the_reference_is_the_model(folder: Path) -> None:
    expected = Oracle(folder).logits(TEXT)[:-1].double().log_softmax(-1).gather(-1, torch.tensor(TEXT[1:])[:, None])
    found = Reference(folder, torch.float32).logprobs(TEXT)
    torch.testing.assert_close(found, expected.squeeze(-1), atol=1e-4, rtol=0.0)


def test_the_reference_has_the_weights_of_the_type(folder: Path) -> None:
    exact, rounded = (Reference(folder, dtype).logprobs(TEXT) for dtype in (torch.float32, torch.bfloat16))
    assert (exact - rounded).abs().max() > 1e-3


def told_by_transformers(folder: Path, dtype: str, task: Task, *variants: str) -> list[Told]:
    """What transformers says of a task."""
    with opened(str(folder), dtype, *variants) as batches:
        return asyncio.run(batches.answer(task)).told


def off(told: Told, before: Sequence[int], reference: Reference) -> float:
    """The largest deviation of what was told of the tokens after others."""
    truth = reference.logprobs([*before, *(token_id for token_id, _ in told)])[-len(told) :]
    return float((torch.tensor([logprob for _, logprob in told], dtype=torch.float64) - truth).abs().max())


@pytest.mark.parametrize("completions", [1, 3])
def test_transformers_tells_its_logprobs_of_what_it_drew(folder: Path, completions: int) -> None:
    told = told_by_transformers(folder, "float32", replace(TASK, completions=completions))
    reference = Reference(folder, torch.float32)
    assert [len(each) for each in told] == [completions * TASK.new_tokens] * 2
    for [prompt], tokens in zip(TASK.prompts, told, strict=True):
        for first in range(0, len(tokens), TASK.new_tokens):
            assert off(tokens[first : first + TASK.new_tokens], prompt, reference) < 1e-4


def test_transformers_tells_its_logprobs_of_texts_client_by_client(folder: Path) -> None:
    texts = [TEXT[first : first + 9] for first in range(0, 36, 9)]
    told = told_by_transformers(folder, "float32", replace(TASK, prompts=[texts[:2], texts[2:]], new_tokens=0))
    assert [[token_id for token_id, _ in each] for each in told] == [text[1:] for text in texts]
    reference = Reference(folder, torch.float32)
    assert all(off(each, text[:1], reference) < 1e-4 for each, text in zip(told, texts, strict=True))


def test_float32_logits_are_those_of_bfloat16_hidden_states(folder: Path) -> None:
    task = replace(TASK, prompts=[[TEXT]], new_tokens=0)
    [rounded], [wide] = (told_by_transformers(folder, "bfloat16", task, *v) for v in ((), (FLOAT32_LOGITS,)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        hidden = model.base_model(torch.tensor([TEXT])).last_hidden_state[0, :-1].float()
        truth = (hidden @ model.lm_head.weight.float().T).log_softmax(-1).gather(-1, torch.tensor(TEXT[1:])[:, None])
    errors = [max(abs(p - t) for (_, p), [t] in zip(told, truth.tolist(), strict=True)) for told in (wide, rounded)]
    assert errors[0] < 1e-5 < errors[1]


class Echo(Scoring):
    """Completes with the prompt's tokens, two at a time, the last client first; scores with them as logprobs."""

    def __init__(self, clients: int) -> None:
        self._turns = [asyncio.Event() for _ in range(clients)]

    async def generate(self, prompt: Sequence[int], task: Task, note: Note) -> None:
        client = prompt[0] // 10
        if client + 1 < len(self._turns):
            await self._turns[client + 1].wait()
        for first in range(0, task.new_tokens, 2):
            note(prompt[first : first + 2])
        self._turns[client].set()

    def tokens(self, message: Sequence[int], top: int) -> Told:
        return [(token_id, -float(token_id)) for token_id in message]

    async def score(self, prompt: Sequence[int], task: Task) -> list[float]:
        return [-float(token_id) for token_id in [*chain(*task.choices)] or prompt[1:]]


PROMPTS = [[[10 * client, 10 * client + 1, 10 * client + 2, 10 * client + 3]] for client in range(3)]


def test_what_is_told_stands_in_the_order_of_the_requests() -> None:
    answer = asyncio.run(Echo(3).answer(replace(TASK, prompts=PROMPTS, new_tokens=4)))
    assert answer.told == [[(token_id, -float(token_id)) for token_id in prompt] for [prompt] in PROMPTS]
    assert [stream.counts for stream in answer.streams] == [[2, 2]] * 3


@pytest.mark.parametrize("choices", [[], [[5, 6], [7, 8]]], ids=["texts", "choices"])
def test_scored_tokens_are_the_texts_or_the_choices(choices: list[list[int]]) -> None:
    answer = asyncio.run(Echo(3).answer(replace(TASK, prompts=PROMPTS, new_tokens=0, choices=choices)))
    scored = [[*chain(*choices)] or prompt[1:] for [prompt] in PROMPTS]
    assert answer.told == [[(token_id, -float(token_id)) for token_id in each] for each in scored]
    assert answer.streams == []


def test_tasks_are_about_more_than_2000_tokens_each(folder: Path) -> None:
    tasks = make_tasks(Tokenizer.from_file(str(folder / "tokenizer.json")))
    assert len(set(TEXTS)) == len(TEXTS)
    assert {key: task.temperature for key, task in tasks.items()} == {"score": 0.0, "greedy": 0.0, "sampled": 1.0}
    assert len({len(prompt) for [prompt] in tasks["greedy"].prompts}) == 1
    assert all(len(tasks[key].prompts) * tasks[key].new_tokens > 2000 for key in ("greedy", "sampled"))


def test_deviation_is_absolute_and_nan_is_no_nearness() -> None:
    assert deviation([0.5, -1.5, 1.0]) == Deviation(tokens=3, mean=1.0, max=1.5)
    assert deviation([0.5, float("nan")]).max == float("inf")


@pytest.mark.parametrize(
    ("dtype", "ours", "rival", "expected"),
    [
        ("bfloat16", (0.010, 9.0), None, True),
        ("bfloat16", (0.0101, 0.1), (1.0, 1.0), False),
        ("float32", (0.75, 0.75), (1.0, 1.0), True),
        ("float32", (0.76, 0.1), (1.0, 1.0), False),
        ("float32", (0.1, 0.76), (1.0, 1.0), False),
        ("float32", (0.0, 0.0), None, None),
    ],
)
def test_near_enough_is_what_the_type_is_held_to(
    dtype: str, ours: tuple[float, float], rival: tuple[float, float] | None, expected: bool | None
) -> None:
    mine, theirs = (pair and Deviation(tokens=1, mean=pair[0], max=pair[1]) for pair in (ours, rival))
    assert mine is not None
    assert near_enough(dtype, mine, theirs) is expected


def test_log_probabilities_that_llama_cpp_leaves_out_are_found_by_the_ids_or_dropped() -> None:
    told = [(1, -0.5), (4, -2.0)]
    assert in_their_places([1, 2, 3, 4], told) == [(1, -0.5), (2, None), (3, None), (4, -2.0)]
    assert in_their_places([1, 1, 4], told) == [(1, None), (1, None), (4, None)]
