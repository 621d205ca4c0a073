"""What becomes of a scored request: its answer in one message, or in those of a stream, or its error. No gRPC."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

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

    def response(self) -> pb.ScoreResponse:
        """The answer once all jobs have finished."""
        response = pb.ScoreResponse()
        self._fill(response, whole=True)
        return response

    def streamed(self, item_id: str) -> Iterator[pb.ScoreStreamResponse]:
        """The answer as a stream tells it, in parts if it could be too large; each is built when it is asked for."""
        if self._plan.in_parts:
            for index in range(len(self._plan.texts)):
                for part in self._sequence_parts(index):
                    yield pb.ScoreStreamResponse(id=item_id, part=part)
        last = pb.ScoreStreamResponse(id=item_id)
        self._fill(last.response, whole=not self._plan.in_parts)
        yield last

    def _fill(self, response: pb.ScoreResponse, *, whole: bool) -> None:
        """Writes all of the answer into an empty message, or what parts do not tell."""
        for index in range(len(self._plan.texts)):
            self._fill_sequence(response.sequences.add(), index, whole)
        response.model.CopyFrom(self._builder.identity())
        response.usage.input_token_count = self._plan.input_token_count
        response.usage.cached_token_count = min(self._cached, self._plan.input_token_count)

    def _sequence_parts(self, index: int) -> Iterator[pb.ScorePart]:
        limit = self._builder.response_bytes
        for tokens in parts(self._tokens(index, pb.Token), limit):
            yield pb.ScorePart(sequence=index, tokens=tokens)
        following = self._following(index)
        if following is not None:
            logprobs, step = following.all_logprobs, limit // 2 // FLOAT_BYTES
            for start in range(0, len(logprobs), step):
                yield pb.ScorePart(sequence=index, next_logprobs=logprobs[start : start + step])

    def _fill_sequence(self, sequence: pb.ScoredSequence, index: int, whole: bool) -> None:
        text, positions, following = self._plan.texts[index], self._positions(index), self._following(index)
        logprob, pmi = _total(positions), self._pmi(index, _total(positions))
        if whole:
            list(self._tokens(index, sequence.tokens.add))
        sequence.totals.token_count, sequence.totals.byte_count = len(positions), text.byte_count
        sequence.totals.logprob = logprob
        sequence.greedy = all(position.greedy for position in positions)
        if pmi is not None:
            sequence.pmi = pmi
        sequence.context_token_count = text.first
        sequence.text_changed = text.text_changed
        if following is not None:
            sequence.next.SetInParent()
            self._builder.tell_distribution(sequence.next, following, self._plan.logprobs.token_ids)
            sequence.next.logprobs.extend(following.all_logprobs if whole else ())

    def _tokens(self, index: int, new: Callable[[], pb.Token]) -> Iterator[pb.Token]:
        """The tokens that are told, each written into a new one."""
        if self._plan.totals_only:
            return
        text, positions = self._plan.texts[index], self._positions(index)
        unscored = len(text.token_ids) - len(positions)  # the very first token of all
        assert unscored == (1 if text.first == 0 and text.token_ids else 0)
        for i in range(len(text.token_ids)):
            position = positions[i - unscored] if i >= unscored else None
            yield self._builder.given_token(new(), text, i, position, self._plan.logprobs.token_ids)

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
