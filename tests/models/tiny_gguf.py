"""Tiny random models, written as GGUF files the way converters write them. Knows nothing of the code under test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, CONTEXT = 64, 4, 2, 16, 96, 2, 64
THETA, EPS = 50000.0, 1e-5
SPECIAL = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3, "<think>": 4, "[PAD4]": 5}
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}

Quantise = Callable[[str], gguf.GGMLQuantizationType]


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level tokenizers spell bytes with, in order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [spelled[byte] for byte in range(256)]


MERGES = ["Ġ t", "h e", "Ġt he", "i n", "1 2"]
TOKENS = [*SPECIAL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def all_f32(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType.F32


def matrices_q8_0(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType.F32 if "norm" in name or "bias" in name else gguf.GGMLQuantizationType.Q8_0


@dataclass(kw_only=True)
class Tiny:
    """A tiny model and what its GGUF file says; tests change what they are about before they write it.

    metadata: replaces what the file would say by itself; None leaves a key out.
    tensors: added to the file's, or replacing them; None leaves a tensor out.
    """

    architecture: str = "llama"
    tied: bool = True
    rope: Mapping[str, Any] | None = None
    quantise: Quantise = all_f32
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, NDArray[np.float32] | None] = field(default_factory=dict)

    def model(self) -> Any:
        """The model as transformers has it; the same at each call."""
        config = CONFIGS[self.architecture](
            vocab_size=len(TOKENS),
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=EPS,
            rope_parameters=self.rope or {"rope_type": "default", "rope_theta": THETA},
            tie_word_embeddings=self.tied,
        )
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model

    def write(self, path: Path) -> Path:
        """Writes the file."""
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in (self._metadata() | self.metadata).items():
            if value is not None:
                _add(writer, key, value)
        for name, values in (self.gguf_tensors() | self.tensors).items():
            if values is not None:
                kind = self.quantise(name)
                writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def gguf_tensors(self) -> dict[str, NDArray[np.float32]]:
        """The model's tensors with GGUF's names and, for llama, its order of query and key rows."""
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.architecture.upper()], LAYERS)
        tensors = {}
        for name, tensor in self.model().state_dict().items():
            if name == "lm_head.weight" and self.tied:
                continue
            values = tensor.numpy()
            if self.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                values = interleaved(values)
            tensors[str(names.get_name(name, try_suffixes=(".weight", ".bias")))] = values
        return tensors

    def _metadata(self) -> dict[str, Any]:
        return {
            f"{self.architecture}.{key}": value
            for key, value in {
                "block_count": LAYERS,
                "context_length": CONTEXT,
                "embedding_length": HIDDEN,
                "feed_forward_length": FFN,
                "attention.head_count": HEADS,
                "attention.head_count_kv": KV_HEADS,
                "attention.key_length": HEAD_DIM,
                "attention.layer_norm_rms_epsilon": EPS,
                "rope.dimension_count": HEAD_DIM,
                "rope.freq_base": THETA,
            }.items()
        } | {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.token_type": [SPECIAL.get(token, 1) for token in TOKENS],
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.chat_template": TEMPLATE,
        }


def interleaved(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Query or key rows, [heads · head_dim, hidden], in llama.cpp's order: dimension i beside i + head_dim / 2."""
    heads = rows.reshape(-1, HEAD_DIM, rows.shape[-1])
    half = HEAD_DIM // 2
    order = [dimension for i in range(half) for dimension in (i, i + half)]
    return np.ascontiguousarray(heads[:, order].reshape(rows.shape))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
