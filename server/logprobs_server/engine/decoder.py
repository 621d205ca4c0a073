"""The lean decoder: one description of the common decoder-only architectures, run by kernels of our own.

Filled from a model that transformers loaded; knows its module names, not transformers itself. What a family has
and another lacks (norm kind and place, rotary, ALiBi or learned positions, grouped heads, query and key norms, sliding
windows, gated or plain MLP, biases, parallel residual) is data here, so that there is one way through a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Architecture", "Layer", "architecture_of"]

_ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu_new": 1,
    "gelu_pytorch_tanh": 1,
    "gelu_fast": 1,
    "bloom": 1,
    "gelu": 2,
    "relu": 3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """LayerNorm if `centred`, RMSNorm else; weight and bias float32."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """weight [outputs, inputs] in the model's dtype; bias [outputs]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer. qkv gives queries, keys and values, heads in order; up gives gate, then up, if the MLP is gated."""

    input_norm: Norm
    qkv: Linear
    out: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    after_attention: Norm | None = None
    after_mlp: Norm | None = None
    rotation: Tensor | None = None
    window: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A whole decoder.

    rotation tables of layers: [positions, rotary dimensions], cosines in the first half, sines in the second.
    slopes: ALiBi, per head; None without. positions: learned position embeddings, the first row for position 0.
    """

    layers: Sequence[Layer] = field(repr=False)
    embedding: Tensor
    head: Linear
    final_norm: Norm
    query_heads: int
    key_heads: int
    head_size: int
    eps: float
    scale: float
    activation: int
    gated: bool
    centred: bool
    parallel: bool = False
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    positions: Tensor | None = None
    slopes: Tensor | None = None


def architecture_of(model: Any, context_length: int) -> Architecture | None:
    """Describes a model that transformers loaded; None if its family, or an option of it, is not known here."""
    describe = _FAMILIES.get(model.config.model_type)
    return None if describe is None else describe(model, context_length)


def _llama_like(model: Any, context_length: int) -> Architecture | None:
    """llama, mistral, qwen2, qwen3, phi3, gemma3: RMSNorm, rotary positions, gated MLP."""
    config, body = model.config, model.model
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
        return None  # its angles depend on the length of the sequence
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
        return None
    if getattr(config, "use_bidirectional_attention", False):
        return None
    gemma = config.model_type.startswith("gemma")
    attention = body.layers[0].self_attn
    tables = _Rotations(body, config, context_length)
    activation = _ACTIVATIONS.get(getattr(config, "hidden_activation", None) or config.hidden_act)
    if activation is None:
        return None

    def norm(module: Any) -> Norm:
        return Norm(weight=module.weight.float() + 1 if gemma else module.weight.float())

    def layer(module: Any) -> Layer:
        attend, mlp = module.self_attn, module.mlp
        return Layer(
            input_norm=norm(module.input_layernorm),
            qkv=_joined(attend, ("qkv_proj",) if hasattr(attend, "qkv_proj") else ("q_proj", "k_proj", "v_proj")),
            out=_linear(attend.o_proj),
            mlp_norm=norm(module.pre_feedforward_layernorm if gemma else module.post_attention_layernorm),
            up=_joined(mlp, ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")),
            down=_linear(mlp.down_proj),
            query_norm=norm(attend.q_norm) if hasattr(attend, "q_norm") else None,
            key_norm=norm(attend.k_norm) if hasattr(attend, "k_norm") else None,
            after_attention=norm(module.post_attention_layernorm) if gemma else None,
            after_mlp=norm(module.post_feedforward_layernorm) if gemma else None,
            rotation=tables.of(attend.layer_idx),
            window=_window(config, attend.layer_idx),
        )

    return Architecture(
        layers=[layer(module) for module in body.layers],
        embedding=body.embed_tokens.weight,
        head=_linear(model.lm_head),
        final_norm=norm(body.norm),
        query_heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_size=attention.head_dim,
        eps=config.rms_norm_eps,
        scale=attention.scaling,
        activation=activation,
        gated=True,
        centred=False,
        embedding_scale=float(body.embed_tokens.embed_scale.to(model.dtype)) if gemma else 1.0,
    )


def _gpt2(model: Any, context_length: int) -> Architecture | None:
    """Learned positions, LayerNorm, plain MLP; its weights are stored [inputs, outputs]."""
    config, body = model.config, model.transformer
    activation = _ACTIVATIONS.get(config.activation_function)
    if activation is None or config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        return None

    def turned(module: Any) -> Linear:
        return Linear(weight=module.weight.T, bias=module.bias.float())

    layers = [
        Layer(
            input_norm=_layer_norm(module.ln_1),
            qkv=turned(module.attn.c_attn),
            out=turned(module.attn.c_proj),
            mlp_norm=_layer_norm(module.ln_2),
            up=turned(module.mlp.c_fc),
            down=turned(module.mlp.c_proj),
        )
        for module in body.h
    ]
    head_size = config.hidden_size // config.num_attention_heads
    return Architecture(
        layers=layers,
        embedding=body.wte.weight,
        positions=body.wpe.weight,
        head=_linear(model.lm_head),
        final_norm=_layer_norm(body.ln_f),
        query_heads=config.num_attention_heads,
        key_heads=config.num_attention_heads,
        head_size=head_size,
        eps=config.layer_norm_epsilon,
        scale=head_size**-0.5,
        activation=activation,
        gated=False,
        centred=True,
    )


def _gpt_neox(model: Any, context_length: int) -> Architecture | None:
    """Rotary positions on part of each head, attention and MLP side by side; qkv is stored head by head."""
    config, body = model.config, model.gpt_neox
    activation = _ACTIVATIONS.get(config.hidden_act)
    if activation is None:
        return None
    tables = _Rotations(body, config, context_length)
    heads = config.num_attention_heads
    layers = [
        Layer(
            input_norm=_layer_norm(module.input_layernorm),
            qkv=_unwoven(module.attention.query_key_value, heads),
            out=_linear(module.attention.dense),
            mlp_norm=_layer_norm(module.post_attention_layernorm),
            up=_linear(module.mlp.dense_h_to_4h),
            down=_linear(module.mlp.dense_4h_to_h),
            rotation=tables.of(index),
        )
        for index, module in enumerate(body.layers)
    ]
    return Architecture(
        layers=layers,
        embedding=body.embed_in.weight,
        head=_linear(model.get_output_embeddings()),
        final_norm=_layer_norm(body.final_layer_norm),
        query_heads=heads,
        key_heads=heads,
        head_size=config.hidden_size // heads,
        eps=config.layer_norm_eps,
        scale=(config.hidden_size // heads) ** -0.5,
        activation=activation,
        gated=False,
        centred=True,
        parallel=config.use_parallel_residual,
    )


def _bloom(model: Any, context_length: int) -> Architecture | None:
    """ALiBi, a norm behind the embedding; qkv is stored head by head."""
    config, body = model.config, model.transformer
    if config.apply_residual_connection_post_layernorm:
        return None
    heads = config.n_head
    layers = [
        Layer(
            input_norm=_layer_norm(module.input_layernorm),
            qkv=_unwoven(module.self_attention.query_key_value, heads),
            out=_linear(module.self_attention.dense),
            mlp_norm=_layer_norm(module.post_attention_layernorm),
            up=_linear(module.mlp.dense_h_to_4h),
            down=_linear(module.mlp.dense_4h_to_h),
        )
        for module in body.h
    ]
    return Architecture(
        layers=layers,
        embedding=body.word_embeddings.weight,
        embedding_norm=_layer_norm(body.word_embeddings_layernorm),
        head=_linear(model.lm_head),
        final_norm=_layer_norm(body.ln_f),
        query_heads=heads,
        key_heads=heads,
        head_size=config.hidden_size // heads,
        eps=config.layer_norm_epsilon,
        scale=(config.hidden_size // heads) ** -0.5,
        activation=_ACTIVATIONS["bloom"],
        gated=False,
        centred=True,
        slopes=_slopes(heads),
    )


_FAMILIES: dict[str, Callable[[Any, int], Architecture | None]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "phi3": _llama_like,
    "gemma3_text": _llama_like,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
}


class _Rotations:
    """Rotation tables, one per kind of layer, from the model's own rotary module."""

    def __init__(self, body: Any, config: Any, context_length: int) -> None:
        self._body = body
        self._kinds = getattr(config, "layer_types", None) if config.model_type.startswith("gemma") else None
        self._positions = torch.arange(context_length).unsqueeze(0)
        self._tables: dict[str | None, Tensor] = {}

    def of(self, index: int) -> Tensor:
        """The table of a layer: [positions, rotary dimensions] float32."""
        kind = self._kinds[index] if self._kinds else None
        if kind not in self._tables:
            arguments = () if kind is None else (kind,)
            cosine, sine = self._body.rotary_emb(torch.zeros(1), self._positions, *arguments)
            half = cosine.shape[-1] // 2
            self._tables[kind] = torch.cat([cosine[0, :, :half], sine[0, :, :half]], dim=-1).contiguous()
        return self._tables[kind]


