"""The device path computes what transformers computes, in whatever pieces and company rows come.

On a CPU its operations run one by one, the very ones that a GPU records; what only a GPU has is for tests marked `gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from devices import FAMILIES, NUM_BLOCKS, TILE, TOLERANCE, Sequences, check_company, deviation, device_model, drawn_ids
from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.decoder import architecture_of
from logprobs_server.engine.device_batch import WIDE
from tiny_models import CONTEXT_LENGTH, tiny_model
from torch import Tensor
from torch.nn import functional


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As the engine runs a model."""
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_what_transformers_computes(name: str) -> None:
    model = tiny_model(name)
    check_company(model, device_model(model))


def _later(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.roll(-1, 0)


def _steeper(slopes: Tensor | None) -> Tensor | None:
    return None if slopes is None else 1.01 * slopes


@pytest.mark.parametrize("name", FAMILIES)
def test_the_comparison_notices_whatever_is_off_by_one(name: str) -> None:
    model = tiny_model(name)
    served, sequences = device_model(model), Sequences(60)
    sequences.step(served, {0: 30})
    whole = served._whole
    layers = [replace(layer, window=layer.window and layer.window + 1) for layer in whole.layers]
    if layers == whole.layers:
        layers = [replace(layer, rotation=_later(layer.rotation)) for layer in whole.layers]
    served._whole = replace(whole, layers=layers, positions=_later(whole.positions))
    served._heads = replace(served._heads, slopes=_steeper(whole.slopes))
    assert deviation(sequences.finish(served, 0, 1), model, sequences.ids[0]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["bloom", "gemma3_text", "gpt2", "llama"])
@pytest.mark.parametrize("size", [1, 7, 300])
def test_pieces_make_no_difference(name: str, size: int) -> None:
    served = device_model(tiny_model(name))
    whole, pieces = Sequences(300), Sequences(300)
    one, other = whole.finish(served, 0, 300), pieces.finish(served, 0, size)
    assert torch.allclose(one.log_softmax(-1), other.log_softmax(-1), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9])
def test_rows_around_a_bucket_are_those_of_each_alone(count: int) -> None:
    model = tiny_model("qwen3")
    served = device_model(model)
    sequences = Sequences(*range(20, 20 + count))
    for index in range(count):
        sequences.step(served, {index: 19})
    sequences.step(served, dict.fromkeys(range(count), 1))
    for index in range(count):
        assert deviation(sequences.logits(index), model, sequences.ids[index][:20]) <= TOLERANCE


@pytest.mark.parametrize("name", ["gemma3_text", "mistral"])
def test_windows_and_tables_hold_around_their_bounds(name: str) -> None:
    model = tiny_model(name)
    served = device_model(model)
    sequences = Sequences(1030)
    for stop in (1, 6, 8, 31, 33, 254, 258, 300, 510, 514, 1022, 1030):
        while sequences.computed[0] < stop - 4:
            sequences.step(served, {0: min(250, stop - 4 - sequences.computed[0])})
        while sequences.computed[0] < stop:
            sequences.step(served, {0: 1})
    assert deviation(sequences.logits(0), model, sequences.ids[0]) <= TOLERANCE


def test_rows_of_padding_leave_block_0_and_all_that_sequences_hold_as_it_was() -> None:
    served = device_model(tiny_model("llama"))
    sequences = Sequences(40, 40, 40, 40)
    sequences.step(served, dict.fromkeys(range(4), 33))
    before = served._cache.clone()
    sequences.step(served, {0: 1, 1: 1, 2: 1})
    written = {blocks[1] for blocks in sequences.blocks[:3]} | {NUM_BLOCKS}
    changed = (served._cache != before).flatten(2).any(-1).any(0)
    assert set(changed.nonzero().flatten().tolist()) == written
    assert not served._cache[:, 0].any()


def test_what_a_block_held_before_does_not_matter() -> None:
    model = tiny_model("llama")
    served = device_model(model)
    served._cache[:, 1:] = torch.nan
    sequences = Sequences(70, 30)
    sequences.step(served, {0: 40, 1: 30})
    logits = sequences.finish(served, 0, 1)
    assert deviation(logits, model, sequences.ids[0]) <= TOLERANCE


@pytest.mark.parametrize("by_tile", [False, True])
def test_wide_products_are_used_where_they_change_no_bit(by_tile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, attend = torch.mm, functional.scaled_dot_product_attention
    sizes = set()

    def mm(x: Tensor, weight: Tensor) -> Tensor:
        sizes.add(len(x))
        rows = torch.cat([multiply(row, weight) for row in x.split(1)])
        return rows * (1 + 1e-6 * len(x)) if by_tile else rows

    def attention(queries: Tensor, keys: Tensor, values: Tensor, *, attn_mask: Tensor, scale: float) -> Tensor:
        """Query by query: on some processors a product of few rows has other bits than one of many."""
        each = zip(queries.split(1, dim=2), attn_mask.split(1, dim=2), strict=True)
        return torch.cat([attend(query, keys, values, attn_mask=mask, scale=scale) for query, mask in each], dim=2)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    served = device_model(tiny_model("llama"))
    sizes.clear()
    whole, pieces = Sequences(40), Sequences(40)
    assert torch.equal(whole.finish(served, 0, 40), pieces.finish(served, 0, 3))
    assert sizes == ({TILE} if by_tile else {TILE, WIDE * TILE})


def test_a_copied_block_holds_what_it_was_copied_from() -> None:
    served = device_model(tiny_model("gpt_neox"))
    sequences = Sequences(80)
    sequences.step(served, {0: 50})
    expected = sequences.finish(served, 0, 30)
    first, second = sequences.blocks[0][:2]
    served.copy_blocks([(second, NUM_BLOCKS - 1)])
    chunk = Chunk(token_ids=sequences.ids[0][50:], start=50, blocks=[first, NUM_BLOCKS - 1, sequences.blocks[0][2]])
    assert torch.equal(served.logits(served.forward([chunk])), expected[50:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bloom", "gemma3_text", "llama"])
def test_half_precision_is_nearer_to_the_same_weights_in_float32_than_transformers(
    name: str, dtype: torch.dtype
) -> None:
    model = tiny_model(name).to(dtype)
    sequences = Sequences(60)
    logits = sequences.finish(device_model(model), 0, 20)
    inputs = torch.tensor(sequences.ids)
    own, exact = (
        which(input_ids=inputs, use_cache=False).logits[0].float() for which in (model, deepcopy(model).float())
    )
    ours, theirs = ((found.log_softmax(-1) - exact.log_softmax(-1)).abs().mean() for found in (logits, own))
    assert ours < theirs < 0.1
    assert logits.dtype == torch.float32


def test_an_engine_draws_on_it_what_greedy_decoding_draws() -> None:
    model = tiny_model("llama")
    drawn = drawn_ids(device_model(model))
    ids = list(range(3))
    for token_id in drawn[0]:
        assert token_id == model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
        ids.append(token_id)
    assert [len(tokens) for tokens in drawn] == [12] * 4


def held(model: Any) -> int:
    """Bytes of all memory that a model's weights lie in, each piece counted once."""
    pieces = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(pieces.values())


def test_joined_weights_are_not_held_twice() -> None:
    model = tiny_model("qwen2")
    before, ids = held(model), torch.arange(9).unsqueeze(0)
    expected = model(input_ids=ids).logits
    architecture = architecture_of(model, CONTEXT_LENGTH)
    assert architecture is not None
    assert held(model) == before
    assert architecture.layers[0].qkv.weight.data_ptr() == model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert torch.equal(model(input_ids=ids).logits, expected)
