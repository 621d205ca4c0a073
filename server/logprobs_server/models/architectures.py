"""Architectures of GGUF files: names and order of their tensors, and their configuration, as transformers has them.

An architecture that is not stated here exactly is refused by name. Knows nothing of tokenizers but special ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from logprobs_server.models.gguf_file import GgufFile

__all__ = ["Architecture", "architecture_of"]

_LAYER = {
    "attn_norm.weight": ("input_layernorm.weight", "hidden"),
    "attn_q.weight": ("self_attn.q_proj.weight", "queries hidden"),
    "attn_k.weight": ("self_attn.k_proj.weight", "keys hidden"),
    "attn_v.weight": ("self_attn.v_proj.weight", "keys hidden"),
    "attn_output.weight": ("self_attn.o_proj.weight", "hidden queries"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "hidden"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "inner hidden"),
    "ffn_up.weight": ("mlp.up_proj.weight", "inner hidden"),
    "ffn_down.weight": ("mlp.down_proj.weight", "hidden inner"),
}
_BIASES = {
    "attn_q.bias": ("self_attn.q_proj.bias", "queries"),
    "attn_k.bias": ("self_attn.k_proj.bias", "keys"),
    "attn_v.bias": ("self_attn.v_proj.bias", "keys"),
}
_NORMS = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "head"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "head"),
}
"""GGUF's names of a layer's tensors, with transformers' names and the shape, sizes by name."""
_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What sets one architecture apart: tensors that each layer has besides the common ones, and their order.

    pairs_interleaved: query and key rows that rotate together are neighbours; transformers has them half a head apart.
    """

    class_name: str
    layer: dict[str, tuple[str, str]] = field(default_factory=dict)
    pairs_interleaved: bool = False


_FAMILIES = {
    "llama": _Family(class_name="LlamaForCausalLM", pairs_interleaved=True),
    "qwen2": _Family(class_name="Qwen2ForCausalLM", layer=_BIASES),
    "qwen3": _Family(class_name="Qwen3ForCausalLM", layer=_NORMS),
}


def architecture_of(file: GgufFile, vocabulary_size: int) -> Architecture:
    """The file's architecture.

    Args:
        vocabulary_size: tokens that the tokenizer has.
    Raises:
        ModelNotUsableError: it is not supported, or the file's tensors are not exactly those that it has.
    """
    name = file.get("general.architecture", str)
    if name not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise file.refused(f"architecture {name!r} is not supported as a GGUF file, only {known}; use its own folder")
    return Architecture(file, name, vocabulary_size)


class Architecture:
    """One file's architecture; see `architecture_of`."""

    def __init__(self, file: GgufFile, name: str, vocabulary_size: int) -> None:
        self._file = file
        self._name = name
        self._family = _FAMILIES[name]
        hidden, heads = self._int("embedding_length"), self._int("attention.head_count")
        self._heads = {"q": heads, "k": self._int("attention.head_count_kv", heads)}
        self._head_dim = self._int("attention.key_length", hidden // heads)
        self._sizes = {
            "hidden": hidden,
            "inner": self._int("feed_forward_length"),
            "head": self._head_dim,
            "queries": self._heads["q"] * self._head_dim,
            "keys": self._heads["k"] * self._head_dim,
            "pairs": self._head_dim // 2,
            "vocabulary": vocabulary_size,
        }
        self.tensors: dict[str, str] = {}
        """The file's names of tensors, and transformers' names."""
        for ours, theirs, shape in self._tensors():
            self._check_shape(ours, shape)
            self.tensors[ours] = theirs
        self._check()

    def row_order(self, name: str) -> NDArray[np.int64] | None:
        """The order that transformers has the tensor's rows in, as indices of the file's; None if it is the same."""
        part = name.rpartition(".attn_")[2].removesuffix(".weight")
        if not self._family.pairs_interleaved or part not in self._heads:
            return None
        rows = np.arange(self._heads[part] * self._head_dim)
        return rows.reshape(-1, self._head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

    def config(self, eos_token_ids: list[int]) -> dict[str, object]:
        """The configuration, as config.json has it."""
        return {
            "architectures": [self._family.class_name],
            "model_type": self._name,
            "dtype": "float32",
            "vocab_size": self._sizes["vocabulary"],
            "hidden_size": self._sizes["hidden"],
            "intermediate_size": self._sizes["inner"],
            "num_hidden_layers": self._int("block_count"),
            "num_attention_heads": self._heads["q"],
            "num_key_value_heads": self._heads["k"],
            "head_dim": self._head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": self._file.get(f"{self._name}.attention.layer_norm_rms_epsilon", float),
            "rope_parameters": self._rope(),
            "tie_word_embeddings": _HEAD not in self.tensors,
            "bos_token_id": self._file.id_of("tokenizer.ggml.bos_token_id"),
            "eos_token_id": eos_token_ids,
            "pad_token_id": self._file.id_of("tokenizer.ggml.padding_token_id"),
        }

    @property
    def context_length(self) -> int:
        """Positions that the model was made for."""
        return self._int("context_length")

    def _int(self, key: str, default: int | None = None) -> int:
        value = self._file.get(f"{self._name}.{key}", int, default)
        if value < 1:
            raise self._file.refused(f"{self._name}.{key} is {value}, less than 1")
        return value

    def _tensors(self) -> Iterator[tuple[str, str, str]]:
        """Names of the architecture's tensors, the file's and transformers', and their shapes."""
        yield _EMBEDDING, "model.embed_tokens.weight", "vocabulary hidden"
        for layer in range(self._int("block_count")):
            for ours, (theirs, shape) in (_LAYER | self._family.layer).items():
                yield f"blk.{layer}.{ours}", f"model.layers.{layer}.{theirs}", shape
        yield "output_norm.weight", "model.norm.weight", "hidden"
        if _HEAD in self._file.tensor_names:
            yield _HEAD, "lm_head.weight", "vocabulary hidden"

    def _check_shape(self, name: str, shape: str) -> None:
        if name not in self._file.tensor_names:
            raise self._file.refused(f"tensor {name} of architecture {self._name!r} is missing")
        wanted = tuple(self._sizes[size] for size in shape.split())
        if self._file.shape(name) != wanted:
            raise self._file.refused(
                f"tensor {name} has the shape {self._file.shape(name)}, not {wanted} ({shape.replace(' ', ', ')})"
            )

    def _check(self) -> None:
        """Refuses what the configuration could not say."""
        unknown = self._file.tensor_names - self.tensors.keys() - {_ROPE_FACTORS}
        if unknown:
            raise self._file.refused(f"tensor {min(unknown)} is no part of architecture {self._name!r}")
        rotated = self._int("rope.dimension_count", self._head_dim)
        if rotated != self._head_dim:
            raise self._file.refused(f"only {rotated} of a head's {self._head_dim} dimensions rotate: not supported")
        if self._head_dim % 2:
            raise self._file.refused(f"a head has {self._head_dim} dimensions, which make no pairs to rotate")

    def _rope(self) -> dict[str, object]:
        """How positions rotate. Factors of single frequencies, as Llama 3.1 has them, are said as LongRoPE's."""
        theta = self._file.get(f"{self._name}.rope.freq_base", float, 10000.0)
        scaling = self._file.get(f"{self._name}.rope.scaling.type", str, "none")
        factors = _ROPE_FACTORS in self._file.tensor_names
        if scaling == "linear" and not factors:
            factor = self._file.get(f"{self._name}.rope.scaling.factor", float)
            return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        if scaling != "none":
            raise self._file.refused(f"positions scaled by {scaling!r} are not supported")
        if not factors:
            return {"rope_type": "default", "rope_theta": theta}
        self._check_shape(_ROPE_FACTORS, "pairs")
        values = np.concatenate([*self._file.values(_ROPE_FACTORS)], axis=None).tolist()
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "factor": 1.0,
            "short_factor": values,
            "long_factor": values,
            "attention_factor": 1.0,
            "original_max_position_embeddings": self.context_length,
        }