def _window(config: Any, index: int) -> int:
    """Keys that a layer's queries see, 0 for all of them."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return 0
    return getattr(config, "sliding_window", None) or 0


def _linear(module: Any) -> Linear:
    return Linear(weight=module.weight, bias=None if module.bias is None else module.bias.float())


def _joined(owner: Any, names: Sequence[str]) -> Linear:
    """Several linear layers of one input as one, of which the model's own weights become parts: none is held twice."""
    parts = [getattr(owner, name) for name in names]
    biases = [part.bias for part in parts]
    weight = torch.cat([part.weight.detach() for part in parts])
    for part, rows in zip(parts, torch.split(weight, [len(part.weight) for part in parts]), strict=True):
        part.weight = nn.Parameter(rows, requires_grad=False)
    return Linear(
        weight=weight,
        bias=None if biases[0] is None else torch.cat(biases).float(),
    )


def _unwoven(module: Any, heads: int) -> Linear:
    """A product stored as (query, key, value) for each head, turned into queries, keys, values."""

    def turned(stored: Tensor) -> Tensor:
        by_head = stored.view(heads, 3, stored.shape[0] // (3 * heads), *stored.shape[1:])
        return by_head.transpose(0, 1).flatten(0, 2)

    return Linear(weight=turned(module.weight), bias=None if module.bias is None else turned(module.bias).float())


def _layer_norm(module: nn.LayerNorm) -> Norm:
    return Norm(weight=module.weight.float(), bias=None if module.bias is None else module.bias.float())


def _slopes(heads: int) -> Tensor:
    """ALiBi's slopes (arXiv:2108.12409): powers of 2^(-8/n) for n = 2^k heads, and every other finer one."""
    power = 1 << (heads.bit_length() - 1)
    exponents = [8 * (i + 1) / power for i in range(power)]
    exponents += [4 * (2 * i + 1) / power for i in range(heads - power)]
    return torch.tensor([2.0**-exponent for exponent in exponents])
