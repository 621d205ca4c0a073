"""Scored numbers are those of transformers' own forward pass, for every kind of position encoding.

Each comparison is also run on a server whose positions, window or slopes are off by one: it must notice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceStub
from logprobs_server.engine import decoder
from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.decoder import Architecture
from logprobs_server.engine.lean import LeanModel, packed_decoder
from logprobs_server.engine.model import general, loading
from oracle import TOLERANCE, Oracle, deviation
from serving import BOTH_PATHS, given, path_name, serving, skip_without_kernels
from texts import LONG_TEXT, TEXTS
from tiny_models import save_tiny_model
from tokenizers import Tokenizer
from transformers import masking_utils
from transformers.models.bloom import modeling_bloom

NAMED = [7, 0, 299]
TOP_COUNT = 5
OPTIONS = pb.LogprobOptions(top_count=TOP_COUNT, token_ids=NAMED, entropy=True)
STEP_TOKENS = 96
"""Few, so that most texts are computed in several chunks."""
SPOILT_TOKENS = 300
NOTICEABLE = 100 * TOLERANCE


@dataclass(frozen=True, slots=True)
class Served:
    """A model, served, and as transformers alone runs it."""

    name: str
    lean: bool
    stub: LogprobsServiceStub
    oracle: Oracle
    tokenizer: Tokenizer

    def scored(self, context: pb.Input) -> Sequence[pb.Token]:
        """The tokens of a context, scored."""
        return self.stub.Score(pb.ScoreRequest(context=context, logprobs=OPTIONS)).sequences[0].tokens

    def deviation(self, tokens: Sequence[pb.Token]) -> float:
        """The largest difference of any number told of them."""
        assert not tokens[0].HasField("logprob")
        assert all(len(token.top) == TOP_COUNT for token in tokens[1:])
        logits = self.oracle.logits([token.id for token in tokens])
        return deviation(tokens[1:], logits[:-1], NAMED) if len(tokens) > 1 else 0.0

    def long_ids(self, count: int) -> list[int]:
        """The first token ids of a long text."""
        ids: list[int] = self.tokenizer.encode(LONG_TEXT).ids
        assert len(ids) >= count
        return ids[:count]


@pytest.fixture(scope="module", params=BOTH_PATHS, ids=path_name)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny model of each architecture, on each path that can run it."""
    name, lean = request.param
    folder = tmp_path_factory.mktemp(name)
    save_tiny_model(name, folder)
    yield from _served(name, lean, folder, threads=1, max_sequences=8, max_step_tokens=STEP_TOKENS)


@pytest.fixture(scope="module", params=[name for name, lean in BOTH_PATHS if lean])
def on_device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny model of each architecture on the path that GPUs take, here on the CPU."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(request.param, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_is_gpu", lambda device: True)
        yield from _served(request.param, False, folder, threads=1, max_sequences=8, max_step_tokens=STEP_TOKENS)


@pytest.fixture(scope="module", params=[False, True], ids=["general", "lean"])
def embedded(request: pytest.FixtureRequest, embedded_folder: Path) -> Iterator[Served]:
    """The embedded default model, on each path."""
    yield from _served("embedded", request.param, embedded_folder, threads=os.cpu_count(), max_sequences=8)


def _served(name: str, lean: bool, folder: Path, **settings: Any) -> Iterator[Served]:
    skip_without_kernels(lean)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "LeanModel", Remembering)
        with serving(folder, kernels=lean, **settings) as stub:
            yield Served(name, lean, stub, Oracle(folder), Tokenizer.from_file(str(folder / "tokenizer.json")))


def _shift_positions(patch: pytest.MonkeyPatch) -> None:
    """Every chunk but the first stands one position too far."""

    class ShiftedGroup(general._Group):
        def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
            super().__init__(chunks, device)
            self.position_ids += self.position_ids[:, :1] > 0

    patch.setattr(general, "_Group", ShiftedGroup)


def _widen_window(patch: pytest.MonkeyPatch) -> None:
    """Sliding windows show one token too many."""
    overlay = masking_utils.sliding_window_overlay
    patch.setattr(masking_utils, "sliding_window_overlay", lambda window: overlay(window + 1))


def _take_slopes_of_one_more_head(patch: pytest.MonkeyPatch) -> None:
    """ALiBi slopes are those of a model with one head more."""
    slopes = modeling_bloom._get_alibi_slopes
    patch.setattr(modeling_bloom, "_get_alibi_slopes", lambda heads, device: slopes(heads + 1, device)[:heads])


