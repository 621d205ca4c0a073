"""The device path: runs an `Architecture` with torch's own operations on any device. Implements `Model`.

Meant for CUDA: static shapes, CUDA graphs of steps, and no operation that makes the host wait. The residual stream,
norms, rotations, activations and logits are float32; products take the model's dtype and accumulate in float32.

Designed so that a row's bits do not depend on the other rows: products run in tiles of one fixed number of rows, for
prompts as for decoding, so that cuBLAS always picks the same kernel, and in wide tiles only where those were seen to
give the same bits; attention goes through keys in pieces that lie at fixed positions. That torch keeps to it is for the
tests marked `gpu` to show on the machine at hand; the description does not promise it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.decoder import Architecture, Layer, Linear, Norm
from logprobs_server.engine.device_batch import WIDE, Batch, Padding, Shape, batch_of, numbers_of, shape_of
from logprobs_server.engine.graphs import StepGraphs
from logprobs_server.engine.kv_cache import BLOCK_SIZE, blocks_for
from logprobs_server.engine.paged_attention import Heads, View, attend, view_of
from logprobs_server.engine.transfer import sent
from logprobs_server.engine.types import ModelDescription

__all__ = ["DeviceModel"]

_TILE = 128
"""Rows of a product: as many as decode at most in the time of reading the weights. On an NVIDIA H100 decoding steps of
an 8B model in bfloat16 take a fifth longer with twice as many."""
_ACTIVATIONS = (
    functional.silu,
    lambda x: functional.gelu(x, approximate="tanh"),
    functional.gelu,
    functional.relu,
)
"""By number, as in `Architecture.activation`."""
_T = TypeVar("_T")


class DeviceModel:
    """A decoder on one device. Hidden states are float32, before the final norm.

    Keys and values, heads of the former before those of the latter, are in blocks, with one block more than is handed
    out, where rows of padding store theirs; block 0 stays zero.
    """

    def __init__(
        self,
        architecture: Architecture,
        description: ModelDescription,
        *,
        dtype: torch.dtype,
        num_blocks: int,
        device: torch.device,
        tile: int = _TILE,
    ) -> None:
        self.description = description
        self.device = device
        self.num_blocks = num_blocks
        self.own_threads = False
        self.prompt_pace: int | None = None
        self._whole = whole = _moved(architecture, device, {})
        self._dtype = dtype
        self._padding = Padding(tile=tile, slot=num_blocks * BLOCK_SIZE)
        self._heads = Heads(
            query=whole.query_heads,
            key=whole.key_heads,
            size=whole.head_size,
            scale=whole.scale,
            slopes=whole.slopes,
        )
        kept = _kept_dtype(dtype)
        # ALiBi's distances need more digits than half precision has.
        self._attention_dtype = kept if whole.slopes is None else torch.float32
        shape = (len(whole.layers), num_blocks + 1, BLOCK_SIZE, 2 * whole.key_heads, whole.head_size)
        self._cache = torch.zeros(shape, dtype=kept, device=device)
        if device.type == "cuda":
            _compute_exactly()
        self._widens = _widens(dtype, device)
        self._wide = self._same_when_wide()
        self._graphs = StepGraphs(self._run, device) if device.type == "cuda" else None

    @staticmethod
    def block_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
        """Bytes that a block's keys and values take in all layers of a model of this dtype."""
        numbers = 2 * BLOCK_SIZE * len(architecture.layers) * architecture.key_heads * architecture.head_size
        return numbers * _kept_dtype(dtype).itemsize

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes the chunks and stores their keys and values; returns hidden states [tokens of all, hidden]."""
        self._clear(chunks)
        count = sum(len(chunk.token_ids) for chunk in chunks)
        shape = shape_of(chunks, self._padding)
        numbers = numbers_of(chunks, shape, self._padding)
        if self._graphs is not None:
            return self._graphs.replay(numbers, shape)[:count]
        return self._run(sent(numbers, self.device), shape)[:count]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] float32 that follow hidden states [rows, hidden]."""
        rows = hidden.shape[0]
        padded = functional.pad(hidden, (0, 0, 0, self._padding.rows(rows) - rows))
        return self._product(self._norm(padded, self._whole.final_norm).to(self._dtype), self._whole.head)[:rows]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies keys and values of blocks, (from, to)."""
        sources, targets = sent(pairs, self.device).T
        self._cache[:, targets] = self._cache[:, sources]

    def _clear(self, chunks: Sequence[Chunk]) -> None:
        """Zeroes the blocks that chunks begin: what was left there must not reach sums, not even times 0."""
        begun = [
            block
            for chunk in chunks
            for block in chunk.blocks[blocks_for(chunk.start) : blocks_for(chunk.start + len(chunk.token_ids))]
        ]
        if begun:
            self._cache.index_fill_(1, sent(begun, self.device), 0)

    def _run(self, numbers: Tensor, shape: Shape) -> Tensor:
        """Runs a batch whose numbers are on the device; returns [rows, hidden] float32."""
        batch = batch_of(numbers, shape)
        windows = {layer.window for layer in self._whole.layers}
        views = {
            window: [view_of(group, window, self._heads, self._attention_dtype) for group in batch.groups]
            for window in windows
        }
        tables = {id(layer.rotation): layer.rotation for layer in self._whole.layers}
        turns = {key: None if table is None else _turn(table, batch.positions) for key, table in tables.items()}
        residual = self._embedded(batch)
        with _one_attention_kernel(self.device):
            for layer, cache in zip(self._whole.layers, self._cache, strict=True):
                residual = self._layer(layer, residual, batch, cache, turns[id(layer.rotation)], views[layer.window])
        return residual

    def _embedded(self, batch: Batch) -> Tensor:
        """The rows that enter the first layer, [rows, hidden] float32."""
        whole = self._whole
        rows = functional.embedding(batch.token_ids, whole.embedding).float() * whole.embedding_scale
        if whole.positions is not None:
            rows += functional.embedding(batch.positions, whole.positions)
        return rows if whole.embedding_norm is None else self._norm(rows, whole.embedding_norm)

    def _layer(
        self,
        layer: Layer,
        residual: Tensor,
        batch: Batch,
        cache: Tensor,
        turn: _Turn | None,
        views: Sequence[View],
    ) -> Tensor:
        """One layer: residual stream in and out, [rows, hidden] float32. cache: [blocks, …], its keys and values."""
        attended = self._attention(layer, residual, batch, cache, turn, views)
        if self._whole.parallel:
            return residual + attended + self._mlp(layer, residual)
        residual = residual + attended
        return residual + self._mlp(layer, residual)

    def _attention(
        self,
        layer: Layer,
        residual: Tensor,
        batch: Batch,
        cache: Tensor,
        turn: _Turn | None,
        views: Sequence[View],
    ) -> Tensor:
        """What attention adds to the residual stream; the rows' keys and values are stored on the way."""
        heads = self._heads
        qkv = self._product(self._norm(residual, layer.input_norm).to(self._dtype), layer.qkv)
        by_head = qkv.view(len(qkv), -1, heads.size)
        if layer.query_norm is not None:
            assert layer.key_norm is not None  # no family has one alone
            asking, keys, values = torch.split(by_head, [heads.query, heads.key, heads.key], dim=1)
            normed = self._head_norm(asking, layer.query_norm), self._head_norm(keys, layer.key_norm)
            by_head = torch.cat([*normed, values], dim=1)
        if turn is not None:
            _rotate(by_head[:, : heads.query + heads.key], turn)
        cache.view(-1, 2 * heads.key, heads.size).index_copy_(0, batch.slots, by_head[:, heads.query :].to(cache.dtype))
        asking = by_head[:, : heads.query].to(self._attention_dtype)
        mixed = [
            attend(asking[group.rows], cache, view, heads, self._dtype)
            for group, view in zip(batch.groups, views, strict=True)
        ]
        together = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        added = self._product(together.index_select(0, batch.order), layer.out)
        return added if layer.after_attention is None else self._norm(added, layer.after_attention)

    def _mlp(self, layer: Layer, residual: Tensor) -> Tensor:
        """What the MLP adds to the residual stream."""
        raised = self._product(self._norm(residual, layer.mlp_norm).to(self._dtype), layer.up)
        activation = _ACTIVATIONS[self._whole.activation]
        if self._whole.gated:
            gate, up = raised.chunk(2, dim=-1)
            active = torch.mul(activation(gate), up, out=torch.empty_like(up, dtype=self._dtype))
        else:
            active = activation(raised).to(self._dtype)
        added = self._product(active, layer.down)
        return added if layer.after_mlp is None else self._norm(added, layer.after_mlp)

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        if self._whole.centred:
            return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, self._whole.eps)
        return functional.rms_norm(x, x.shape[-1:], norm.weight, self._whole.eps)

    def _head_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], norm.weight, self._whole.eps)

    def _product(self, x: Tensor, linear: Linear) -> Tensor:
        """x [rows, inputs] in the model's dtype; returns [rows, outputs] float32, unrounded where torch can."""
        tile = self._padding.tile
        wide = len(x) % (WIDE * tile) == 0 and linear.weight.shape in self._wide
        out = self._multiplied(x, linear.weight, WIDE * tile if wide else tile)
        return out if linear.bias is None else out.add_(linear.bias)

    def _multiplied(self, x: Tensor, weight: Tensor, tile: int) -> Tensor:
        """x [rows, inputs], so many rows at once, times weight [outputs, inputs] transposed; float32."""
        out = torch.empty(len(x), len(weight), dtype=torch.float32, device=x.device)
        for given, target in zip(torch.split(x, tile), torch.split(out, tile), strict=True):
            if self._widens:
                torch.mm(given, weight.t(), out_dtype=torch.float32, out=target)
            else:
                target.copy_(torch.mm(given, weight.t()))
        return out

    def _same_when_wide(self) -> set[torch.Size]:
        """Shapes of weights whose products give the same bits in wide tiles: those that add in the same order."""
        layers = self._whole.layers
        linears = [self._whole.head, *(linear for x in layers for linear in (x.qkv, x.out, x.up, x.down))]
        weights = {linear.weight.shape: linear.weight for linear in linears}
        tile, generator = self._padding.tile, torch.Generator(self.device).manual_seed(0)
        same = set()
        for shape, weight in weights.items():
            rows = torch.randn(WIDE * tile, shape[1], generator=generator, device=self.device).to(self._dtype)
            if torch.equal(self._multiplied(rows, weight, tile), self._multiplied(rows, weight, WIDE * tile)):
                same.add(shape)
        return same


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """What rotates rows: factors of each dimension and of the one that it is paired with, [rows, 1, dimensions]."""

    own: Tensor
    other: Tensor


