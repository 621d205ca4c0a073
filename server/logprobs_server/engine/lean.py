"""The lean path: runs an `Architecture` with the CPU's kernels, keys and values in blocks. Implements `Model`.

A step is one pass over all its rows, whoever they belong to. Between the embedding and the head everything happens in
the kernels; a row's bits depend on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.decoder import Architecture, Layer, Linear
from logprobs_server.engine.kv_cache import BLOCK_SIZE
from logprobs_server.engine.types import ModelDescription

__all__ = ["LeanModel"]

ROTATION, SLOPES, WINDOW = 16, 17, 4
"""Places in a packed layer's `parts` and `numbers`, see `Part` and `Number` in kernels/cpu.cpp."""


class LeanModel:
    """A decoder with packed weights. Hidden states are float32, before the final norm."""

    def __init__(
        self, architecture: Architecture, description: ModelDescription, *, dtype: torch.dtype, num_blocks: int
    ) -> None:
        self.description = description
        self.device = torch.device("cpu")
        self.num_blocks = num_blocks
        # What is packed below is not kept a second time.
        self._architecture = replace(architecture, layers=(), head=replace(architecture.head, weight=torch.empty(0)))
        self._dtype = dtype
        self._layers = [_PackedLayer(architecture, layer, dtype, num_blocks) for layer in architecture.layers]
        self._head = torch.ops.logprobs.pack(architecture.head.weight.to(dtype))
        self._buffer = torch.empty(0)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes the chunks and stores their keys and values; returns hidden states [tokens of all, hidden]."""
        token_ids = torch.tensor([token_id for chunk in chunks for token_id in chunk.token_ids])
        positions = torch.tensor([p for c in chunks for p in range(c.start, c.start + len(c.token_ids))])
        first = torch.tensor([0, *accumulate(len(chunk.token_ids) for chunk in chunks)])
        width = max((chunk.start + len(chunk.token_ids) - 1) // BLOCK_SIZE + 1 for chunk in chunks)
        tables = torch.tensor([[*c.blocks[:width], *[0] * (width - len(c.blocks))] for c in chunks])
        residual = self._embedded(token_ids, positions)
        architecture = self._architecture
        for layer in self._layers:
            torch.ops.logprobs.decoder_layer(
                residual,
                positions,
                first,
                tables,
                layer.parts,
                layer.numbers,
                architecture.eps,
                architecture.scale,
                layer.keys,
                layer.values,
            )
        return residual

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] float32 that follow hidden states [rows, hidden]; good until the next call."""
        rows, vocab = hidden.shape[0], self.description.vocabulary_size
        normed = torch.empty(hidden.shape, dtype=self._dtype)
        norm = self._architecture.final_norm
        eps, centred = self._architecture.eps, self._architecture.centred
        torch.ops.logprobs.final_norm(hidden.contiguous(), norm.weight, norm.bias, eps, centred, normed)
        if self._buffer.numel() < rows * vocab:
            self._buffer = torch.empty(rows * vocab)
        logits = self._buffer[: rows * vocab].view(rows, vocab)
        torch.ops.logprobs.head(normed, self._head, self._architecture.head.bias, logits)
        return logits

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies keys and values of blocks, (from, to)."""
        for layer in self._layers:
            for store in (layer.keys, layer.values):
                for source, target in pairs:
                    store[target].copy_(store[source])

    def _embedded(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """The rows that enter the first layer, [tokens, hidden] float32."""
        architecture = self._architecture
        rows = functional.embedding(token_ids, architecture.embedding).float()
        if architecture.embedding_scale != 1:
            rows *= architecture.embedding_scale
        if architecture.positions is not None:
            rows += functional.embedding(positions, architecture.positions).float()
        if architecture.embedding_norm is not None:
            norm, given = architecture.embedding_norm, rows
            rows = torch.empty_like(given)
            torch.ops.logprobs.final_norm(given, norm.weight, norm.bias, architecture.eps, architecture.centred, rows)
        return rows


class _PackedLayer:
    """One layer as the kernel wants it: its tensors and whole numbers in the order of cpu.cpp, and its cache."""

    def __init__(self, whole: Architecture, layer: Layer, dtype: torch.dtype, num_blocks: int) -> None:
        def packed(linear: Linear) -> tuple[Tensor, Tensor | None]:
            return torch.ops.logprobs.pack(linear.weight.to(dtype)), linear.bias

        self.parts: list[Tensor | None] = [
            layer.input_norm.weight,
            layer.input_norm.bias,
            *packed(layer.qkv),
            layer.query_norm.weight if layer.query_norm else None,
            layer.key_norm.weight if layer.key_norm else None,
            *packed(layer.out),
            layer.after_attention.weight if layer.after_attention else None,
            layer.mlp_norm.weight,
            layer.mlp_norm.bias,
            *packed(layer.up),
            *packed(layer.down),
            layer.after_mlp.weight if layer.after_mlp else None,
            layer.rotation,
            whole.slopes,
        ]
        self.numbers = [
            whole.query_heads,
            whole.key_heads,
            whole.head_size,
            0 if layer.rotation is None else layer.rotation.shape[-1],
            layer.window,
            whole.activation,
            int(whole.gated),
            int(whole.centred),
            int(whole.parallel),
            layer.down.weight.shape[-1],
        ]
        # Untouched memory costs nothing; the kernel clears a block when its first token comes.
        self.keys = torch.empty(num_blocks, whole.key_heads, whole.head_size, BLOCK_SIZE, dtype=dtype)
        self.values = torch.empty(num_blocks, whole.key_heads, BLOCK_SIZE, whole.head_size, dtype=dtype)
