"""What a Generate call gave, put together: the completions and their ranking.

Plain data. Knows nothing of streams: the assembler builds it, whole or as far as a broken stream came.
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass

from logprobs.ranking import bits_per_byte, mean_logprob, perplexity
from logprobs.v1 import logprobs_pb2 as pb

__all__ = ["Completion", "Generation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One completion.

    index: which draw, from 0.
    seed: replays this completion alone; None for beam search.
    tokens: every token drawn, end-of-sequence and stop tokens included.
    text: what is certain of it; all of it once finished.
    finish_reason: FINISH_REASON_UNSPECIFIED where the stream broke before the end.
    stop_string, stop_token_id: which stop ended it; None if none did.
    totals: over `tokens`; of an unfinished one, over those that arrived.
    """

    index: int
    seed: int | None
    tokens: tuple[pb.Token, ...]
    text: str
    finish_reason: pb.FinishReason.ValueType
    stop_string: str | None
    stop_token_id: int | None
    totals: pb.Totals

    @property
    def finished(self) -> bool:
        """Whether its end arrived."""
        return self.finish_reason != pb.FINISH_REASON_UNSPECIFIED

    @property
    def bytes(self) -> builtins.bytes:
        """The tokens' exact bytes, put together; `text` is those decoded."""
        return b"".join(token.bytes for token in self.tokens)

    @property
    def mean_logprob(self) -> float | None:
        """Logprob per token, in nats; None without tokens."""
        return mean_logprob(self.totals)

    @property
    def perplexity(self) -> float | None:
        """Exponential of minus the mean logprob; None without tokens."""
        return perplexity(self.totals)

    @property
    def bits_per_byte(self) -> float | None:
        """Minus the total in bits, per byte of text; None without bytes."""
        return bits_per_byte(self.totals)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole Generate call; within a StreamError, what had arrived.

    started: what the server resolved; None if not even that arrived.
    prompt_tokens: if the request asked for them.
    completions: those whose tokens were sent, by index.
    ranking: every completion drawn, best first, losers included; None if one was drawn.
    """

    started: pb.GenerationStarted | None
    prompt_tokens: tuple[pb.Token, ...]
    prompt_text_changed: bool
    completions: tuple[Completion, ...]
    ranking: pb.CompletionsRanked | None

    @property
    def ranked(self) -> tuple[Completion, ...]:
        """The completions, best first; by index where there is no ranking."""
        if self.ranking is None:
            return self.completions
        by_index = {completion.index: completion for completion in self.completions}
        order = (ranked.completion for ranked in self.ranking.completions)
        return tuple(by_index[index] for index in order if index in by_index)
