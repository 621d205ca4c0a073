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
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_BIASES = {f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}
_NORMS = {f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"}
_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What sets one architecture apart: tensors that each layer has besides the common ones, and their order.

    pairs_interleaved: query and key rows that rotate together are neighbours; transformers has them half a head apart.
    """

    class_name: str
    layer: dict[str, str] = field(default_factory=dict)
    pairs_interleaved: bool = False


_FAMILIES = {
    "llama": _Family(class_name="LlamaForCausalLM", pairs_interleaved=True),
    "qwen2": _Family(class_name="Qwen2ForCausalLM", layer=_BIASES),
    "qwen3": _Family(class_name="Qwen3ForCausalLM", layer=_NORMS),
}


def architecture_of(file: GgufFile) -> Architecture:
    """The file's architecture.

    Raises:
        ModelNotUsableError: it is not supported, or the file's tensors are not exactly those that it has.
    """
    name = file.get("general.architecture", str)
    if name not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise file.refused(f"architecture {name!r} is not supported as a GGUF file, only {known}; use its own folder")
    return Architecture(file, name)


class Architecture:
    """One file's architecture; see `architecture_of`."""

    def __init__(self, file: GgufFile, name: str) -> None:
        self._file = file
        self._name = name
        self._family = _FAMILIES[name]
        hidden, heads = self._int("embedding_length"), self._int("attention.head_count")
        self._heads = {"q": heads, "k": self._int("attention.head_count_kv", heads)}
        self._head_dim = self._int("attention.key_length", hidden // heads)
        self.tensors = dict(self._tensors())
        """The file's names of tensors, and transformers' names."""
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
            "vocab_size": self.vocabulary_size,
            "hidden_size": self._int("embedding_length"),
            "intermediate_size": self._int("feed_forward_length"),
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
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return self._file.shape(_EMBEDDING)[0]

    @property
    def context_length(self) -> int:
        """Positions that the model was made for."""
        return self._int("context_length")

    def _int(self, key: str, default: int | None = None) -> int:
        return self._file.get(f"{self._name}.{key}", int, default)

    def _tensors(self) -> Iterator[tuple[str, str]]:
        yield _EMBEDDING, "model.embed_tokens.weight"
        for layer in range(self._int("block_count")):
            for ours, theirs in (_LAYER | self._family.layer).items():
                yield f"blk.{layer}.{ours}", f"model.layers.{layer}.{theirs}"
        yield "output_norm.weight", "model.norm.weight"
        if _HEAD in self._file.tensor_names:
            yield _HEAD, "lm_head.weight"

    def _check(self) -> None:
        """Refuses what the configuration could not say."""
        missing = self.tensors.keys() - self._file.tensor_names
        if missing:
            raise self._file.refused(f"tensor {min(missing)} of architecture {self._name!r} is missing")
        unknown = self._file.tensor_names - self.tensors.keys() - {_ROPE_FACTORS}
        if unknown:
            raise self._file.refused(f"tensor {min(unknown)} is no part of architecture {self._name!r}")
        rotated = self._int("rope.dimension_count", self._head_dim)
        if rotated != self._head_dim:
            raise self._file.refused(f"only {rotated} of a head's {self._head_dim} dimensions rotate: not supported")
        for part, heads in self._heads.items():
            name, rows = f"blk.0.attn_{part}.weight", heads * self._head_dim
            if self._file.shape(name)[0] != rows:
                raise self._file.refused(f"tensor {name} has not {rows} rows, {self._head_dim} for each head")

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
        values = np.concatenate([*self._file.values(_ROPE_FACTORS)], axis=None).tolist()
        if len(values) != self._head_dim // 2:
            raise self._file.refused(f"tensor {_ROPE_FACTORS} has not one value for each pair of a head's dimensions")
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "factor": 1.0,
            "short_factor": values,
            "long_factor": values,
            "attention_factor": 1.0,
            "original_max_position_embeddings": self.context_length,
        }
