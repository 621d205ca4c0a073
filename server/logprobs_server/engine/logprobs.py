"""From logits to log probabilities: what is told of each position, reduced on the device in bounded slices.

Knows nothing of models or requests: rows of logits in, small arrays out. The log-sum-exp is accumulated in
float64 and rounded once, because torch's float32 one doubles the mean error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from logprobs_server.engine.types import LogprobOptions, PositionLogprobs

__all__ = ["log_sum_exp", "position_logprobs", "top_tokens"]


def log_sum_exp(logits: Tensor) -> Tensor:
    """Log of the sum of exponentials of each row, accumulated in float64.

    Args:
        logits: [rows, vocab] float32.
    Returns:
        [rows] float64; NaN where a row holds NaN or +inf, or nothing but -inf.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    return largest.squeeze(-1).double() + (logits - largest).exp_().sum(dim=-1, dtype=torch.float64).log_()


def top_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most probable tokens of each row: by logit, then by lower id.

    Args:
        logits: [rows, vocab], no NaN.
        count: 1 to vocab.
    Returns:
        values [rows, count] and ids [rows, count] int64, best first.
    """
    vocab = logits.shape[-1]
    values, ids = logits.topk(min(count + 1, vocab), dim=-1)
    if count < vocab:
        # topk takes any of several equal values; where the cut falls among equals the lowest ids must be found.
        for row in (values[:, count - 1] == values[:, count]).nonzero().flatten().tolist():
            equal = (logits[row] == values[row, count - 1]).nonzero().flatten()
            first = int((values[row] > values[row, count - 1]).sum())
            ids[row, first:count] = equal[: count - first]
        values, ids = values[:, :count], ids[:, :count]
    ids, order = ids.sort(dim=-1)
    values, by_value = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, by_value)


def position_logprobs(
    logits: Tensor, token_ids: Sequence[int | None], options: Sequence[LogprobOptions]
) -> list[PositionLogprobs | None]:
    """What is told of each row: a position under the model's own distribution.

    Args:
        logits: [rows, vocab] float32, before temperature or truncation. Left unchanged.
        token_ids: the token that stands at each row's position, None if nobody chose one.
        options: what else to tell, per row.
    Returns:
        One per row; None where the model yielded no distribution (NaN, +inf, or -inf throughout).
    """
    device = logits.device
    largest = logits.amax(dim=-1, keepdim=True)  # [rows, 1]
    weights = (logits - largest).exp_()  # [rows, vocab] float32, the largest is 1
    total = weights.sum(dim=-1, dtype=torch.float64)  # [rows]
    normaliser = largest.squeeze(-1).double() + total.log()  # [rows] float64
    chosen = torch.tensor([[token_id or 0] for token_id in token_ids], device=device)
    chosen_logits = logits.gather(-1, chosen)  # [rows, 1]
    chosen_logprobs = (chosen_logits.squeeze(-1).double() - normaliser).float().tolist()
    ranks = (1 + (logits > chosen_logits).sum(dim=-1)).tolist()
    greedy = (logits.argmax(dim=-1, keepdim=True) == chosen).squeeze(-1).tolist()
    sound = total.isfinite().tolist()

    entropies = _entropies(logits, largest, weights, total, options)
    top_ids, top_logprobs, tails = _tops(logits, weights, total, normaliser, options)
    named = _named(logits, normaliser, options)
    return [
        PositionLogprobs(
            token_id=token_id,
            logprob=None if token_id is None else chosen_logprobs[row],
            rank=None if token_id is None else ranks[row],
            greedy=token_id is not None and greedy[row],
            top_ids=top_ids[row],
            top_logprobs=top_logprobs[row],
            tail_logprob=tails[row],
            named_logprobs=named.get(row, ()),
            entropy=entropies.get(row),
        )
        if sound[row]
        else None
        for row, token_id in enumerate(token_ids)
    ]


def _tops(
    logits: Tensor, weights: Tensor, total: Tensor, normaliser: Tensor, options: Sequence[LogprobOptions]
) -> tuple[list[list[int]], list[list[float]], list[float | None]]:
    """Top ids and logprobs of each row, and the log of what is left. Zeroes the top's entries in `weights`."""
    counts = [min(option.top_count, logits.shape[-1]) for option in options]
    rows = len(counts)
    if not any(counts):
        return [[]] * rows, [[]] * rows, [None] * rows
    values, ids = top_tokens(torch.nan_to_num(logits, nan=0.0) if total.isnan().any() else logits, max(counts))
    logprobs = (values.double() - normaliser.unsqueeze(-1)).float().tolist()
    id_lists = ids.tolist()
    columns = torch.arange(max(counts), device=logits.device)
    wanted = columns < torch.tensor(counts, device=logits.device).unsqueeze(-1)  # [rows, columns]
    weights.scatter_(-1, ids, weights.gather(-1, ids).masked_fill_(wanted, 0.0))
    tails = (weights.sum(dim=-1, dtype=torch.float64) / total).log_().float().tolist()
    return (
        [row[:count] for row, count in zip(id_lists, counts, strict=True)],
        [row[:count] for row, count in zip(logprobs, counts, strict=True)],
        [tail if count else None for tail, count in zip(tails, counts, strict=True)],
    )


def _named(logits: Tensor, normaliser: Tensor, options: Sequence[LogprobOptions]) -> dict[int, list[float]]:
    """Logprobs of the tokens that each row's options name, for the rows that name any."""
    found = {}
    for row, option in enumerate(options):
        if option.token_ids:
            ids = torch.tensor(option.token_ids, device=logits.device)
            found[row] = (logits[row, ids].double() - normaliser[row]).float().tolist()
    return found


def _entropies(
    logits: Tensor, largest: Tensor, weights: Tensor, total: Tensor, options: Sequence[LogprobOptions]
) -> dict[int, float]:
    """Entropy in nats of each row that asks for it: log total - E[logit - largest]."""
    found = {}
    for row, option in enumerate(options):
        if option.entropy:
            terms = weights[row] * (logits[row] - largest[row]).clamp_(min=-1e4)  # 0 · -inf is 0 here
            found[row] = float(total[row].log() - terms.sum(dtype=torch.float64) / total[row])
    return found
