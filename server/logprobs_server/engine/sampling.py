"""Draws tokens. In this order: temperature, top-k, top-p (arXiv:1904.09751), min-p (arXiv:2407.01082), typical-p
(arXiv:2202.00666), each applied to what the one before it left; bias and penalties come before (see `adjustment`).

A token is the winner of an exponential race (Gumbel-max): the largest of scaled logit minus log of an
Exponential(1) variable that belongs to seed, position and token id. Unlike a search in cumulated
probabilities, noise in the last bits of the logits changes the winner only if two finish within that noise.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logprobs_server.engine import kernels
from logprobs_server.engine.adjustment import Adjustment, adjust
from logprobs_server.engine.logprobs import log_sum_exp, top_tokens
from logprobs_server.engine.random import VocabularyNoise, row_key
from logprobs_server.engine.transfer import fetched, sent
from logprobs_server.engine.types import SamplingOptions

__all__ = ["Draw", "DrawnToken", "draw_tokens"]

_FIRST_CANDIDATES = 256
"""Tokens sorted at first when only probabilities bound the set; eight times as many until they suffice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One token to draw: the completion's own seed, the token's position in it, what bias and penalties do to the
    logits, tokens that must not be drawn."""

    options: SamplingOptions
    seed: int
    position: int
    adjustment: Adjustment | None = None
    masked_ids: tuple[int, ...] = ()

    @property
    def touches(self) -> bool:
        """Whether it changes logits before it draws."""
        return self.adjustment is not None or bool(self.masked_ids)

    @property
    def takes_largest(self) -> bool:
        """Whether it is no draw at all, but the model's own most probable token."""
        return self.options.temperature == 0 and not self.touches


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnToken:
    """The token, its log probability under the distribution it was drawn from, and how many it was drawn from.

    A `set_size` of 0 says that every token is masked: nothing could be drawn, and the rest means nothing.
    """

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
    alike: defaultdict[tuple[bool, bool, bool], list[int]] = defaultdict(list)
    for row, draw in enumerate(draws):
        alike[_kind(draw.options)].append(row)
    drawn: dict[int, DrawnToken] = {}
    for (greedy, cut, typical), rows in alike.items():
        part = logits if len(rows) == len(draws) else logits[sent(rows, logits.device)]
        chosen = [draws[row] for row in rows]
        if touched := any(draw.touches for draw in chosen):
            part = _touched(part, chosen)
        found = _greedy(part, touched) if greedy else _sampled(part, chosen, noise, cut, typical)
        drawn.update(zip(rows, found, strict=True))
    return [drawn[row] for row in range(len(draws))]


def _kind(options: SamplingOptions) -> tuple[bool, bool, bool]:
    """Whether the draw is greedy; if not, whether a cut-off keeps the most probable tokens, and the most typical."""
    if options.temperature == 0:
        return True, False, False
    return False, options.top_k > 0 or options.top_p < 1 or options.min_p > 0, options.typical_p < 1