def _turn(table: Tensor, positions: Tensor) -> _Turn:
    """table: [positions, dimensions], cosines, then sines."""
    cosine, sine = table[positions].unsqueeze(1).chunk(2, dim=-1)
    return _Turn(own=torch.cat([cosine, cosine], dim=-1), other=torch.cat([-sine, sine], dim=-1))


def _rotate(x: Tensor, turn: _Turn) -> None:
    """Rotates the first dimensions of x [rows, heads, size] in place."""
    turned = x[..., : turn.own.shape[-1]]
    first, second = turned.chunk(2, dim=-1)
    paired = torch.cat([second, first], dim=-1)
    turned.mul_(turn.own).addcmul_(paired, turn.other)


def _moved(value: _T, device: torch.device, seen: dict[int, Tensor]) -> _T:
    """An architecture, or a part of it, with its tensors on the device; what was shared stays shared."""
    found: Any = value
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.detach().to(device)
        found = seen[id(value)]
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        found = replace(value, **{name: _moved(part, device, seen) for name, part in parts.items()})
    elif isinstance(value, list):
        found = [_moved(part, device, seen) for part in value]
    return found  # type: ignore[no-any-return]


def _compute_exactly() -> None:
    """No TensorFloat-32 in place of float32, no sums in half precision; for the whole process."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has products of this dtype with float32 results on the device (2.8 and later, CUDA)."""
    if dtype == torch.float32:
        return False
    one = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(one, one, out_dtype=torch.float32, out=one.float())
    except (RuntimeError, TypeError):  # the device has none, or this torch does not know the argument
        return False
    return True


@contextmanager
def _one_attention_kernel(device: torch.device) -> Iterator[None]:
    """On CUDA no other kernel than the memory-efficient one, or plain operations on GPUs that lack it."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a model of this dtype keeps keys and values as: float16 is as small as bfloat16 and eight times finer."""
    return torch.float32 if dtype == torch.float32 else torch.float16
