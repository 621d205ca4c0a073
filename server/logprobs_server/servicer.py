"""The service's methods: a request becomes a plan, the plan a job, the job's events messages. No torch, no policy."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceServicer

from logprobs_server.engine.types import Engine
from logprobs_server.errors import NotReadyError
from logprobs_server.jobs import checked, run, scored
from logprobs_server.messages import GenerateMessages, MessageBuilder
from logprobs_server.score_stream import ScoreStream
from logprobs_server.validation import Validator

__all__ = ["LogprobsServicer", "Ready"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a loaded model brings."""

    engine: Engine
    validator: Validator
    builder: MessageBuilder


class LogprobsServicer(LogprobsServiceServicer):
    """Implements the contract; answers UNAVAILABLE until `ready` is set.

    Streams are written to, one of gRPC's two ways: generators, each in another, took messages longer.
    """

    def __init__(self) -> None:
        self.ready: Ready | None = None

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:  # noqa: N802
        """Scores a context, or continuations of it."""
        ready = self._ready()
        plan = await checked(ready.validator.score, request, continuations=len(request.continuations))
        return (await scored(ready.engine, ready.builder, plan)).response()

    async def ScoreStream(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ScoreStreamRequest], context: Any
    ) -> None:
        """Scores many requests, and answers them as they finish."""
        ready = self._ready()
        stream = ScoreStream(ready.engine, ready.validator, ready.builder)
        async with aclosing(stream.answers(request_iterator)) as responses:
            async for response in responses:
                await context.write(response)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """Draws completions and streams their tokens as they decode."""
        ready = self._ready()
        plan = await checked(partial(ready.validator.generate, received_s=time.monotonic()), request)
        await run(ready.engine, plan.job, GenerateMessages(ready.builder, plan).push, context.write)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        """Turns text into tokens."""
        ready = self._ready()
        return ready.builder.tokenized(await checked(ready.validator.tokenize, request))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:  # noqa: N802
        """Turns token ids into text."""
        ready = self._ready()
        token_ids = await checked(ready.validator.detokenize, request)
        return ready.builder.detokenized(token_ids, request.keep_special)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        """Tells which model is served."""
        ready = self._ready()
        ready.validator.model(request)
        return ready.builder.model()

    def _ready(self) -> Ready:
        if self.ready is None:
            raise NotReadyError("the model is loading")
        return self.ready
