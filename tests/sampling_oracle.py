"""What a token should be drawn from: transformers' own processors, in the order in which it builds them.

Shares no code with the server. Presence and frequency penalties, which transformers lacks, are OpenAI's definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

__all__ = ["adjusted", "drawn_from"]


def drawn_from(logits: Tensor, prompt: Sequence[int], completion: Sequence[int], options: Mapping[str, Any]) -> Tensor:
    """Log of the distribution to draw the next token of a completion from: [vocab] float64.

    Args:
        logits: [vocab], any float dtype; those that follow prompt and completion.
        options: fields of the contract's Sampling; none is a default that does nothing. Temperature 0 counts as 1.
    """
    scores = adjusted(logits, prompt, completion, options).unsqueeze(0)
    warpers: list[Callable[[Any, Tensor], Tensor]] = [TemperatureLogitsWarper(float(options.get("temperature") or 1))]
    if options.get("top_k"):
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if options.get("top_p", 1) < 1:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if options.get("min_p"):
        warpers.append(MinPLogitsWarper(options["min_p"]))
    if options.get("typical_p", 1) < 1:
        warpers.append(TypicalLogitsWarper(options["typical_p"]))
    for warper in warpers:
        scores = warper(None, scores)
    return scores.log_softmax(dim=-1).squeeze(0)


def adjusted(logits: Tensor, prompt: Sequence[int], completion: Sequence[int], options: Mapping[str, Any]) -> Tensor:
    """Logits [vocab] float64 after bias and penalties."""
    ids, scores = torch.tensor([[*prompt, *completion]]), logits.double().unsqueeze(0)
    if options.get("logit_bias"):
        scores = SequenceBiasLogitsProcessor({(i,): bias for i, bias in options["logit_bias"].items()})(ids, scores)
    if options.get("repetition_penalty", 1) != 1:
        scores = RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(ids, scores)
    counts = torch.bincount(torch.tensor(completion, dtype=torch.int64), minlength=logits.shape[-1])
    scores = scores - options.get("presence_penalty", 0) * (counts > 0) - options.get("frequency_penalty", 0) * counts
    return scores.squeeze(0)
