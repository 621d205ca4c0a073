"""What only a GPU can show of the device path: graphs, half precision, no waiting, and bits that ignore company."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from devices import CPU, CUDA, FAMILIES, Sequences, check_company, device_model, drawn_ids
from logprobs_server.engine.adjustment import Adjustment, JobAdjustment
from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.logprobs import position_logprobs
from logprobs_server.engine.random import VocabularyNoise
from logprobs_server.engine.sampling import Draw, draw_tokens
from logprobs_server.engine.types import LogprobOptions, SamplingOptions
from tiny_models import VOCABULARY_SIZE, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TILE = 128


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As the engine runs a model."""
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gpu_computes_what_transformers_computes(name: str) -> None:
    model = tiny_model(name).to(CUDA)
    check_company(model, device_model(model, CUDA, TILE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bloom", "gemma3_text", "llama"])
def test_graphs_give_bitwise_what_their_operations_give(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name).to(dtype)
    recorded, plain = device_model(model, CUDA, TILE), device_model(model, CUDA, TILE)
    plain._graphs = None
    ours, theirs = Sequences(340, 40, 43), Sequences(340, 40, 43)
    for sequences, served in ((ours, recorded), (theirs, plain)):
        for _ in range(4):  # shapes of prompts and of decoding, by turns
            sequences.step(served, {0: 70, 1: 1, 2: 3})
            sequences.step(served, {0: 1, 1: 1, 2: 1})
        for _ in range(27):
            sequences.step(served, {0: 1, 1: 1, 2: 1})
        sequences.finish(served, 0, 1)
    assert recorded._graphs is not None
    assert sum(graph is not None for graph in recorded._graphs._captured.values()) > 2
    for index in range(3):
        assert torch.equal(ours.logits(index), theirs.logits(index))


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_on_a_gpu_is_nearer_to_the_same_weights_in_float32_than_transformers(name: str) -> None:
    model = tiny_model(name).to(CUDA, torch.bfloat16)
    sequences = Sequences(60)
    logits = sequences.finish(device_model(model, CUDA, TILE), 0, 20)
    inputs = torch.tensor(sequences.ids, device=CUDA)
    own, exact = (which(input_ids=inputs).logits[0].float() for which in (model, deepcopy(model).float()))
    ours, theirs = ((found.log_softmax(-1) - exact.log_softmax(-1)).abs().mean() for found in (logits, own))
    assert ours < theirs < 0.1


def test_the_host_waits_in_a_decoding_step_for_what_it_fetches_alone() -> None:
    served = device_model(tiny_model("llama").to(torch.bfloat16), CUDA, TILE)
    noise = VocabularyNoise(VOCABULARY_SIZE, CUDA)
    plain = SamplingOptions(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    penalized = Adjustment(JobAdjustment(replace(plain, repetition_penalty=1.2, logit_bias=((5, 1.0),)), [7, 8]))
    penalized.count(9)
    options = [
        LogprobOptions(top_count=5, token_ids=(1, 2), entropy=True),
        LogprobOptions(top_count=3),
        LogprobOptions(),
    ]

    def step(position: int) -> None:
        chunks = [Chunk(token_ids=[7], start=position, blocks=[1 + 2 * i, 2 + 2 * i]) for i in range(3)]
        logits = served.logits(served.forward(chunks))
        draws = [
            Draw(options=replace(plain, temperature=0.0), seed=1, position=position, masked_ids=(3,)),
            Draw(options=plain, seed=1, position=position),
            Draw(options=replace(plain, temperature=0.7), seed=2, position=position, adjustment=penalized),
        ]
        drawn = draw_tokens(logits, draws, noise)
        assert None not in position_logprobs(logits, [token.token_id for token in drawn], options)

    for _ in range(2):
        step(0)  # the second records the graph
    torch.cuda.set_sync_debug_mode("error")
    try:
        for position in range(1, 40):
            step(position)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_engine_on_a_gpu_draws_what_it_draws_on_a_cpu() -> None:
    model = tiny_model("llama")
    on_cpu = drawn_ids(device_model(deepcopy(model), CPU, TILE))
    assert drawn_ids(device_model(model, CUDA, TILE)) == on_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bloom", "gemma3_text", "gpt2", "qwen3"])
def test_bits_on_a_gpu_depend_neither_on_pieces_nor_on_company(name: str, dtype: torch.dtype) -> None:
    """What the device path is designed for; it may be promised for GPUs on which this holds."""
    served = device_model(tiny_model(name).to(dtype), CUDA, TILE)
    alone = Sequences(300, 41, 66)
    expected = [alone.finish(served, index, 300) for index in range(3)]
    for sizes in ((1, 1, 1), (7, 1, 64), (64, 7, 1), (150, 41, 7)):
        company = Sequences(300, 41, 66)
        while any(left := [len(ids) - done for ids, done in zip(company.ids, company.computed, strict=True)]):
            company.step(served, {i: min(n, sizes[i]) for i, n in enumerate(left) if n})
        for index in range(3):
            assert torch.equal(company.logits(index), expected[index]), (sizes, index)
