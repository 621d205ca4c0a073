"""What the numbers should be: transformers' own float32 forward pass, then softmax, ranks and sums in float64.

Shares no code with the server. Where two logits are closer than the tolerance, either order is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from logprobs.v1 import logprobs_pb2 as pb
from torch import Tensor

__all__ = ["TOLERANCE", "Oracle", "deviation"]

TOLERANCE = 1e-4
"""Most that a number may differ, in nats."""
_ROWS = 128

# The thread that imports this, that of the tests, computes alone. A second thread for every small softmax made these
# tests thirty times slower once engines had come and gone in the same process. Servers set a number of their own.
torch.set_num_threads(1)


class Oracle:
    """A model as transformers alone runs it."""

    def __init__(self, folder: Path) -> None:
        transformers.utils.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits that follow each token: [tokens, vocab] float32, from one pass over all."""
        logits: Tensor = self._model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits
        return logits.squeeze(0)

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], max_tokens: int, eos_token_id: int | None = None) -> list[int]:
        """The tokens that transformers' `generate` appends."""
        self._model.generation_config.eos_token_id = eos_token_id
        self._model.generation_config.pad_token_id = 0
        inputs = torch.tensor([list(prompt)])
        both = self._model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_tokens, do_sample=False
        )
        new: list[int] = both[0, inputs.shape[1] :].tolist()
        return new

    def smallest_margin(self, prompt: Sequence[int], completion: Sequence[int]) -> float:
        """How far apart the two best logits are where they are closest, over the steps of a completion."""
        best = self.logits([*prompt, *completion[:-1]])[len(prompt) - 1 :].topk(2).values  # [tokens, 2]
        return float((best[:, 0] - best[:, 1]).min())


def deviation(tokens: Sequence[pb.Token], logits: Tensor, named: Sequence[int] = ()) -> float:
    """The largest difference, in nats, between what is told of scored tokens and what logits say.

    Args:
        tokens: each has a logprob; what else they tell is compared too.
        logits: [tokens, vocab] float32, those that each token was predicted by.
        named: token ids that were asked for at every position.
    Returns:
        Infinity where a number is missing, or a rank or order is wrong by more than near ties explain.
    """
    parts = [range(len(tokens))[first : first + _ROWS] for first in range(0, len(tokens), _ROWS)]
    return max(
        _row_deviation(tokens[index], row, named)
        for part in parts
        for index, row in zip(part, logits[part.start : part.stop].double().log_softmax(dim=-1), strict=True)
    )


def _row_deviation(token: pb.Token, logprobs: Tensor, named: Sequence[int]) -> float:
    """As `deviation`, for one token and its float64 distribution, [vocab]."""
    if not token.HasField("logprob") or [a.id for a in token.named] != list(named):
        return torch.inf
    own = logprobs[token.id]
    above, not_below = ((logprobs > own + shift).sum().item() for shift in (TOLERANCE, -TOLERANCE))
    if not above < token.rank <= not_below:
        return torch.inf
    differences = [abs(token.logprob - own)]
    differences += [abs(a.logprob - logprobs[a.id]) for a in (*token.named, *token.top)]
    if token.top:
        differences += _top_differences(token, logprobs)
    if token.HasField("entropy"):
        differences.append(abs(token.entropy + (logprobs.exp() * logprobs).sum()))
    return float(max(differences))


def _top_differences(token: pb.Token, logprobs: Tensor) -> list[Tensor]:
    """How far each alternative is from the one that belongs in its place, and the tail from what is left."""
    ids = torch.tensor([alternative.id for alternative in token.top])
    if len(set(ids.tolist())) < len(ids):
        return [torch.tensor(torch.inf)]
    rest = logprobs.index_fill(0, ids, -torch.inf).logsumexp(dim=0)
    best = logprobs.topk(len(ids)).values
    return [*(best - logprobs[ids]).abs(), abs(token.tail_logprob - rest)]
