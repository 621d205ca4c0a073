"""The clients, for threads and for asyncio: one method per RPC, plain values in, messages of the contract out.

Every method takes a ready request in place of its first argument too, so nothing of the contract is out of reach.
How requests are built, streams read and errors told is for the modules beside this one.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from logprobs.calls import AsyncGenerateStream, GenerateStream
from logprobs.channel import CHANNEL_OPTIONS
from logprobs.requests import (
    GenerateOptions,
    InputLike,
    ScoreOptions,
    detokenize_request,
    generate_request,
    score_request,
    tokenize_request,
)
from logprobs.score_stream import MAX_IN_FLIGHT, AsyncScoreStream, ScoreStream
from logprobs.status import call_error
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceStub

__all__ = ["AsyncClient", "Client"]

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Client:
    """Calls a server; blocks. May be shared by threads. As a context manager it closes its channel when left.

    Args:
        target: "HOST:PORT", or any of gRPC's names, for example "dns:///name:port" for all addresses of a name.
        timeout: seconds that a call may take, a stream to its end; None: any.
        credentials: grpc.ssl_channel_credentials(...), for example; None: no encryption.
        metadata: sent with every call.

    Every method raises a CallError if the call fails, and what its request's building raises, see `requests`.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> None:
        self._channel = (
            grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
        )
        self._stub = LogprobsServiceStub(self._channel)
        self._settings: dict[str, Any] = {"timeout": timeout, "metadata": tuple(metadata)}

    def score(
        self,
        context: InputLike | pb.ScoreRequest,
        continuations: Sequence[InputLike] = (),
        **options: Unpack[ScoreOptions],
    ) -> pb.ScoreResponse:
        """Scores the continuations given the context, or the context itself if there are none."""
        return self._answer(self._stub.Score, score_request(context, continuations, **options))

    def score_stream(
        self,
        requests: Iterable[InputLike | pb.ScoreRequest],
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        **options: Unpack[ScoreOptions],
    ) -> ScoreStream:
        """Scores many requests over one stream and gives results as they come, in any order.

        Args:
            requests: ready requests, or what is scored by itself; taken on another thread, as there is room.
            max_in_flight: requests that may be without a result at once.
            options: set on top of every request.
        """
        build = partial(score_request, **options)
        return ScoreStream(self._stub.ScoreStream, self._settings, requests, build, max_in_flight)

    def generate(self, prompt: InputLike | pb.GenerateRequest, **options: Unpack[GenerateOptions]) -> GenerateStream:
        """Starts to generate completions of the prompt; errors are raised when the stream is read."""
        request = generate_request(prompt, **options)
        return GenerateStream(self._stub.Generate(request, **self._settings))

    def tokenize(
        self, value: InputLike | pb.TokenizeRequest, *, add_special_tokens: bool | None = None
    ) -> pb.TokenizeResponse:
        """Turns an input into tokens, without running the model."""
        return self._answer(self._stub.Tokenize, tokenize_request(value, add_special_tokens=add_special_tokens))

    def detokenize(
        self, token_ids: Sequence[int] | pb.DetokenizeRequest, *, keep_special: bool = False
    ) -> pb.DetokenizeResponse:
        """Turns token ids into text; spells special tokens out if they are kept."""
        return self._answer(self._stub.Detokenize, detokenize_request(token_ids, keep_special=keep_special))

    def model(self) -> pb.GetModelResponse:
        """Tells which model is served, its limits, and the defaults of every option."""
        return self._answer(self._stub.GetModel, pb.GetModelRequest())

    def close(self) -> None:
        """Closes the channel; calls that still run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request) -> _Response:
        try:
            return method(request, **self._settings)
        except grpc.RpcError as error:
            raise call_error(error) from error


class AsyncClient:
    """The same for asyncio. To be made where its event loop runs."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> None:
        self._channel = (
            grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
        )
        self._stub = LogprobsServiceStub(self._channel)
        self._settings: dict[str, Any] = {"timeout": timeout, "metadata": tuple(metadata)}

    async def score(
        self,
        context: InputLike | pb.ScoreRequest,
        continuations: Sequence[InputLike] = (),
        **options: Unpack[ScoreOptions],
    ) -> pb.ScoreResponse:
        """Scores the continuations given the context, or the context itself if there are none."""
        return await self._answer(self._stub.Score, score_request(context, continuations, **options))

    def score_stream(
        self,
        requests: Iterable[InputLike | pb.ScoreRequest] | AsyncIterable[InputLike | pb.ScoreRequest],
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        **options: Unpack[ScoreOptions],
    ) -> AsyncScoreStream:
        """Scores many requests over one stream and gives results as they come, in any order.

        Args:
            requests: ready requests, or what is scored by itself; taken as there is room.
            max_in_flight: requests that may be without a result at once.
            options: set on top of every request.
        """
        build = partial(score_request, **options)
        return AsyncScoreStream(self._stub.ScoreStream, self._settings, requests, build, max_in_flight)

    def generate(
        self, prompt: InputLike | pb.GenerateRequest, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerateStream:
        """Starts to generate completions of the prompt; errors are raised when the stream is read."""
        request = generate_request(prompt, **options)
        return AsyncGenerateStream(self._stub.Generate(request, **self._settings))

    async def tokenize(
        self, value: InputLike | pb.TokenizeRequest, *, add_special_tokens: bool | None = None
    ) -> pb.TokenizeResponse:
        """Turns an input into tokens, without running the model."""
        return await self._answer(self._stub.Tokenize, tokenize_request(value, add_special_tokens=add_special_tokens))

    async def detokenize(
        self, token_ids: Sequence[int] | pb.DetokenizeRequest, *, keep_special: bool = False
    ) -> pb.DetokenizeResponse:
        """Turns token ids into text; spells special tokens out if they are kept."""
        return await self._answer(self._stub.Detokenize, detokenize_request(token_ids, keep_special=keep_special))

    async def model(self) -> pb.GetModelResponse:
        """Tells which model is served, its limits, and the defaults of every option."""
        return await self._answer(self._stub.GetModel, pb.GetModelRequest())

    async def close(self) -> None:
        """Closes the channel; calls that still run are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _answer(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request
    ) -> _Response:
        try:
            return await method(request, **self._settings)
        except grpc.RpcError as error:
            raise call_error(error) from error
