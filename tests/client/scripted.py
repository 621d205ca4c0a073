"""A real gRPC server whose answers the test chooses, and sound streams for it to send. Runs no model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceServicer, add_LogprobsServiceServicer_to_server

__all__ = ["ScriptedServer", "drawn", "generation_events", "scripted_server", "status_with"]

DETAILS = "grpc-status-details-bin"
SERVICE = pb.DESCRIPTOR.services_by_name["LogprobsService"].full_name


def status_with(code: str, message: str, *details: Message) -> status_pb2.Status:
    """A status with details, as the service sends it."""
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


class ScriptedServer(LogprobsServiceServicer):
    """Sends `score`, `events`, and so on; then fails with `failure`, or waits for the caller to leave if it `hangs`."""

    def __init__(self) -> None:
        self.target = ""
        self.requests: list[Message] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.score = pb.ScoreResponse()
        self.tokenized = pb.TokenizeResponse()
        self.told = pb.GetModelResponse()
        self.events: Sequence[pb.GenerateResponse] = ()
        self.failure: status_pb2.Status | None = None
        self.failures_left = -1
        self.hangs = False
        self.entered = threading.Event()
        self.left = threading.Event()

    def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:  # noqa: N802
        self._begin(request, context)
        self._end(context)
        return self.score

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        self._begin(request, context)
        return self.tokenized

    def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:  # noqa: N802
        self._begin(request, context)
        return pb.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        self._begin(request, context)
        return self.told

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self._begin(request, context)
        yield from self.events
        self._end(context)

    def ScoreStream(self, request_iterator: Any, context: Any) -> Iterator[pb.ScoreStreamResponse]:  # noqa: N802
        raise NotImplementedError

    def _begin(self, request: Message, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        context.add_callback(self.left.set)
        self.entered.set()

    def _end(self, context: Any) -> None:
        if self.hangs:
            self.left.wait()
        if self.failure is not None and self.failures_left != 0:
            self.failures_left -= 1
            context.set_trailing_metadata(((DETAILS, self.failure.SerializeToString()),))
            code = next(c for c in grpc.StatusCode if c.value[0] == self.failure.code)
            context.abort(code, self.failure.message)


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """Listens on a free port while the context lasts."""
    servicer = ScriptedServer()
    server = grpc.server(ThreadPoolExecutor(8))
    healths = health.HealthServicer()
    healths.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    add_LogprobsServiceServicer_to_server(servicer, server)
    servicer.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield servicer
    finally:
        servicer.left.set()
        server.stop(0).wait()


def drawn(pieces: Sequence[bytes], logprobs: Sequence[float]) -> list[pb.Token]:
    """Tokens of a completion, with the offsets and numbers that go with them."""
    tokens, offset = [], 0
    for token_id, (piece, logprob) in enumerate(zip(pieces, logprobs, strict=True)):
        token = pb.Token(id=token_id, bytes=piece, logprob=logprob, rank=1, byte_offset=offset)
        token.sampling_logprob, token.sampling_set_size = logprob / 2, 3
        tokens.append(token)
        offset += len(piece)
    return tokens


def totals_of(tokens: Sequence[pb.Token]) -> pb.Totals:
    """Their totals."""
    return pb.Totals(
        token_count=len(tokens),
        byte_count=sum(len(token.bytes) for token in tokens),
        logprob=sum(token.logprob for token in tokens),
        sampling_logprob=sum(token.sampling_logprob for token in tokens),
    )


def text_of(tokens: Sequence[pb.Token]) -> str:
    """Their text."""
    return b"".join(token.bytes for token in tokens).decode("utf-8", "replace")


def generation_events(
    completions: Sequence[Sequence[pb.Token]], *, seed: int = 7, prompt: Sequence[pb.Token] = ()
) -> list[pb.GenerateResponse]:
    """A sound stream: each completion decoded at once, then finished; ranked by their mean."""
    started = pb.GenerationStarted(
        model=pb.ModelIdentity(name="scripted", revision="1", dtype="float32"),
        seed=seed,
        prompt_token_count=len(prompt) or 3,
        completion_count=len(completions),
    )
    events = [pb.GenerateResponse(started=started)]
    if prompt:
        events.append(pb.GenerateResponse(prompt_scored=pb.PromptScored(tokens=prompt)))
    for index, tokens in enumerate(completions):
        delta = pb.CompletionDelta(completion=index, tokens=tokens, text=text_of(tokens))
        events.append(pb.GenerateResponse(decoded=pb.TokensDecoded(deltas=[delta])))
        finished = pb.CompletionFinished(completion=index, reason=pb.FINISH_REASON_MAX_TOKENS, totals=totals_of(tokens))
        events.append(pb.GenerateResponse(finished=finished))
    if len(completions) > 1:
        events.append(pb.GenerateResponse(ranked=_ranked(completions)))
    return events


def _ranked(completions: Sequence[Sequence[pb.Token]]) -> pb.CompletionsRanked:
    places = []
    for index, tokens in enumerate(completions):
        totals = totals_of(tokens)
        value = totals.logprob / max(totals.token_count, 1)
        places.append(pb.RankedCompletion(completion=index, value=value, totals=totals))
    places.sort(key=lambda place: (-place.value, place.completion))
    return pb.CompletionsRanked(completions=places, criterion=pb.RANKING_CRITERION_MEAN_LOGPROB)
