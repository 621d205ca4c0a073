"""What becomes of a scored request: its answer in one message, or in those of a stream, or its error. No gRPC."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from google.rpc import code_pb2
from logprobs.v1 import logprobs_pb2 as pb

from logprobs_server.costs import FLOAT_BYTES
from logprobs_server.engine.events import ContinuationScored, Event, JobStarted, PositionLogprobs
from logprobs_server.errors import ServiceError
from logprobs_server.messages import MessageBuilder, parts
from logprobs_server.requests import ScorePlan

__all__ = ["ScoreMessages", "item_error"]


class ScoreMessages:
    """Gathers the events of a ScorePlan's jobs, and makes its answer of them: one message, or those of a stream."""

    def __init__(self, builder: MessageBuilder, plan: ScorePlan) -> None:
        self._builder = builder
        self._plan = plan
        self._scored: defaultdict[tuple[int, int], list[PositionLogprobs]] = defaultdict(list)
        self._next: dict[tuple[int, int], PositionLogprobs] = {}
        self._cached = 0

    def push(self, job: int, event: Event) -> None:
        """Takes the next event of the plan's job of that number."""
        if isinstance(event, ContinuationScored):
            self._scored[job, event.index] += event.positions
            if event.next_token is not None:
                self._next[job, event.index] = event.next_token
        elif isinstance(event, JobStarted):
            self._cached += event.cached_token_count

    def response(self, *, whole: bool = True) -> pb.ScoreResponse:
        """The answer once all jobs have finished; all of it, or without what parts tell."""
        plan = self._plan
        return pb.ScoreResponse(
            sequences=[self._sequence(index, whole) for index in range(len(plan.texts))],
            model=self._builder.identity(),
            usage=pb.Usage(
                input_token_count=plan.input_token_count,
                cached_token_count=min(self._cached, plan.input_token_count),
            ),
        )

    def streamed(self, item_id: str) -> Iterator[pb.ScoreStreamResponse]:
        """The answer as a stream tells it, in parts if it could be too large; each is built when it is asked for."""
        if self._plan.in_parts:
            for index in range(len(self._plan.texts)):
                for part in self._sequence_parts(index):
                    yield pb.ScoreStreamResponse(id=item_id, part=part)
        yield pb.ScoreStreamResponse(id=item_id, response=self.response(whole=not self._plan.in_parts))

    def _sequence_parts(self, index: int) -> Iterator[pb.ScorePart]:
        limit = self._builder.response_bytes
        for tokens in parts(self._tokens(index), limit):
            yield pb.ScorePart(sequence=index, tokens=tokens)
        following = self._following(index)
        if following is not None:
            logprobs, step = following.all_logprobs, limit // 2 // FLOAT_BYTES
            for start in range(0, len(logprobs), step):
                yield pb.ScorePart(sequence=index, next_logprobs=logprobs[start : start + step])

    def _sequence(self, index: int, whole: bool) -> pb.ScoredSequence:
        text, positions, following = self._plan.texts[index], self._positions(index), self._following(index)
        logprob = _total(positions)
        sequence = pb.ScoredSequence(
            tokens=self._tokens(index) if whole else (),
            totals=pb.Totals(token_count=len(positions), byte_count=text.byte_count, logprob=logprob),
            greedy=all(position.greedy for position in positions),
            pmi=self._pmi(index, logprob),
            context_token_count=text.first,
            text_changed=text.text_changed,
        )
        if following is not None:
            sequence.next.CopyFrom(self._builder.next_token(following, self._plan.logprobs.token_ids))
            sequence.next.logprobs.extend(following.all_logprobs if whole else ())
        return sequence

    def _tokens(self, index: int) -> Iterator[pb.Token]:
        """The tokens that are told."""
        if self._plan.totals_only:
            return
        text, positions = self._plan.texts[index], self._positions(index)
        unscored = len(text.token_ids) - len(positions)  # the very first token of all
        assert unscored == (1 if text.first == 0 and text.token_ids else 0)
        for i in range(len(text.token_ids)):
            position = positions[i - unscored] if i >= unscored else None
            yield self._builder.given_token(text, i, position, self._plan.logprobs.token_ids)

    def _positions(self, index: int) -> list[PositionLogprobs]:
        return [position for place in self._plan.own.places[index] for position in self._scored[place]]

    def _following(self, index: int) -> PositionLogprobs | None:
        return self._next.get(self._plan.own.places[index][-1])

    def _pmi(self, index: int, logprob: float) -> float | None:
        """None without a neutral context, or where both totals are -inf."""
        neutral, jobs = self._plan.neutral, len(self._plan.own.jobs)
        if neutral is None:
            return None
        after = [p for job, branch in neutral.places[index] for p in self._scored[jobs + job, branch]]
        pmi = logprob - _total(after)
        return None if math.isnan(pmi) else pmi


def _total(positions: Sequence[PositionLogprobs]) -> float:
    return sum(position.logprob or 0.0 for position in positions)


def item_error(error: ServiceError) -> pb.ItemError:
    """What the status of a call would tell of an error."""
    told = pb.ItemError(
        code=code_pb2.Code.Value(error.status),
        reason=error.reason,
        message=error.message,
        violations=[pb.FieldViolation(field=v.field, description=v.description) for v in error.violations],
    )
    if error.retry_after_s is not None:
        told.retry_after.FromNanoseconds(int(error.retry_after_s * 1e9))
    return told
