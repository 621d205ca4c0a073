"""The lean path: runs an `Architecture` with the CPU's kernels, keys and values in blocks. Implements `Model`.

A step is one pass over all its rows, whoever they belong to. Between the embedding and the logits everything happens in
the kernels; a row's bits depend on that row and what precedes it in its sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.decoder import Architecture, Layer, Linear, Norm
from logprobs_server.engine.kv_cache import BLOCK_SIZE, blocks_for
from logprobs_server.engine.types import ModelDescription

__all__ = ["LeanModel", "packed_decoder"]

_COLUMNS, _LANES = 32, 16
"""Outputs of a block of packed weights, and those of a gate that stand beside as many of its partner."""
_AHEAD = 16
"""Blocks behind a sequence's own tokens whose memory is used for the first time before they are needed."""
_TILES_PACE = 3
"""Where products run on AMX tiles, a prompt's token takes a third of what a decoded one does."""


class LeanModel:
    """A decoder with packed weights. Hidden states are float32, before the final norm."""

    def __init__(
        self, architecture: Architecture, description: ModelDescription, *, dtype: torch.dtype, num_blocks: int
    ) -> None:
        self.description = replace(description, batch_invariant=True)
        self.device = torch.device("cpu")
        self.num_blocks = num_blocks
        self.own_threads = True
        self.prompt_pace: int | None = _TILES_PACE if dtype == torch.bfloat16 and torch.ops.logprobs.on_tiles() else 1
        # [blocks, layers, heads, cells]. Untouched memory costs nothing; a block's first token clears it.
        cells = _cells(architecture.head_size, dtype)
        kept = (num_blocks, len(architecture.layers), architecture.key_heads, cells)
        self._cache = torch.ops.logprobs.huge_pages(kept, torch.float32 if dtype == torch.float32 else torch.int32)
        self._decoder = packed_decoder(architecture, dtype, self._cache)
        self._logits = self._buffer = torch.empty(0)
        self._touched: set[int] = set()

    @staticmethod
    def block_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
        """Bytes that a block's keys and values take in all layers of a model of this dtype."""
        return 4 * len(architecture.layers) * architecture.key_heads * _cells(architecture.head_size, dtype)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes the chunks and stores their keys and values; returns hidden states [tokens of all, hidden]."""
        self._touch(chunks)
        token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
        counts = [len(chunk.token_ids) for chunk in chunks]
        width = max((chunk.start + len(chunk.token_ids) - 1) // BLOCK_SIZE + 1 for chunk in chunks)
        blocks = [block for c in chunks for block in (*c.blocks[:width], *[0] * (width - len(c.blocks)))]
        hidden: Tensor = self._decoder.forward(token_ids, [chunk.start for chunk in chunks], counts, blocks)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] float32 that follow hidden states [rows, hidden]; good until the next call."""
        rows, vocab = hidden.shape[0], self.description.vocabulary_size
        if self._logits.shape[0] != rows:
            if self._buffer.numel() < rows * vocab:
                self._buffer = torch.ops.logprobs.huge_pages([rows * vocab], torch.float32)
            self._logits = self._buffer[: rows * vocab].view(rows, vocab)
        self._decoder.logits(hidden.contiguous(), self._logits)
        return self._logits

    def _touch(self, chunks: Sequence[Chunk]) -> None:
        """Uses the memory of the blocks that sequences go on in once they start, and keeps what it holds. Pages of
        2 MiB would hold up steps later, one by one: by 4.4 ms where a host gives a virtual machine memory only then."""
        fresh = {block for chunk in chunks for block in _next_blocks(chunk)} - self._touched
        if fresh:
            with torch.inference_mode():
                self._cache[list(fresh), :, 0, 0] += 0
            self._touched |= fresh

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies keys and values of blocks, (from, to)."""
        for source, target in pairs:
            self._cache[target].copy_(self._cache[source])


def _next_blocks(chunk: Chunk) -> Sequence[int]:
    """The blocks that a chunk's tokens are kept in, and some that follow."""
    end = blocks_for(chunk.start + len(chunk.token_ids))
    return chunk.blocks[chunk.start // BLOCK_SIZE : end + _AHEAD]


def packed_decoder(whole: Architecture, dtype: torch.dtype, cache: Tensor) -> Any:
    """The kernels' decoder, its arguments in the order of cpu.cpp; all packed weights lie in one piece of memory."""
    layers = [
        [layer.qkv, layer.out, _side_by_side(layer.up) if whole.gated else layer.up, layer.down]
        for layer in whole.layers
    ]
    linears = [linear for layer in layers for linear in layer] + [whole.head]
    sizes = [-(-linear.weight.shape[0] // _COLUMNS) * _COLUMNS * linear.weight.shape[1] for linear in linears]
    packed = torch.ops.logprobs.huge_pages([sum(sizes)], dtype).split(sizes)
    for linear, place in zip(linears, packed, strict=True):
        torch.ops.logprobs.pack(linear.weight.to(dtype), place)
    weights = iter(zip(packed, (linear.bias for linear in linears), strict=True))
    parts = [part for layer in whole.layers for part in _parts(layer, weights)]
    inner, vocab = whole.layers[0].down.weight.shape[1], whole.head.weight.shape[0]
    flags = [int(whole.gated), int(whole.centred), int(whole.parallel)]
    numbers = [whole.embedding.shape[1], inner, vocab, whole.activation, *flags]
    numbers += [whole.query_heads, whole.key_heads, whole.head_size]
    scalars = [whole.eps, whole.scale, whole.embedding_scale]
    windows = [layer.window for layer in whole.layers]
    return torch.classes.logprobs.Decoder(
        parts, [*_ends(whole, dtype), *next(weights)], numbers, scalars, windows, cache
    )


def _parts(layer: Layer, weights: Iterator[tuple[Tensor, Tensor | None]]) -> list[Tensor | None]:
    """One layer's tensors in the order of `Place` in cpu.cpp; takes its four packed weights and their biases."""
    return [
        layer.input_norm.weight,
        layer.input_norm.bias,
        *next(weights),
        _weight(layer.query_norm),
        _weight(layer.key_norm),
        *next(weights),
        _weight(layer.after_attention),
        layer.mlp_norm.weight,
        layer.mlp_norm.bias,
        *next(weights),
        *next(weights),
        _weight(layer.after_mlp),
        layer.rotation,
    ]


def _ends(whole: Architecture, dtype: torch.dtype) -> list[Tensor | None]:
    """The tensors outside the layers in the order of `End` in cpu.cpp, but for the head."""
    norm = whole.embedding_norm
    return [
        whole.final_norm.weight,
        whole.final_norm.bias,
        whole.embedding.to(dtype),
        None if whole.positions is None else whole.positions.to(dtype),
        _weight(norm),
        None if norm is None else norm.bias,
        whole.slopes,
    ]


def _weight(norm: Norm | None) -> Tensor | None:
    return None if norm is None else norm.weight


def _side_by_side(linear: Linear) -> Linear:
    """A gate and its partner, stacked, in turns of 16 rows: one block of outputs then holds what belongs together."""

    def turned(stored: Tensor) -> Tensor:
        both = stored.view(2, stored.shape[0] // 2, *stored.shape[1:])
        padding = [0, 0] * (stored.dim() - 1) + [0, -both.shape[1] % _LANES]
        padded = functional.pad(both, padding)
        return padded.view(2, -1, _LANES, *stored.shape[1:]).transpose(0, 1).flatten(0, 2)

    return Linear(weight=turned(linear.weight), bias=None if linear.bias is None else turned(linear.bias))


def _cells(size: int, dtype: torch.dtype) -> int:
    """Cells of 4 bytes that one head's part of a block takes: see `Block` in attention.h."""
    if dtype == torch.float32:
        return 2 * BLOCK_SIZE * size
    return BLOCK_SIZE * -(-size // 2) + BLOCK_SIZE // 2 * size + 2 * BLOCK_SIZE
