"""The truth that log probabilities are held against: transformers' forward pass in float64, all of it.

transformers computes norms and angles in float32 whatever the model's type; here they too are float64. Given are the
weights, rounded to the type that others compute in, and the frequencies of the angles, float32 as everyone has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

__all__ = ["Reference"]


class Reference:
    """A llama model."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        transformers.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).double().eval()
        assert self._model.config.model_type == "llama"
        for module in self._model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = partial(_norm, module)
        rotary = self._model.model.rotary_emb
        rotary.forward = partial(_rotation, rotary)
        self._known: dict[tuple[int, ...], Tensor] = {}

    def logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """Log probabilities of all tokens but the first: [tokens - 1] float64, in nats. Computed once."""
        key = tuple(token_ids)
        if key not in self._known:
            self._known[key] = self._computed(torch.tensor([key]))
        return self._known[key]

    @torch.inference_mode()
    def _computed(self, token_ids: Tensor) -> Tensor:
        logits: Tensor = self._model(token_ids, use_cache=False).logits  # [1, tokens, vocab] float64
        return logits[0, :-1].log_softmax(-1).gather(-1, token_ids[0, 1:, None]).squeeze(-1)


def _norm(module: Any, x: Tensor) -> Tensor:
    """RMSNorm in the type of x."""
    return functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def _rotation(module: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, positions, head size] of the angles, in the type of x."""
    angles = position_ids.unsqueeze(-1).to(x.dtype) * module.inv_freq.to(x.dtype)
    both = torch.cat([angles, angles], dim=-1)
    return both.cos() * module.attention_scaling, both.sin() * module.attention_scaling
