"""From logits to log probabilities: what is told of each position, reduced on the device in bounded slices.

Knows nothing of models or requests: rows of logits in, small arrays out. The log-sum-exp is accumulated in
float64 and rounded once, because torch's float32 one doubles the mean error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logprobs_server.engine import kernels
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
    counts = [min(option.top_count, logits.shape[-1]) for option in options]
    found = (_kernel_statistics if kernels.in_use(logits) else _torch_statistics)(logits, token_ids, counts, options)
    named = _named(logits, found.normalisers, options)
    return [
        PositionLogprobs(
            token_id=token_id,
            logprob=None if token_id is None else found.chosen_logprobs[row],
            rank=None if token_id is None else found.ranks[row],
            greedy=token_id == found.largest_ids[row],
            top_ids=found.top_ids[row][: counts[row]],
            top_logprobs=found.top_logprobs[row][: counts[row]],
            tail_logprob=found.tails[row] if counts[row] else None,
            named_logprobs=named.get(row, ()),
            entropy=found.entropies[row] if options[row].entropy else None,
        )
        if found.sound[row]
        else None
        for row, token_id in enumerate(token_ids)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Statistics:
    """What is known of each row, in lists. Those of the top may hold more than was asked for."""

    normalisers: Tensor  # [rows] float64
    sound: list[bool]
    chosen_logprobs: list[float]
    ranks: list[int]
    largest_ids: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]
    tails: list[float]
    entropies: list[float]


def _kernel_statistics(
    logits: Tensor, token_ids: Sequence[int | None], counts: Sequence[int], options: Sequence[LogprobOptions]
) -> _Statistics:
    """By the CPU's kernels: two reads of the logits, no copy of them."""
    rows = logits.shape[0]
    floats, numbers = torch.zeros(rows, 5, dtype=torch.float64), torch.zeros(rows, 2, dtype=torch.int64)
    values, ids = torch.zeros(rows, max(counts)), torch.zeros(rows, max(counts), dtype=torch.int64)
    chosen = torch.tensor([token_id or 0 for token_id in token_ids])
    moments = torch.tensor([option.entropy for option in options])
    torch.ops.logprobs.row_statistics(logits, chosen, torch.tensor(counts), moments, floats, numbers, values, ids)
    normalisers = floats[:, 0]
    _, tails, entropies, _, odd = floats.float().T.tolist()
    ranks, largest_ids = numbers.T.tolist()
    return _Statistics(
        normalisers=normalisers,
        sound=[not flag for flag in odd],
        chosen_logprobs=(floats[:, 3] - normalisers).float().tolist(),
        ranks=ranks,
        largest_ids=largest_ids,
        top_ids=ids.tolist(),
        top_logprobs=(values.double() - normalisers.unsqueeze(-1)).float().tolist(),
        tails=tails,
        entropies=entropies,
    )


def _torch_statistics(
    logits: Tensor, token_ids: Sequence[int | None], counts: Sequence[int], options: Sequence[LogprobOptions]
) -> _Statistics:
    """By torch's own operations, on any device."""
    device = logits.device
    largest = logits.amax(dim=-1, keepdim=True)  # [rows, 1]
    weights = (logits - largest).exp_()  # [rows, vocab] float32, the largest is 1
    total = weights.sum(dim=-1, dtype=torch.float64)  # [rows]
    normalisers = largest.squeeze(-1).double() + total.log()
    chosen = torch.tensor([[token_id or 0] for token_id in token_ids], device=device)
    chosen_logits = logits.gather(-1, chosen)  # [rows, 1]
    entropies = _entropies(logits, largest, weights, total, options)
    top_ids, top_logprobs, tails = _tops(logits, weights, total, normalisers, counts)
    return _Statistics(
        normalisers=normalisers,
        sound=total.isfinite().tolist(),
        chosen_logprobs=(chosen_logits.squeeze(-1).double() - normalisers).float().tolist(),
        ranks=(1 + (logits > chosen_logits).sum(dim=-1)).tolist(),
        largest_ids=logits.argmax(dim=-1).tolist(),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        tails=tails,
        entropies=entropies,
    )


def _tops(
    logits: Tensor, weights: Tensor, total: Tensor, normalisers: Tensor, counts: Sequence[int]
) -> tuple[list[list[int]], list[list[float]], list[float]]:
    """Top ids and logprobs of each row, and the log of what is left. Zeroes the top's entries in `weights`."""
    rows = len(counts)
    if not any(counts):
        return [[]] * rows, [[]] * rows, [0.0] * rows
    values, ids = top_tokens(torch.nan_to_num(logits, nan=0.0) if total.isnan().any() else logits, max(counts))
    columns = torch.arange(max(counts), device=logits.device)
    wanted = columns < torch.tensor(counts, device=logits.device).unsqueeze(-1)  # [rows, columns]
    weights.scatter_(-1, ids, weights.gather(-1, ids).masked_fill_(wanted, 0.0))
    tails = (weights.sum(dim=-1, dtype=torch.float64) / total).log_().float().tolist()
    return ids.tolist(), (values.double() - normalisers.unsqueeze(-1)).float().tolist(), tails


def _named(logits: Tensor, normalisers: Tensor, options: Sequence[LogprobOptions]) -> dict[int, list[float]]:
    """Logprobs of the tokens that each row's options name, for the rows that name any."""
    found = {}
    for row, option in enumerate(options):
        if option.token_ids:
            ids = torch.tensor(option.token_ids, device=logits.device)
            found[row] = (logits[row, ids].double() - normalisers[row]).float().tolist()
    return found


def _entropies(
    logits: Tensor, largest: Tensor, weights: Tensor, total: Tensor, options: Sequence[LogprobOptions]
) -> list[float]:
    """Entropy in nats of each row that asks for it, log total - E[logit - largest]; 0 for the others."""
    found = [0.0] * len(options)
    for row, option in enumerate(options):
        if option.entropy:
            terms = weights[row] * (logits[row] - largest[row]).clamp_(min=-1e4)  # 0 · -inf is 0 here
            found[row] = float(total[row].log() - terms.sum(dtype=torch.float64) / total[row])
    return found
