"""What memory is used, and when: logits of a long text are never whole, the KV cache is used where sequences go on."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from pathlib import Path

import grpc
import pytest
import transformers
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceStub
from logprobs_server.__main__ import parse
from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.lean import LeanModel
from logprobs_server.engine.model.checkpoint import LoadOptions
from logprobs_server.engine.model.loading import load_model
from serving import given, served_elsewhere, skip_without_kernels
from tiny_models import CONTEXT_LENGTH, save_model
from torch import Tensor

VOCABULARY_SIZE = 250_880
"""BLOOM's."""
NUM_TOKENS = 2_000
GROWTH_LIMIT_BYTES = 400_000_000
"""Float32 logits of all positions would need 2 GB."""
PEAK_RESET = "5"
"""What proc(5) wants written to clear_refs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has a large vocabulary and is otherwise tiny."""
    folder = tmp_path_factory.mktemp("wide")
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=32, n_layer=2, n_head=2, seq_length=CONTEXT_LENGTH, eos_token_id=0
    )
    save_model(config, folder)
    return folder


def status_bytes(pid: int, name: str) -> int:
    """A process's memory as the kernel counts it."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scoring_a_long_text_over_a_large_vocabulary_grows_memory_by_little(folder: Path) -> None:
    request = pb.ScoreRequest(
        context=given([(7919 * i) % VOCABULARY_SIZE for i in range(NUM_TOKENS)]),
        logprobs=pb.LogprobOptions(top_count=5),
    )
    with served_elsewhere(folder) as (pid, target), grpc.insecure_channel(target) as channel:
        stub = LogprobsServiceStub(channel)
        stub.Score(pb.ScoreRequest(context=given(request.context.token_ids.ids[:50]), logprobs=request.logprobs))
        idle = status_bytes(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text(PEAK_RESET)
        for _ in range(3):
            [sequence] = stub.Score(request).sequences
            assert len(sequence.tokens) == NUM_TOKENS
        growth = status_bytes(pid, "VmHWM") - idle
    assert growth < GROWTH_LIMIT_BYTES, f"grew by {growth >> 20} MiB over {idle >> 20} MiB"


def is_used(tensor: Tensor) -> bool:
    """Whether the system has given memory for the tensor's first number."""
    seen = (ctypes.c_ubyte * 1)()
    start = ctypes.c_void_p(tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mincore(start, ctypes.c_size_t(mmap.PAGESIZE), seen) == 0
    return bool(seen[0] & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")
def test_memory_that_a_sequence_goes_on_in_is_used_when_it_starts(folder: Path) -> None:
    skip_without_kernels(True)
    kernels_dir = parse([], dict(os.environ)).cache_dir / "kernels"
    model = load_model(
        LoadOptions(
            path=str(folder),
            name="model",
            revision="",
            max_sequences=2,
            kv_cache_bytes=256 << 20,
            kernels_dir=kernels_dir,
        )
    )
    assert isinstance(model, LeanModel)
    blocks = range(500, 500 * 20, 500)  # further apart than pages are large
    model.forward([Chunk(token_ids=[1, 2, 3], start=0, blocks=blocks)])
    assert [is_used(model._cache[block]) for block in blocks] == [True] * 17 + [False] * 2
