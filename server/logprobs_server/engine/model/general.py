"""The general path: transformers' own forward pass, for any causal language model it knows.

It computes chunks of sequences, keeps their keys and values in blocks, and turns hidden states into logits; it knows
nothing of requests, sampling or log probabilities.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.kv_cache import BLOCK_SIZE, blocks_for
from logprobs_server.engine.model.capacity import blocks_that_fit
from logprobs_server.engine.model.checkpoint import LoadOptions
from logprobs_server.engine.types import ModelDescription

__all__ = ["TransformersModel"]


class _Group:
    """Chunks of equal length as one padded batch: pasts are padded on the left, so that distances stay right."""

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        past, new = max(chunk.start for chunk in chunks), len(chunks[0].token_ids)
        slots = [_slots(chunk.blocks, chunk.start + new) for chunk in chunks]
        self.token_ids = torch.tensor([list(chunk.token_ids) for chunk in chunks], device=device)
        self.position_ids = torch.tensor([list(range(c.start, c.start + new)) for c in chunks], device=device)
        self.attention_mask = torch.tensor(
            [[0] * (past - chunk.start) + [1] * (chunk.start + new) for chunk in chunks], device=device
        )
        # Padding reads block 0, which stays zero. [batch, past] and [batch · new]
        self.past_slots = torch.tensor(
            [[0] * (past - c.start) + s[: c.start] for c, s in zip(chunks, slots, strict=True)],
            device=device,
            dtype=torch.int64,
        )
        self.new_slots = torch.tensor([slot for s in slots for slot in s[-new:]], device=device)


class _BlockLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """One layer's keys and values in blocks, which transformers sees as the past of the group under way."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.stores = (keys, values)  # [slots, heads, head_dim] each
        self.group: _Group | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values, [batch, heads, new, head_dim]; returns past and new ones together."""
        return self._extend(self.stores[0], key_states), self._extend(self.stores[1], value_states)

    def _extend(self, store: Tensor, new: Tensor) -> Tensor:
        assert self.group is not None
        store[self.group.new_slots] = new.transpose(1, 2).flatten(0, 1)
        past = store[self.group.past_slots].transpose(1, 2)  # [batch, heads, past, head_dim]
        return torch.cat([past, new], dim=2)

    def get_seq_length(self) -> int:
        """Length of the group's past, padding included."""
        return 0 if self.group is None else self.group.past_slots.shape[1]


class _HiddenStates(BaseModelOutputWithPast):  # type: ignore[misc]  # transformers is not typed
    """A decoder's output that has nothing but hidden states, whatever else a model's forward hands on."""

    def __getattr__(self, name: str) -> None:
        return None


class _PassThrough(nn.Module):
    """Stands where the decoder stood: the model's own forward then applies its head to hidden states handed in."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _HiddenStates:
        """Hands the hidden states through."""
        return _HiddenStates(last_hidden_state=inputs_embeds)


class TransformersModel:
    """A causal language model run by transformers, its keys and values in blocks. Implements `Model`.

    Takes the model over: what stands for its decoder afterwards only hands hidden states through.
    """

    def __init__(self, model: Any, description: ModelDescription, options: LoadOptions) -> None:
        self.description = description
        self.device = model.device
        self._body = model.get_decoder()
        self._takes_positions = "position_ids" in inspect.signature(self._body.forward).parameters
        self._cache_name = _cache_name(self._body)
        shapes = _kv_shapes(self._body, self.device)
        self.own_threads = False
        self.prompt_pace: int | None = 1 if self.device.type == "cpu" else None
        numbers = BLOCK_SIZE * sum(heads * size for layer in shapes for heads, size in layer)
        self.num_blocks = blocks_that_fit(numbers * model.dtype.itemsize, description, options, self.device)
        self._layers = [
            _BlockLayer(*(self._new_store(heads, size, model.dtype) for heads, size in layer)) for layer in shapes
        ]
        self._cache = Cache(layers=list(self._layers))
        _replace_module(model, self._body, _PassThrough())
        self._head = model

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes the chunks and stores their keys and values; returns hidden states [tokens of all, hidden]."""
        order = sorted(range(len(chunks)), key=lambda i: len(chunks[i].token_ids))
        parts: dict[int, Tensor] = {}
        for _, members in itertools.groupby(order, key=lambda i: len(chunks[i].token_ids)):
            indices = list(members)
            hidden = self._run(_Group([chunks[i] for i in indices], self.device))
            parts.update(zip(indices, hidden, strict=True))
        return torch.cat([parts[i] for i in range(len(chunks))])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] that follow hidden states [rows, hidden], in the model's dtype."""
        logits: Tensor = self._head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits
        return logits.squeeze(0)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies keys and values of blocks, (from, to)."""
        sources, targets = (torch.tensor(side, device=self.device) for side in zip(*pairs, strict=True))
        for store in itertools.chain.from_iterable(layer.stores for layer in self._layers):
            blocks = store.view(self.num_blocks, BLOCK_SIZE, *store.shape[1:])
            blocks[targets] = blocks[sources]

    def _run(self, group: _Group) -> Tensor:
        """Runs one group; returns [batch, new, hidden]."""
        for layer in self._layers:
            layer.group = group
        positions = {"position_ids": group.position_ids} if self._takes_positions else {}
        hidden: Tensor = self._body(
            input_ids=group.token_ids,
            attention_mask=group.attention_mask,
            use_cache=True,
            **{self._cache_name: self._cache},
            **positions,
        ).last_hidden_state
        return hidden

    def _new_store(self, heads: int, size: int, dtype: torch.dtype) -> Tensor:
        """Room for all blocks' keys or values: [slots, heads, head_dim]. Untouched memory costs nothing on a CPU."""
        store = torch.empty(self.num_blocks * BLOCK_SIZE, heads, size, dtype=dtype, device=self.device)
        store[:BLOCK_SIZE] = 0
        return store


def _cache_name(body: Any) -> str:
    """What a decoder calls its keys and values: transformers renames `past_key_values` to `cache`, model by model."""
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"


def _slots(blocks: Sequence[int], count: int) -> list[int]:
    """Where the first `count` tokens of a sequence with these blocks are."""
    return [block * BLOCK_SIZE + i for block in blocks[: blocks_for(count)] for i in range(BLOCK_SIZE)][:count]


def _replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` where `old` stands inside the model."""
    name = next(name for name, module in model.named_modules() if module is old)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


@torch.inference_mode()
def _kv_shapes(body: Any, device: torch.device) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(heads, head_dim) of keys and of values, per layer, seen by computing one token."""
    cache = DynamicCache()
    body(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=True, **{_cache_name(body): cache})
    return [tuple((kv.shape[1], kv.shape[3]) for kv in (layer.keys, layer.values)) for layer in cache.layers]  # type: ignore[misc]
