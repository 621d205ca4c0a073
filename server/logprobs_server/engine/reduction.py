"""Reduces logits to what rows want of them: drawn tokens, candidates of beam searches, positions to tell.

It looks at rows and logits alone: what becomes of the sequences is the engine's to say.
"""

from __future__ import annotations

from torch import Tensor

from logprobs_server.engine.events import PositionLogprobs
from logprobs_server.engine.logprobs import LARGEST, most_probable, position_logprobs
from logprobs_server.engine.random import VocabularyNoise
from logprobs_server.engine.sampling import DrawnToken, draw_tokens
from logprobs_server.engine.sequences import Row
from logprobs_server.engine.transfer import sent

__all__ = ["candidates_of", "drawn_of", "positions_of"]

_MOST_PROBABLE = DrawnToken(token_id=LARGEST, sampling_logprob=0.0, set_size=1)
"""What a greedy draw gives that nothing touches: the logits need no other look for it."""


def drawn_of(rows: list[Row], logits: Tensor, noise: VocabularyNoise) -> dict[int, DrawnToken]:
    """The tokens drawn, by index of those rows that want one.

    Args:
        logits: [rows, vocab] float32.
    """
    draws = {i: row.draw for i, row in enumerate(rows) if row.draw is not None and not row.draw.takes_largest}
    drawn = dict.fromkeys((i for i, row in enumerate(rows) if row.draw is not None), _MOST_PROBABLE)
    if draws:
        drawn |= zip(draws, draw_tokens(_part(logits, list(draws)), list(draws.values()), noise), strict=True)
    return drawn


def candidates_of(rows: list[Row], logits: Tensor) -> dict[int, tuple[list[int], list[float], list[int]]]:
    """Ids, logprobs and ranks of the most probable tokens, best first, by index of those rows that want some.

    Args:
        logits: [rows, vocab] float32.
    """
    searching = [index for index, row in enumerate(rows) if row.candidates]
    if not searching:
        return {}
    found = most_probable(_part(logits, searching), max(row.candidates for row in rows))
    wanted = [rows[index].candidates for index in searching]
    return {
        index: (ids[:most], logprobs[:most], ranks[:most])
        for index, most, (ids, logprobs, ranks) in zip(searching, wanted, found, strict=True)
    }


def positions_of(rows: list[Row], logits: Tensor, drawn: dict[int, DrawnToken]) -> list[PositionLogprobs | None]:
    """What is told of each row's position, of the token drawn there if one was; None where they are no distribution.

    Args:
        logits: [rows, vocab] float32.
    """
    token_ids = [drawn[i].token_id if i in drawn else row.token_id for i, row in enumerate(rows)]
    return position_logprobs(logits, token_ids, [row.options for row in rows])


def _part(logits: Tensor, indices: list[int]) -> Tensor:
    """These rows of the logits."""
    return logits if len(indices) == len(logits) else logits[sent(indices, logits.device)]