class Remembering(LeanModel):
    """Keeps the description it was packed from, so that a spoilt copy can be made."""

    def __init__(self, architecture: Architecture, *args: Any, **kwargs: Any) -> None:
        super().__init__(architecture, *args, **kwargs)
        self.architecture = architecture


def _spoil_lean(patch: pytest.MonkeyPatch, spoil: Callable[[Architecture], Architecture]) -> None:
    """Computes every chunk but the first with a spoilt copy of the model."""
    forward = LeanModel.forward

    def spoilt(model: Remembering, chunks: Sequence[Chunk]) -> torch.Tensor:
        if chunks[0].start == 0:
            return forward(model, chunks)
        twin = copy(model)
        twin._decoder = packed_decoder(spoil(model.architecture), torch.float32, model._cache)
        return forward(twin, chunks)

    patch.setattr(LeanModel, "forward", spoilt)


def _shift_lean_positions(patch: pytest.MonkeyPatch) -> None:
    def rolled(table: torch.Tensor | None) -> torch.Tensor | None:
        return None if table is None else table.roll(-1, 0)

    def shifted(whole: Architecture) -> Architecture:
        layers = [replace(layer, rotation=rolled(layer.rotation)) for layer in whole.layers]
        return replace(whole, layers=layers, positions=rolled(whole.positions))

    _spoil_lean(patch, shifted)


def _widen_lean_window(patch: pytest.MonkeyPatch) -> None:
    def widened(whole: Architecture) -> Architecture:
        layers = [replace(layer, window=layer.window + (layer.window > 0)) for layer in whole.layers]
        return replace(whole, layers=layers)

    _spoil_lean(patch, widened)


def _take_lean_slopes_of_one_more_head(patch: pytest.MonkeyPatch) -> None:
    def steeper(whole: Architecture) -> Architecture:
        heads = whole.query_heads
        return replace(whole, slopes=decoder._slopes(heads + 1)[:heads])

    _spoil_lean(patch, steeper)


LEAN_SPOILS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], ...]] = {
    "bloom": (_take_lean_slopes_of_one_more_head,),
    "gemma3_text": (_shift_lean_positions, _widen_lean_window),
    "mistral": (_shift_lean_positions, _widen_lean_window),
}
SPOILS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], ...]] = {
    "bloom": (_take_slopes_of_one_more_head,),
    "gemma3_text": (_shift_positions, _widen_window),
    "mistral": (_shift_positions, _widen_window),
}
"""What can be wrong by one, where it is not positions alone."""


def _check_texts(served: Served) -> None:
    for text in TEXTS:
        tokens = served.scored(pb.Input(text=text))
        assert [token.id for token in tokens] == served.tokenizer.encode(text).ids, text
        assert served.deviation(tokens) <= TOLERANCE, text


def test_there_are_texts_of_every_length() -> None:
    assert len(TEXTS) >= 50
    assert len(set(TEXTS)) == len(TEXTS)


def test_tiny_models_score_texts_as_transformers_does(tiny: Served) -> None:
    _check_texts(tiny)


def test_tiny_models_score_texts_on_the_path_of_gpus_as_transformers_does(on_device: Served) -> None:
    _check_texts(on_device)
    assert on_device.deviation(on_device.scored(given(on_device.long_ids(2000)))) <= TOLERANCE


@pytest.mark.parametrize("count", [1, 2, 97, 2000])
def test_tiny_models_score_any_number_of_tokens_as_transformers_does(tiny: Served, count: int) -> None:
    assert tiny.deviation(tiny.scored(given(tiny.long_ids(count)))) <= TOLERANCE


def test_the_comparison_notices_whatever_is_off_by_one(tiny: Served) -> None:
    if tiny.lean:
        spoils = LEAN_SPOILS.get(tiny.name, (_shift_lean_positions,))
    else:
        spoils = SPOILS.get(tiny.name, (_shift_positions,))
    for spoil in spoils:
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch)
            tokens = tiny.scored(given(tiny.long_ids(SPOILT_TOKENS)))
        assert tiny.deviation(tokens) > NOTICEABLE, spoil.__name__


def test_the_embedded_model_scores_texts_as_transformers_does(embedded: Served) -> None:
    _check_texts(embedded)


@pytest.mark.parametrize("count", [1, 400, 2000])
def test_the_embedded_model_scores_any_number_of_tokens_as_transformers_does(embedded: Served, count: int) -> None:
    assert embedded.deviation(embedded.scored(given(embedded.long_ids(count)))) <= TOLERANCE
