"""Generated tokens: greedy ones are transformers' own, seeds replay, logprobs are Score's; alone or in company."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceStub
from oracle import TOLERANCE, Oracle
from serving import BOTH_PATHS, Completion, collected, given, path_name, serving, skip_without_kernels
from texts import PROMPTS, TEXTS
from tiny_models import save_tiny_model
from tokenizers import Tokenizer

CALLERS = 16
SEED = 1_000_000
DRAWS = 20
GREEDY = pb.Sampling(temperature=0)
CUTS = {
    "whole": pb.Sampling(temperature=1),
    "top-k": pb.Sampling(temperature=0.9, top_k=20),
    "top-p": pb.Sampling(temperature=1.2, top_p=0.8),
    "min-p": pb.Sampling(temperature=1, min_p=0.05),
}


@dataclass(frozen=True, slots=True)
class Served:
    """A model, served, and as transformers alone runs it; `length` is that of its completions here."""

    stub: LogprobsServiceStub
    oracle: Oracle
    prompts: Sequence[list[int]]
    length: int

    def generate(self, prompt: Sequence[int], sampling: pb.Sampling, count: int = 1) -> list[Completion]:
        """Completions of full length."""
        request = pb.GenerateRequest(
            prompt=given(prompt),
            max_tokens=self.length,
            completion_count=count,
            sampling=sampling,
            stopping=pb.Stopping(ignore_eos=True),
        )
        return collected(self.stub.Generate(request), count)

    def greedy(self, prompt: Sequence[int]) -> list[int]:
        """The most probable completion."""
        [completion] = self.generate(prompt, GREEDY)
        return completion.token_ids

    def expected(self, prompt: Sequence[int]) -> list[int]:
        """What transformers generates, by margins that no rounding turns over."""
        token_ids = self.oracle.greedy(prompt, self.length)
        assert self.oracle.smallest_margin(prompt, token_ids) > TOLERANCE
        return token_ids

    def scored(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Logprobs of tokens after a prompt, by Score."""
        request = pb.ScoreRequest(context=given(prompt), continuations=[given(token_ids)])
        return [token.logprob for token in self.stub.Score(request).sequences[0].tokens]


SEEDED = [("llama", True), ("bloom", True), ("opt", False), ("embedded", True)]


@pytest.fixture(scope="module", params=[*BOTH_PATHS, ("embedded", True)], ids=path_name)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny model of each architecture on each path, and the embedded one."""
    name, lean = request.param
    skip_without_kernels(lean)
    if name == "embedded":
        folder, length, threads = request.getfixturevalue("embedded_folder"), 16, os.cpu_count()
    else:
        folder, length, threads = tmp_path_factory.mktemp(name), 64, 1
        save_tiny_model(name, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    with serving(folder, kernels=lean, threads=threads, max_sequences=24, max_step_tokens=64) as stub:
        yield Served(stub, Oracle(folder), prompts, length)


def test_the_greedy_completion_is_that_of_transformers(served: Served) -> None:
    expected = served.expected(served.prompts[-1])
    assert len(set(expected)) >= min(20, served.length // 2)
    assert served.greedy(served.prompts[-1]) == expected


def test_greedy_completions_of_many_callers_at_once_are_those_of_transformers(served: Served) -> None:
    prompts = served.prompts[:CALLERS]
    expected = [served.expected(prompt) for prompt in prompts]
    with ThreadPoolExecutor(CALLERS + 4) as pool:
        answers = [pool.submit(served.greedy, prompt) for prompt in prompts]
        scores = [pool.submit(served.scored, prompt, prompts[0]) for prompt in prompts]
        assert [answer.result() for answer in answers] == expected
    alone = [served.scored(prompt, prompts[0]) for prompt in prompts]
    assert [score.result() for score in scores] == [pytest.approx(one, abs=TOLERANCE) for one in alone]


def test_logprobs_of_generated_tokens_are_those_of_scoring_them(served: Served) -> None:
    prompt = served.prompts[0]
    for sampling in (GREEDY, CUTS["whole"], CUTS["top-k"]):
        [completion] = served.generate(prompt, pb.Sampling(seed=SEED, **_set_fields(sampling)))
        scored = served.scored(prompt, completion.token_ids)
        assert [token.logprob for token in completion.tokens] == pytest.approx(scored, abs=TOLERANCE)
        assert completion.finished is not None
        assert completion.finished.totals.logprob == pytest.approx(sum(scored), abs=TOLERANCE * served.length)


@pytest.mark.parametrize("served", SEEDED, indirect=True, ids=path_name)
@pytest.mark.parametrize("cut", CUTS)
def test_draws_of_one_request_are_those_of_single_requests_with_the_next_seeds(served: Served, cut: str) -> None:
    prompt, fields = served.prompts[1], _set_fields(CUTS[cut])
    together = served.generate(prompt, pb.Sampling(seed=SEED, **fields), DRAWS)
    with ThreadPoolExecutor(DRAWS + 4) as pool:
        company = [pool.submit(served.generate, other, CUTS["whole"], 3) for other in served.prompts[2:4]]
        seeds = range(SEED, SEED + DRAWS)
        single = [pool.submit(served.generate, prompt, pb.Sampling(seed=seed, **fields)) for seed in seeds]
        alone = [one.result()[0] for one in single]
    assert all(other.result() for other in company)
    assert [one.token_ids for one in alone] == [one.token_ids for one in together]
    assert len({tuple(one.token_ids) for one in alone}) == DRAWS
    for mine, other in zip(alone, together, strict=True):
        for name in ("logprob", "sampling_logprob"):
            others = [getattr(token, name) for token in other.tokens]
            assert [getattr(token, name) for token in mine.tokens] == pytest.approx(others, abs=TOLERANCE)


def test_eos_ends_a_greedy_completion_where_it_ends_transformers(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    save_tiny_model("llama", original)
    prompt = Tokenizer.from_file(str(original / "tokenizer.json")).encode(TEXTS[7]).ids
    oracle = Oracle(original)
    eos = oracle.greedy(prompt, 64)[20]
    _set_eos(original, copy, eos)
    expected = oracle.greedy(prompt, 64, eos_token_id=eos)
    with serving(copy, threads=1) as stub:
        request = pb.GenerateRequest(prompt=given(prompt), max_tokens=64, sampling=GREEDY)
        [completion] = collected(stub.Generate(request))
    assert completion.token_ids == expected
    assert 1 < len(expected) <= 21
    assert completion.finished is not None
    assert completion.finished.reason == pb.FINISH_REASON_END_OF_SEQUENCE


def _set_eos(original: Path, copy: Path, eos_token_id: int) -> None:
    """Copies a model's folder and makes another token its end-of-sequence."""
    shutil.copytree(original, copy)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(settings | {"eos_token_id": eos_token_id}))


def _set_fields(sampling: pb.Sampling) -> dict[str, Any]:
    return {field.name: value for field, value in sampling.ListFields()}
