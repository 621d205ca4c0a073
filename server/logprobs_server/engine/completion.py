"""One completion as it grows: what was drawn so far, its text, and whether that ends it. No tensors."""

from __future__ import annotations

from collections import deque

from logprobs_server.engine.adjustment import Adjustment, JobAdjustment
from logprobs_server.engine.events import (
    CompletionDecoded,
    CompletionFinished,
    DecodedToken,
    Event,
    FinishReason,
    PositionLogprobs,
)
from logprobs_server.engine.sampling import Draw
from logprobs_server.engine.types import GenerateJob, TokenBytes
from logprobs_server.text.completion import CompletionText, Delta, PlacedToken

__all__ = ["Completion"]


class Completion:
    """One completion: what was drawn so far, its text, and whether that ends it."""

    def __init__(
        self,
        job: GenerateJob,
        index: int,
        eos_token_ids: frozenset[int],
        room: int,
        adjustment: JobAdjustment | None,
    ) -> None:
        self._stopping = job.stopping
        self._sampling = job.sampling
        self._index = index
        self._eos = eos_token_ids
        self._stop_tokens = frozenset(job.stopping.token_ids)
        self._limit = min(job.max_tokens, room)
        self._limit_reason = FinishReason.MAX_TOKENS if job.max_tokens <= room else FinishReason.CONTEXT_FULL
        self._text = CompletionText(job.stopping.strings, job.stopping.include)
        self._adjustment = None if adjustment is None else Adjustment(adjustment)
        self._waiting: deque[tuple[PositionLogprobs, float, int]] = deque()
        self._masked = tuple(sorted(self._stop_tokens | (frozenset() if job.stopping.ignore_eos else eos_token_ids)))
        self.num_tokens = 0
        self._logprob = 0.0
        self._sampling_logprob = 0.0

    @property
    def limit(self) -> int:
        """Most tokens this completion may have."""
        return self._limit

    def next_draw(self) -> Draw:
        """How the next token is drawn. Tokens that would end the completion are masked until `min_tokens`."""
        return Draw(
            options=self._sampling,
            seed=self._sampling.seed + self._index,
            position=self.num_tokens,
            adjustment=self._adjustment,
            masked_ids=self._masked if self.num_tokens < self._stopping.min_tokens else (),
        )

    def accept(
        self, position: PositionLogprobs, sampling_logprob: float, set_size: int, vocabulary: TokenBytes
    ) -> list[Event]:
        """Takes a drawn token; the last event tells whether it was the completion's last."""
        token_id, logprob = position.token_id, position.logprob
        assert token_id is not None
        assert logprob is not None
        self.num_tokens += 1
        if self._adjustment is not None:
            self._adjustment.count(token_id)
        self._logprob += logprob
        self._sampling_logprob += sampling_logprob
        self._waiting.append((position, sampling_logprob, set_size))
        is_eos = token_id in self._eos and not self._stopping.ignore_eos
        if is_eos or token_id in self._stop_tokens:
            keep = self._stopping.include
            token_bytes = vocabulary.spelled(token_id) if keep else vocabulary.token_bytes(token_id)
            delta = self._text.push_stop_token(token_bytes, keep)
            if is_eos:
                return self._events(delta, FinishReason.END_OF_SEQUENCE)
            return self._events(delta, FinishReason.STOP_TOKEN, stop_token_id=token_id)
        token_bytes = vocabulary.token_bytes(token_id)
        delta = self._text.push(token_bytes, match_stops=self.num_tokens > self._stopping.min_tokens)
        if delta.stop is not None:
            return self._events(delta, FinishReason.STOP_STRING, stop_string=delta.stop)
        if self.num_tokens == self._limit:
            rest = self._text.flush()
            both = Delta(placed=delta.placed + rest.placed, text=delta.text + rest.text, stop=None)
            return self._events(both, self._limit_reason)
        return self._events(delta, None)

    def end(self, reason: FinishReason) -> list[Event]:
        """Ends it where it is."""
        return self._events(self._text.flush(), reason)

    def _events(
        self,
        delta: Delta,
        reason: FinishReason | None,
        *,
        stop_string: str | None = None,
        stop_token_id: int | None = None,
    ) -> list[Event]:
        events: list[Event] = []
        if delta.placed or delta.text:
            events.append(
                CompletionDecoded(
                    index=self._index,
                    tokens=[self._decoded(placed, *self._waiting.popleft()) for placed in delta.placed],
                    text=delta.text,
                )
            )
        if reason is not None:
            assert not self._waiting
            events.append(self._finished(reason, stop_string, stop_token_id))
        return events

    def _decoded(
        self, placed: PlacedToken, position: PositionLogprobs, sampling_logprob: float, size: int
    ) -> DecodedToken:
        return DecodedToken(
            position=position,
            sampling_logprob=sampling_logprob,
            sampling_set_size=size,
            bytes=placed.bytes,
            byte_offset=placed.byte_offset,
            code_point_offset=placed.code_point_offset,
            trimmed=placed.trimmed,
        )

    def _finished(self, reason: FinishReason, stop_string: str | None, stop_token_id: int | None) -> CompletionFinished:
        return CompletionFinished(
            index=self._index,
            reason=reason,
            token_count=self.num_tokens,
            byte_count=self._text.byte_count,
            logprob=self._logprob,
            sampling_logprob=self._sampling_logprob,
            stop_string=stop_string,
            stop_token_id=stop_token_id,
        )
