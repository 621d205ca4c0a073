"""The lean path's promise: a position's numbers are the same bits alone and in company, in one pass or in pieces, with
keys and values computed before or not, from Score or from Generate.

LOGPROBS_SAME_BITS=whole in the environment scores as many sequences with the embedded model as with the tiny ones,
which takes minutes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import torch
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceStub
from logprobs_server.__main__ import parse
from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.events import PositionLogprobs
from logprobs_server.engine.kv_cache import BLOCK_SIZE, blocks_for
from logprobs_server.engine.lean import LeanModel
from logprobs_server.engine.logprobs import position_logprobs
from logprobs_server.engine.model.checkpoint import LoadOptions
from logprobs_server.engine.model.loading import load_model
from logprobs_server.engine.types import LogprobOptions
from serving import collected, given, serving, skip_without_kernels
from tiny_models import save_tiny_model

WHOLE = 200
FEW = 8
LONGEST = 600
CHUNKS = (1, 7, 64, 512)
COMPANY = 32
BLOCKS = 2 + (COMPANY + 1) * blocks_for(LONGEST)
OPTIONS = LogprobOptions(top_count=5, token_ids=(7, 0, 299), entropy=True)
TINY = ("bloom", "gpt2", "gpt_neox", "qwen3", "gemma3_text")
DTYPES = ("float32", "bfloat16")
SLICE = 64

Told = list[PositionLogprobs | None]


def _model(folder: Path, dtype: str) -> LeanModel:
    skip_without_kernels(True)
    options = LoadOptions(
        path=str(folder),
        name="model",
        revision="",
        max_sequences=COMPANY,
        dtype=dtype,
        device="cpu",
        kv_cache_bytes=4 << 30,
        kernels_dir=parse([], dict(os.environ)).cache_dir / "kernels",
    )
    model = load_model(options)
    assert isinstance(model, LeanModel)
    return model


@pytest.fixture(
    scope="module", params=[(name, dtype) for name in (*TINY, "embedded") for dtype in DTYPES], ids="-".join
)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, embedded_folder: Path
) -> tuple[LeanModel, int]:
    """A model, and how many sequences are scored with it."""
    name, dtype = request.param
    if name == "embedded":
        return _model(embedded_folder, dtype), WHOLE if os.environ.get("LOGPROBS_SAME_BITS") == "whole" else FEW
    folder = tmp_path_factory.mktemp(name)
    save_tiny_model(name, folder)
    return _model(folder, dtype), WHOLE


@dataclass(slots=True, eq=False)
class Text:
    """Tokens, where their keys and values are, how many are computed, and what was told of those that follow them."""

    token_ids: Sequence[int]
    blocks: Sequence[int]
    computed: int = 0
    told: Told = field(default_factory=list)

    def chunk(self, size: int) -> Chunk:
        """The next tokens, at most `size`."""
        return Chunk(
            token_ids=self.token_ids[self.computed : self.computed + size], start=self.computed, blocks=self.blocks
        )


def _pass(model: LeanModel, texts: Sequence[Text], sizes: Sequence[int]) -> None:
    """One pass over the next tokens of each text."""
    chunks = [text.chunk(size) for text, size in zip(texts, sizes, strict=True)]
    hidden = model.forward(chunks)
    following = [
        (text.token_ids[index + 1] if index + 1 < len(text.token_ids) else None)
        for text, chunk in zip(texts, chunks, strict=True)
        for index in range(chunk.start, chunk.start + len(chunk.token_ids))
    ]
    told: Told = []
    for first in range(0, len(following), SLICE):
        part = following[first : first + SLICE]
        logits = model.logits(hidden[first : first + SLICE])
        told += position_logprobs(logits, part, [OPTIONS] * len(part))
    for text, chunk in zip(texts, chunks, strict=True):
        count = len(chunk.token_ids)
        text.told += told[:count]
        text.computed += count
        del told[:count]


def _sequences(model: LeanModel, count: int) -> list[list[int]]:
    """Token ids of 1 to 600 tokens, many short, some long."""
    draw = Random(0)
    lengths = [1, LONGEST, *(int(LONGEST ** draw.random()) for _ in range(count - 2))]
    return [[draw.randrange(model.description.vocabulary_size) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def _alone(model: LeanModel, token_ids: Sequence[int]) -> Told:
    text = Text(token_ids, range(1, 1 + blocks_for(len(token_ids))))
    _pass(model, [text], [len(token_ids)])
    return text.told


@torch.inference_mode()
def _in_company(model: LeanModel, sequences: Sequence[Sequence[int]]) -> list[Told]:
    """Scores all in passes over random companies that change all the time, in pieces of every size."""
    draw = Random(1)
    free = list(range(1, BLOCKS))
    waiting = [Text(token_ids, []) for token_ids in sequences]
    texts, running = list(waiting), list[Text]()
    size = {text: draw.choice(CHUNKS) for text in texts}
    while waiting or running:
        while waiting and len(running) < COMPANY:
            text = waiting.pop(0)
            text.blocks = [free.pop(draw.randrange(len(free))) for _ in range(blocks_for(len(text.token_ids)))]
            running.append(text)
        company = draw.sample(running, draw.randint(1, len(running)))
        _pass(model, company, [size[text] for text in company])
        for text in [text for text in running if text.computed == len(text.token_ids)]:
            running.remove(text)
            free += text.blocks
    return [text.told for text in texts]


def test_what_is_told_does_not_depend_on_company_or_pieces(loaded: tuple[LeanModel, int]) -> None:
    model, count = loaded
    sequences = _sequences(model, count)
    assert min(map(len, sequences)) == 1
    assert max(map(len, sequences)) == LONGEST
    for token_ids, told in zip(sequences, _in_company(model, sequences), strict=True):
        assert told == _alone(model, token_ids)


def test_what_is_told_does_not_depend_on_the_number_of_threads(loaded: tuple[LeanModel, int]) -> None:
    model, _ = loaded
    token_ids = _sequences(model, 8)[1]
    told = []
    try:
        for threads in (1, 2, 3, 8):
            torch.ops.logprobs.set_threads(threads)
            told.append(_alone(model, token_ids))
    finally:
        torch.ops.logprobs.set_threads(torch.get_num_threads())
    assert told[1:] == told[:1] * 3


@torch.inference_mode()
def test_states_do_not_depend_on_threads_that_lose_their_processors(loaded: tuple[LeanModel, int]) -> None:
    model, _ = loaded
    draw = Random(4)
    tokens = [[draw.randrange(model.description.vocabulary_size) for _ in range(3)] for _ in range(8)]
    chunks = [Chunk(token_ids=ids, start=0, blocks=[1 + index]) for index, ids in enumerate(tokens)]
    try:
        torch.ops.logprobs.set_threads(1)
        expected = model.forward(chunks)
        torch.ops.logprobs.set_threads(16)  # more than there are processors: members find parts of a pass done
        for _ in range(100):
            assert torch.equal(model.forward(chunks), expected)
    finally:
        torch.ops.logprobs.set_threads(torch.get_num_threads())


@torch.inference_mode()
def test_what_is_told_does_not_depend_on_keys_and_values_computed_before(loaded: tuple[LeanModel, int]) -> None:
    model, _ = loaded
    first, second = _sequences(model, 8)[1], _sequences(model, 9)[1]
    shared = 5 * BLOCK_SIZE
    second = first[:shared] + second[shared:]
    one = Text(first, range(1, 1 + blocks_for(len(first))))
    _pass(model, [one], [len(first)])
    own = range(100, 100 + blocks_for(len(second)) - 5)
    other = Text(second, [*one.blocks[:5], *own], computed=shared)
    for size in (7, 64, LONGEST):
        _pass(model, [other], [size])
    assert other.told == _alone(model, second)[shared:]


@pytest.fixture(scope="module", params=DTYPES)
def served(request: pytest.FixtureRequest, embedded_folder: Path) -> Iterator[LogprobsServiceStub]:
    """The embedded model over a real connection."""
    skip_without_kernels(True)
    with serving(embedded_folder, dtype=request.param, threads=os.cpu_count()) as stub:
        assert stub.GetModel(pb.GetModelRequest()).model.batch_invariant
        yield stub


def _told(tokens: Sequence[pb.Token]) -> list[object]:
    return [(t.id, t.logprob, t.rank, t.tail_logprob, t.entropy, [(a.id, a.logprob) for a in t.top]) for t in tokens]


def _generated(
    stub: LogprobsServiceStub, prompt: Sequence[int], temperature: float, count: int
) -> list[list[pb.Token]]:
    request = pb.GenerateRequest(
        prompt=given(prompt),
        max_tokens=24,
        completion_count=count,
        sampling=pb.Sampling(temperature=temperature, seed=3),
        stopping=pb.Stopping(ignore_eos=True),
        logprobs=pb.LogprobOptions(top_count=5, entropy=True),
    )
    return [completion.tokens for completion in collected(stub.Generate(request), count)]


def _scored(stub: LogprobsServiceStub, prompt: Sequence[int], continuation: Sequence[int]) -> list[list[object]]:
    """What Score tells of a continuation: after a context, and at the end of a text of its own."""
    options = pb.LogprobOptions(top_count=5, entropy=True)
    after = pb.ScoreRequest(context=given(prompt), continuations=[given(continuation)], logprobs=options)
    whole = pb.ScoreRequest(context=given([*prompt, *continuation]), logprobs=options)
    found = [stub.Score(request).sequences[0].tokens for request in (after, whole)]
    return [_told(found[0]), _told(found[1][len(prompt) :])]


@pytest.mark.parametrize("others", [0, 16], ids=["idle", "with 16 others"])
@pytest.mark.parametrize(("temperature", "count"), [(0.0, 1), (1.0, 1), (1.0, 20)])
def test_generated_tokens_have_the_bits_that_score_gives_them(
    served: LogprobsServiceStub, others: int, temperature: float, count: int
) -> None:
    draw = Random(2)
    prompts = [[draw.randrange(100, 40_000) for _ in range(draw.randint(1, 90))] for _ in range(1 + others)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        calls = [
            pool.submit(_generated, served, prompt, temperature, count if i == others else 1)
            for i, prompt in enumerate(prompts)
        ]
        assert len(calls[-1].result()) == count
        for prompt, call in list(zip(prompts, calls, strict=True))[-2:]:
            for tokens in call.result():
                ids = [token.id for token in tokens]
                assert _scored(served, prompt, ids) == [_told(tokens)] * 2
