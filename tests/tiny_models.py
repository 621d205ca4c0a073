"""Tiny random models in folders, made so that mistakes show: steep logits, untied heads, no norm or bias at rest.

Architectures differ in what they know of positions: learned (gpt2, opt), rotary (gpt_neox, llama, qwen3), rotary
within a window (gemma3, mistral), ALiBi (bloom). Knows nothing of the server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = [
    "ARCHITECTURES",
    "CONTEXT_LENGTH",
    "EOS_ID",
    "RELATIVES",
    "VOCABULARY_SIZE",
    "save_model",
    "save_tiny_model",
    "tiny_model",
]

VOCABULARY_SIZE = 300
CONTEXT_LENGTH = 2048
EOS_ID = 0
"""The tokenizer's only special token."""
_SPREAD = 0.2
"""Standard deviation of random weights. At the usual 0.02 logits are almost flat and hide what positions do."""
_COMMON = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": EOS_ID, "pad_token_id": None}
_DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": _SPREAD,
}
_GATED = {**_DECODER, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
_CONFIGS: dict[str, dict[str, Any]] = {
    # 7 heads: ALiBi has a rule of its own for numbers that are no power of two
    "bloom": {
        "hidden_size": 112,
        "n_layer": 3,
        "n_head": 7,
        "initializer_range": _SPREAD,
        "seq_length": CONTEXT_LENGTH,
    },
    "gemma3_text": {**_GATED, "num_hidden_layers": 6, "query_pre_attn_scalar": 16, "sliding_window": 7},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT_LENGTH, "initializer_range": _SPREAD},
    "gpt_neox": {**_DECODER, "intermediate_size": 96},
    "llama": _GATED,
    "mistral": {**_GATED, "sliding_window": 7},
    "opt": {**_DECODER, "hidden_size": 96, "ffn_dim": 192, "word_embed_proj_dim": 64, "init_std": _SPREAD},
    "qwen3": _GATED,
}
ARCHITECTURES = tuple(_CONFIGS)
_RELATIVES: dict[str, dict[str, Any]] = {
    "phi3": {**_DECODER, "intermediate_size": 96, "num_key_value_heads": 2},
    "qwen2": {**_DECODER, "intermediate_size": 96, "num_key_value_heads": 2},
}
RELATIVES = tuple(_RELATIVES)
"""More architectures, which differ from those above in how they store weights."""
_SEEDS = {"gpt2": 1, "gpt_neox": 19, "opt": 1, "qwen3": 5}
"""Seeds other than 0, chosen so that greedy decoding of the tests' prompts is lively and never near a tie."""


def save_tiny_model(architecture: str, folder: Path) -> None:
    """Writes a random model of that architecture and a byte-level tokenizer, as `--model FOLDER` reads them."""
    _save(tiny_model(architecture), folder)


def tiny_model(architecture: str) -> Any:
    """A random model of that architecture, float32."""
    settings = {"vocab_size": VOCABULARY_SIZE, **_COMMON, **(_CONFIGS | _RELATIVES)[architecture]}
    config = transformers.AutoConfig.for_model(architecture, **settings)
    return _random_model(config, _SEEDS.get(architecture, 0))


def save_model(config: Any, folder: Path, seed: int = 0) -> None:
    """Writes a random model with this configuration and a byte-level tokenizer of `VOCABULARY_SIZE` entries."""
    _save(_random_model(config, seed), folder)


def _random_model(config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms are made as ones and biases as zeroes, which would hide them
                parameter += _SPREAD * torch.randn_like(parameter)
    return model


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    _tokenizer().save(str(folder / "tokenizer.json"))


def _tokenizer() -> Tokenizer:
    """Spells every text; a few merges give its tokens different lengths."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the horse raced past the barn and fell", "def name(self): return self.value"] * 2, trainer
    )
    return tokenizer
