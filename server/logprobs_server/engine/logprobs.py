"""From logits to log probabilities: what is told of each position, reduced on the device in bounded slices.

Knows nothing of models or requests: rows of logits in, small arrays out. The log-sum-exp is accumulated in
float64 and rounded once, because torch's float32 one doubles the mean error.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite

import torch
from torch import Tensor

from logprobs_server.engine import kernels
from logprobs_server.engine.events import PositionLogprobs
from logprobs_server.engine.transfer import fetched, sent
from logprobs_server.engine.types import LogprobOptions

__all__ = ["LARGEST", "log_sum_exp", "most_probable", "position_logprobs", "top_tokens"]

LARGEST = -1
"""Stands for the most probable token of a row; as the kernels have it."""


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
        logits: [rows, vocab] float32. Of rows that hold NaN the ids mean nothing, but are ids.
        count: 1 to vocab.
    Returns:
        values [rows, count] and ids [rows, count] int64, best first.
    """
    if logits.is_cuda:  # to ask which rows are tied would make the host wait
        return _top_by_key(logits, count)
    vocab = logits.shape[-1]
    values, ids = logits.topk(min(count + 1, vocab), dim=-1)
    if count < vocab:
        tied = values[:, count - 1] == values[:, count]
        values, ids = values[:, :count], ids[:, :count]
        if len(rows := tied.nonzero().flatten()):
            values[rows], ids[rows] = _top_by_key(logits[rows], count)
    ids, order = ids.sort(dim=-1)
    values, by_value = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, by_value)


