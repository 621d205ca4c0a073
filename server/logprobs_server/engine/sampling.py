"""Draws tokens: temperature, top-k, top-p (arXiv:1904.09751), min-p (arXiv:2407.01082), in this order.

A token is the winner of an exponential race (Gumbel-max): the largest of scaled logit minus log of an
Exponential(1) variable that belongs to seed, position and token id. Unlike a search in cumulated
probabilities, noise in the last bits of the logits changes the winner only if two finish within that noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logprobs_server.engine import kernels
from logprobs_server.engine.logprobs import log_sum_exp, top_tokens
from logprobs_server.engine.random import VocabularyNoise, row_key
from logprobs_server.engine.transfer import fetched, sent
from logprobs_server.engine.types import SamplingOptions

__all__ = ["Draw", "DrawnToken", "draw_tokens"]

_FIRST_CANDIDATES = 256
"""Tokens sorted at first when only top-p or min-p bounds the set; eight times as many until they suffice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One token to draw: the completion's own seed, the token's position in it, tokens that must not be drawn."""

    options: SamplingOptions
    seed: int
    position: int
    masked_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnToken:
    """The token, its log probability under the distribution it was drawn from, and how many it was drawn from."""

    token_id: int
    sampling_logprob: float
    set_size: int


def draw_tokens(logits: Tensor, draws: Sequence[Draw], noise: VocabularyNoise) -> list[DrawnToken]:
    """Draws one token per row.

    Args:
        logits: [rows, vocab] float32. Left unchanged.
    Returns:
        One per row. Temperature 0 takes the most probable token, of equals the lowest id.
    """
    masked = [(row, token_id) for row, draw in enumerate(draws) for token_id in draw.masked_ids]
    if masked:
        masked_rows, masked_ids = sent(masked, logits.device).T
        logits = logits.clone()
        logits[masked_rows, masked_ids] = -torch.inf
    drawn: dict[int, DrawnToken] = {}
    for kind, draw_rows in ((_is_greedy, _greedy), (_is_whole, _whole), (_is_truncated, _truncated)):
        rows = [row for row, draw in enumerate(draws) if kind(draw.options)]
        if rows:
            part = logits if len(rows) == len(draws) else logits[sent(rows, logits.device)]
            drawn.update(zip(rows, draw_rows(part, [draws[row] for row in rows], noise), strict=True))
    return [drawn[row] for row in range(len(draws))]


def _is_greedy(options: SamplingOptions) -> bool:
    return options.temperature == 0


def _is_whole(options: SamplingOptions) -> bool:
    """Nothing truncates the distribution."""
    return not _is_greedy(options) and options.top_k == 0 and options.top_p == 1 and options.min_p == 0


def _is_truncated(options: SamplingOptions) -> bool:
    return not _is_greedy(options) and not _is_whole(options)


def _greedy(logits: Tensor, draws: Sequence[Draw], noise: VocabularyNoise) -> list[DrawnToken]:
    """The most probable token; argmax gives the first of equals."""
    [token_ids] = fetched(logits.argmax(dim=-1))
    return [DrawnToken(token_id=token_id, sampling_logprob=0.0, set_size=1) for token_id in token_ids]


def _whole(logits: Tensor, draws: Sequence[Draw], noise: VocabularyNoise) -> list[DrawnToken]:
    """A race of the whole vocabulary."""
    if kernels.in_use(logits):
        rows = len(draws)
        winners, sizes = torch.empty(2, rows, dtype=torch.int64)
        logprobs = torch.empty(rows, dtype=torch.float64)
        temperatures = torch.tensor([draw.options.temperature for draw in draws])
        keys = torch.tensor(_keys(draws), dtype=torch.int32)
        torch.ops.logprobs.race(logits.contiguous(), temperatures, keys, winners, logprobs, sizes)
        return _drawn(winners, logprobs, sizes)
    scaled = _scaled(logits, draws)
    race = noise.log_exponentials(_keys(draws)).neg_().add_(scaled)
    winners = race.argmax(dim=-1, keepdim=True)
    logprobs = scaled.gather(-1, winners).squeeze(-1).double() - log_sum_exp(scaled)
    return _drawn(winners.squeeze(-1), logprobs, (scaled > -torch.inf).sum(dim=-1))


def _truncated(logits: Tensor, draws: Sequence[Draw], noise: VocabularyNoise) -> list[DrawnToken]:
    """A race of the tokens that top-k, top-p and min-p leave."""
    scaled = _scaled(logits, draws)
    values, ids, sizes = _kept(scaled, [draw.options for draw in draws])
    places = torch.arange(values.shape[-1], device=values.device)
    values = values.masked_fill(places >= sizes.unsqueeze(-1), -torch.inf)
    race = noise.log_exponentials(_keys(draws), ids).neg_().add_(values)
    winners = race.argmax(dim=-1, keepdim=True)
    logprobs = values.gather(-1, winners).squeeze(-1).double() - log_sum_exp(values)
    return _drawn(ids.gather(-1, winners).squeeze(-1), logprobs, sizes)


def _kept(scaled: Tensor, options: Sequence[SamplingOptions]) -> tuple[Tensor, Tensor, Tensor]:
    """The best tokens of each row, best first, and how many of them are kept.

    Every cut-off keeps a prefix of that order, so it is enough to sort as many tokens as the widest needs.
    """
    vocab = scaled.shape[-1]
    cuts = [[option.top_k or vocab, option.top_p, option.min_p] for option in options]
    top_k, top_p, min_p = sent(cuts, scaled.device, torch.float64).T.unsqueeze(-1)
    total = log_sum_exp(scaled).exp().unsqueeze(-1)  # [rows, 1]; the largest scaled logit is 0
    count = min(vocab, max(_FIRST_CANDIDATES, *(option.top_k for option in options)))
    while True:
        values, ids = top_tokens(scaled, count)
        weights = values.double().exp()  # [rows, count], the first is 1
        places = torch.arange(count, device=scaled.device)
        weights = weights.masked_fill_(places >= top_k, 0.0)
        mass = torch.where(top_k < vocab, weights.sum(dim=-1, keepdim=True), total)
        before = weights.cumsum(dim=-1) - weights  # probability of the tokens ahead of each, times mass
        kept = ((before < top_p * mass) & (weights >= min_p) & (weights > 0)).sum(dim=-1)
        open_ended = (kept == count) & (top_k.squeeze(-1) > count)
        if count == vocab or not bool(open_ended.any()):
            return values, ids, kept
        count = min(vocab, 8 * count)


def _scaled(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits minus the row's largest, divided by the temperature: [rows, vocab] float32, at most 0."""
    temperatures = sent([[draw.options.temperature] for draw in draws], logits.device, torch.float32)
    return (logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures)


def _keys(draws: Sequence[Draw]) -> list[tuple[int, int]]:
    return [row_key(draw.seed, draw.position) for draw in draws]


def _drawn(token_ids: Tensor, logprobs: Tensor, sizes: Tensor) -> list[DrawnToken]:
    rows = zip(*fetched(token_ids, logprobs.float(), sizes), strict=True)
    return [DrawnToken(token_id=i, sampling_logprob=p, set_size=n) for i, p, n in rows]