def _touched(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A copy of the logits after bias, penalties and masks."""
    logits = logits.clone(memory_format=torch.contiguous_format)
    adjust(logits, [draw.adjustment for draw in draws])
    masked = [(row, token_id) for row, draw in enumerate(draws) for token_id in draw.masked_ids]
    if masked:
        rows, ids = sent(masked, logits.device).T
        # A number would be sent to the device, and waited for.
        logits[rows, ids] = logits.new_full((), -torch.inf)
    return logits


def _greedy(logits: Tensor, touched: bool) -> list[DrawnToken]:
    """The most probable token; argmax gives the first of equals."""
    best = logits.argmax(dim=-1)
    possible = logits.gather(-1, best.unsqueeze(-1)).squeeze(-1) > -torch.inf if touched else torch.ones_like(best)
    rows = zip(*fetched(best, possible.long()), strict=True)
    return [DrawnToken(token_id=token_id, sampling_logprob=0.0, set_size=some) for token_id, some in rows]


def _sampled(
    logits: Tensor, draws: Sequence[Draw], noise: VocabularyNoise, cut: bool, typical: bool
) -> list[DrawnToken]:
    """A race of the tokens that the cut-offs leave, the whole vocabulary if there are none."""
    if not cut and not typical and kernels.in_use(logits):
        return _raced_by_kernel(logits, draws)
    scaled = _scaled(logits, draws)
    options = [draw.options for draw in draws]
    values, ids = _most_probable(scaled, options) if cut else (scaled, None)
    if typical:
        values, ids = _most_typical(values, ids, options)
    race = noise.log_exponentials(_keys(draws), ids).neg_().add_(values)
    winners = race.argmax(dim=-1, keepdim=True)
    total = log_sum_exp(values) if ids is None else _log_sum_exp_in_order(values)
    logprobs = values.gather(-1, winners).squeeze(-1).double() - total
    token_ids = winners if ids is None else ids.gather(-1, winners)
    return _drawn(token_ids.squeeze(-1), logprobs, (values > -torch.inf).sum(dim=-1))


def _raced_by_kernel(logits: Tensor, draws: Sequence[Draw]) -> list[DrawnToken]:
    rows = len(draws)
    winners, sizes = torch.empty(2, rows, dtype=torch.int64)
    logprobs = torch.empty(rows, dtype=torch.float64)
    temperatures = torch.tensor([draw.options.temperature for draw in draws], dtype=torch.float32)
    keys = torch.tensor(_keys(draws), dtype=torch.int32)
    torch.ops.logprobs.race(logits.contiguous(), temperatures, keys, winners, logprobs, sizes)
    return _drawn(winners, logprobs, sizes)


def _most_probable(scaled: Tensor, options: Sequence[SamplingOptions]) -> tuple[Tensor, Tensor]:
    """What top-k, top-p and min-p leave of each row: values, -inf for what they do not, and ids, best first."""
    vocab = scaled.shape[-1]
    # No sum of probabilities, however rounded, may cut where top-p is 1.
    cuts = [[o.top_k or vocab, o.top_p if o.top_p < 1 else math.inf, o.min_p] for o in options]
    top_k, top_p, min_p = sent(cuts, scaled.device, torch.float64).T.unsqueeze(-1)
    total = log_sum_exp(scaled).exp().unsqueeze(-1)  # [rows, 1]; the largest scaled logit is 0

    def kept(values: Tensor, ids: Tensor) -> Tensor:
        weights = values.double().exp()  # [rows, count], the first is 1
        places = torch.arange(weights.shape[-1], device=weights.device)
        weights.masked_fill_(places >= top_k, 0.0)
        up_to = weights.cumsum(dim=-1)
        mass = torch.where(top_k < vocab, up_to[:, -1:], total)
        keep: Tensor = (places < top_k) & (up_to - weights < top_p * mass) & (weights >= min_p)
        return keep & (values > -torch.inf)

    values, ids, keep = _first(scaled, 1 + max(option.top_k for option in options), kept)
    return values.masked_fill(~keep, -torch.inf), ids


def _most_typical(values: Tensor, ids: Tensor | None, options: Sequence[SamplingOptions]) -> tuple[Tensor, Tensor]:
    """What typical-p leaves of each row: those first whose logprob is closest to minus the entropy.

    Args:
        values: [rows, candidates] float32, the largest of each row 0.
        ids: their token ids; None if they are the whole vocabulary.
    Returns:
        Values, -inf for what is not left, and ids; of equally close ones the earlier candidate first.
    """
    mass = sent([[option.typical_p] for option in options], values.device, torch.float64)
    total = _log_sum_exp_in_order(values).unsqueeze(-1)  # [rows, 1]
    logprobs = values.double() - total
    terms = (logprobs.exp() * logprobs).nan_to_num_(nan=0.0)  # 0 · -inf is 0 here
    distances = (logprobs - terms.cumsum(dim=-1)[:, -1:]).abs_().float()  # from minus the entropy

    def kept(nearness: Tensor, places: Tensor) -> Tensor:
        weights = logprobs.gather(-1, places).exp()  # [rows, count]
        return (weights.cumsum(dim=-1) - weights < mass) & (nearness > -torch.inf)

    _, places, keep = _first(-distances, 1, kept)
    values = values.gather(-1, places).masked_fill_(~keep, -torch.inf)
    return values, places if ids is None else ids.gather(-1, places)


def _first(keys: Tensor, count: int, kept: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The greatest keys of each row, greatest first, their places, and which of them are kept.

    Args:
        kept: tells of such keys and places which are kept. That is always a prefix of each row, so it is enough to
            sort as many as the longest needs; at least `count`.
    """
    count = max(count, _FIRST_CANDIDATES)
    while True:
        count = min(count, keys.shape[-1])
        values, places = top_tokens(keys, count)
        keep = kept(values, places)
        if count == keys.shape[-1] or not bool(keep[:, -1].any()):
            return values, places, keep
        count *= 8


def _log_sum_exp_in_order(values: Tensor) -> Tensor:
    """As `log_sum_exp`, but -inf at a row's end changes no bit: neighbours that need more candidates change nothing."""
    largest = values.amax(dim=-1).double()
    weights = (values.double() - largest.unsqueeze(-1)).exp_()  # [rows, candidates]
    total: Tensor = weights.cumsum(dim=-1)[:, -1]
    return largest + total.log_()


def _scaled(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits minus the row's largest, divided by the temperature: [rows, vocab] float32, at most 0."""
    temperatures = sent([[draw.options.temperature] for draw in draws], logits.device, torch.float32)
    return (logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures)


def _keys(draws: Sequence[Draw]) -> list[tuple[int, int]]:
    return [row_key(draw.seed, draw.position) for draw in draws]


def _drawn(token_ids: Tensor, logprobs: Tensor, sizes: Tensor) -> list[DrawnToken]:
    rows = zip(*fetched(token_ids, logprobs.float(), sizes), strict=True)
    return [DrawnToken(token_id=i, sampling_logprob=p, set_size=n) for i, p, n in rows]