def _top_by_key(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `top_tokens`, by keys that no two tokens share: the logit as an integer of the same order, then the lower id.

    topk takes any of equals, in any order. On a CPU it takes several times as long for such keys as for the logits.
    """
    vocab = logits.shape[-1]
    bits = (logits + 0.0).view(torch.int32)  # no -0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.long() << 32) + torch.arange(vocab - 1, -1, -1, device=logits.device)
    ids = vocab - 1 - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)
    return logits.gather(-1, ids), ids


def most_probable(logits: Tensor, count: int) -> list[tuple[list[int], list[float], list[int]]]:
    """The `count` most probable tokens of each row, or as many as there are: ids, logprobs and ranks, best first.

    Args:
        logits: [rows, vocab] float32.
    """
    values, ids = top_tokens(logits, min(count, logits.shape[-1]))
    logprobs = (values.double() - log_sum_exp(logits).unsqueeze(-1)).float()
    falling = -values
    return list(zip(*fetched(ids, logprobs, torch.searchsorted(falling, falling) + 1), strict=True))


def position_logprobs(
    logits: Tensor, token_ids: Sequence[int | None], options: Sequence[LogprobOptions]
) -> list[PositionLogprobs | None]:
    """What is told of each row: a position under the model's own distribution.

    Args:
        logits: [rows, vocab] float32, before temperature or truncation. Left unchanged.
        token_ids: the token that stands at each row's position, `LARGEST` for the most probable, of equals the
            lowest id, None if nobody chose one.
        options: what else to tell, per row.
    Returns:
        One per row; None where the model yielded no distribution (NaN, +inf, or -inf throughout).
    """
    counts = [min(option.top_count, logits.shape[-1]) for option in options]
    found = (_kernel_statistics if kernels.in_use(logits) else _torch_statistics)(logits, token_ids, counts, options)
    named = _named(logits, found.normalisers, options)
    told_ids = [
        largest if given == LARGEST else given for given, largest in zip(token_ids, found.largest_ids, strict=True)
    ]
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
            all_logprobs=_all(logits[row], found.normalisers[row]) if options[row].full else (),
        )
        if found.sound[row]
        else None
        for row, token_id in enumerate(told_ids)
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
    chosen = [token_id or 0 for token_id in token_ids]
    normalisers, floats, numbers, top_logprobs, top_ids = torch.ops.logprobs.row_statistics(
        logits, chosen, counts, [option.entropy for option in options]
    )
    logprobs, tails, entropies, odd = floats.T.tolist()
    ranks, largest_ids = numbers.T.tolist()
    return _Statistics(
        normalisers=normalisers,
        sound=[not flag for flag in odd],
        chosen_logprobs=logprobs,
        ranks=ranks,
        largest_ids=largest_ids,
        top_ids=top_ids.tolist(),
        top_logprobs=top_logprobs.tolist(),
        tails=tails,
        entropies=entropies,
    )


def _torch_statistics(
    logits: Tensor, token_ids: Sequence[int | None], counts: Sequence[int], options: Sequence[LogprobOptions]
) -> _Statistics:
    """By torch's own operations, on any device."""
    largest = logits.amax(dim=-1, keepdim=True)  # [rows, 1]
    weights = (logits - largest).exp_()  # [rows, vocab] float32, the largest is 1
    total = weights.sum(dim=-1, dtype=torch.float64)  # [rows]
    normalisers = largest.squeeze(-1).double() + total.log()
    largest_ids = logits.argmax(dim=-1)
    chosen = sent([token_id or 0 for token_id in token_ids], logits.device)
    chosen_logits = logits.gather(-1, torch.where(chosen == LARGEST, largest_ids, chosen).unsqueeze(-1))  # [rows, 1]
    ranks = 1 + (logits > chosen_logits).sum(dim=-1)
    entropies = _entropies(logits, largest, weights, total, options)
    top_logits, top_ids, tails = _tops(logits, weights, total, counts)
    chosen_and_top = torch.cat([chosen_logits, top_logits], dim=-1).double() - normalisers.unsqueeze(-1)
    logprobs, floats, numbers, tops = fetched(
        chosen_and_top.float(),
        torch.stack([total, tails, entropies]).float(),
        torch.stack([ranks, largest_ids]),
        top_ids,
    )
    return _Statistics(
        normalisers=normalisers,
        sound=[isfinite(number) for number in floats[0]],
        chosen_logprobs=[row[0] for row in logprobs],
        ranks=numbers[0],
        largest_ids=numbers[1],
        top_ids=tops,
        top_logprobs=[row[1:] for row in logprobs],
        tails=floats[1],
        entropies=floats[2],
    )


def _tops(logits: Tensor, weights: Tensor, total: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Top logits and ids of each row, [rows, most], and the log of what is left. Zeroes the top's `weights`."""
    if not any(counts):
        return logits[:, :0], torch.empty(len(counts), 0, dtype=torch.int64, device=logits.device), total.log()
    values, ids = top_tokens(logits, max(counts))
    columns = torch.arange(max(counts), device=logits.device)
    wanted = columns < sent(counts, logits.device).unsqueeze(-1)  # [rows, columns]
    weights.scatter_(-1, ids, weights.gather(-1, ids).masked_fill_(wanted, 0.0))
    return values, ids, (weights.sum(dim=-1, dtype=torch.float64) / total).log_()


def _named(logits: Tensor, normalisers: Tensor, options: Sequence[LogprobOptions]) -> dict[int, list[float]]:
    """Logprobs of the tokens that each row's options name, for the rows that name any."""
    places = [(row, token_id) for row, option in enumerate(options) for token_id in option.token_ids]
    if not places:
        return {}
    rows, ids = sent(places, logits.device).T
    [logprobs] = fetched((logits[rows, ids].double() - normalisers[rows]).float())
    left = iter(logprobs)
    named = {row: option.token_ids for row, option in enumerate(options) if option.token_ids}
    return {row: list(islice(left, len(token_ids))) for row, token_ids in named.items()}


def _all(logits: Tensor, normaliser: Tensor) -> array[float]:
    """Logprobs of one row's whole vocabulary, rounded once to float32."""
    return array("f", (logits.double() - normaliser).float().cpu().numpy().tobytes())


def _entropies(
    logits: Tensor, largest: Tensor, weights: Tensor, total: Tensor, options: Sequence[LogprobOptions]
) -> Tensor:
    """Entropy in nats of each row that asks for it, log total - E[logit - largest]; 0 for others. [rows] float64."""
    found = torch.zeros_like(total)
    asking = [row for row, option in enumerate(options) if option.entropy]
    if asking:
        rows = sent(asking, logits.device)
        terms = weights[rows] * (logits[rows] - largest[rows]).clamp_(min=-1e4)  # 0 · -inf is 0 here
        found[rows] = total[rows].log() - terms.sum(dim=-1, dtype=torch.float64) / total[rows]
    return found
