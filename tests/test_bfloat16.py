"""The lean path in bfloat16 is nearer than transformers to what the same weights give in float64."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from logprobs_server.__main__ import parse
from logprobs_server.engine.batch import Chunk
from logprobs_server.engine.kv_cache import BLOCK_SIZE
from logprobs_server.engine.lean import LeanModel
from logprobs_server.engine.model.checkpoint import LoadOptions
from logprobs_server.engine.model.loading import load_model
from serving import skip_without_kernels
from tiny_models import ARCHITECTURES, RELATIVES, VOCABULARY_SIZE, save_model, save_tiny_model
from torch import Tensor

TOKENS = 150
FAMILIES = [name for name in (*ARCHITECTURES, *RELATIVES) if name != "opt"]
"""Those of the lean path."""


def lean_logits(folder: Path, ids: Tensor, pieces: list[int]) -> Tensor:
    """Logits [tokens, vocab] of ids [tokens] by the lean path in bfloat16, computed in pieces of these sizes."""
    skip_without_kernels(True)
    options = LoadOptions(
        path=str(folder),
        name="model",
        revision="",
        max_sequences=2,
        dtype="bfloat16",
        device="cpu",
        kernels_dir=parse([], dict(os.environ)).cache_dir / "kernels",
    )
    model = load_model(options)
    assert isinstance(model, LeanModel)
    parts, blocks = ids.split(pieces), range(1, 2 + len(ids) // BLOCK_SIZE)
    starts = [sum(pieces[:i]) for i in range(len(pieces))]
    chunks = [Chunk(token_ids=p.tolist(), start=s, blocks=blocks) for p, s in zip(parts, starts, strict=True)]
    return torch.cat([model.logits(model.forward([chunk])).clone() for chunk in chunks])


def errors(folder: Path, ids: Tensor, pieces: list[int]) -> tuple[float, float]:
    """Mean difference from float64 of the lean path's logprobs, and of transformers' own in bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        ours, theirs = lean_logits(folder, ids, pieces), model(ids[None]).logits[0]
        exact = model.double()(ids[None]).logits[0].log_softmax(-1)
    ours, theirs = ((x.double().log_softmax(-1) - exact).abs().mean() for x in (ours, theirs))
    return float(ours), float(theirs)


def some_ids() -> Tensor:
    return torch.randint(VOCABULARY_SIZE, (TOKENS,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_nearer_to_the_truth_than_transformers(name: str, tmp_path: Path) -> None:
    save_tiny_model(name, tmp_path)
    ours, theirs = errors(tmp_path, some_ids(), [100, *[1] * 50])
    assert ours < theirs


def test_a_pass_leaves_denormal_numbers_to_its_caller(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    lean_logits(tmp_path, some_ids(), [TOKENS])
    assert float(torch.tensor([1e-40]) * 0.5) > 0


@pytest.mark.parametrize(("width", "heads"), [(30, 2), (66, 3), (192, 1), (256, 2)])
def test_heads_of_any_size_are_nearer_to_the_truth_than_transformers(width: int, heads: int, tmp_path: Path) -> None:
    sizes = {"n_embd": width, "n_head": heads, "n_layer": 2, "vocab_size": VOCABULARY_SIZE, "initializer_range": 0.1}
    save_model(transformers.GPT2Config(**sizes), tmp_path)
    ours, theirs = errors(tmp_path, some_ids(), [90, *[1] * 60])
    assert ours < theirs


def test_heads_of_extreme_numbers_are_as_near_to_the_truth(tmp_path: Path) -> None:
    """Queries, keys and values whose numbers are all as large as their largest, and equal weights: the largest sums."""
    size = 128
    sizes: dict[str, Any] = {"n_embd": size, "n_head": 1, "n_layer": 1, "vocab_size": VOCABULARY_SIZE}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=False))
    signs = torch.tensor([1.0, -1.0]).repeat(size // 2)
    block = model.transformer.h[0]
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        even = torch.arange(VOCABULARY_SIZE) % 2 == 0
        model.transformer.wte.weight.copy_(torch.where(even, 1.0, -1.0)[:, None] * signs)
        block.attn.c_attn.weight.copy_((signs / size)[:, None] * torch.tensor([0.5, 0.5, 8.0]).repeat_interleave(size))
        block.attn.c_attn.bias.zero_()
        model.lm_head.weight.copy_(torch.randn(VOCABULARY_SIZE, size, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path)
    ids = torch.cat([torch.full((48,), 2), torch.full((40,), 5), torch.full((20,), 2)])
    ours, theirs = errors(tmp_path, ids, [80, *[1] * 28])
    assert ours < theirs
