"""Builds the server and runs it: loading, health, reflection, signals, graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import grpc
import torch
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import add_LogprobsServiceServicer_to_server

from logprobs_server.config import Config
from logprobs_server.engine.engine import TorchEngine, tell_each
from logprobs_server.engine.model.checkpoint import LoadOptions, ModelNotServableError, load_tokenizer
from logprobs_server.engine.model.loading import load_model
from logprobs_server.engine.types import Told
from logprobs_server.health import Health
from logprobs_server.interceptor import CallInterceptor
from logprobs_server.loop import Bell
from logprobs_server.messages import MessageBuilder
from logprobs_server.models.resolve import ModelNotUsableError, resolve_model
from logprobs_server.requests import Limits
from logprobs_server.servicer import LogprobsServicer, Ready
from logprobs_server.text.vocabulary import UnsupportedTokenizerError, Vocabulary
from logprobs_server.validation import Validator

__all__ = ["RunningServer", "load", "running_server", "serve"]

_log = logging.getLogger(__name__)
_SERVICE = pb.DESCRIPTOR.services_by_name["LogprobsService"].full_name
_STOP_STRINGS = 16


class StartError(Exception):
    """The server cannot start; the message is the reason."""


async def serve(config: Config) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit status."""
    _log.info("starting with %s", config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        async with running_server(config) as server:
            loading = asyncio.create_task(server.load())
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                _settle()
                print(f"serving {loading.result()} on {config.host}:{server.port}", flush=True)
                await stopping
            _log.info("stopping")
    except StartError as error:
        print(f"logprobs-server: {error}", file=sys.stderr)
        return 1
    return 0


def _settle() -> None:
    """Keeps what loading did from stopping all streams later."""
    gc.freeze()  # what is loaded stays; to look through it again and again would take 0.1 s each time
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # glibc's
        trim(0)  # protobuf calls it after every 10,000th freed piece of a message; the first call took up to 53 ms


class RunningServer:
    """A server that listens; healthy once its model is loaded."""

    def __init__(self, config: Config, servicer: LogprobsServicer, health_servicer: Health, port: int) -> None:
        self._config = config
        self._servicer = servicer
        self._health = health_servicer
        self.port = port
        self.engine: TorchEngine | None = None
        self._told: SimpleQueue[Told] = SimpleQueue()
        self._bell = Bell(self._tell)

    async def load(self) -> str:
        """Loads the model and declares the server healthy; returns the model's name.

        Raises:
            StartError: the model cannot be served.
        """
        loop = asyncio.get_running_loop()
        # The thread that loads must end before the engine's starts: as soon as two threads of a process have workers
        # of OpenMP, all workers sleep sooner and wake later (measured: a decode step of 9.5 ms took 17.9).
        with ThreadPoolExecutor(max_workers=1) as loader:
            loading = loop.run_in_executor(loader, load, self._config, self._hand_over)
            self._servicer.ready, self.engine = await loading
        self.engine.start()
        self._health.serving()
        return self.engine.description.name

    async def close(self) -> None:
        """Ends the engine and all that it has to tell."""
        if self.engine is not None:
            await asyncio.to_thread(self.engine.close)
        self._bell.close()
        self._tell()

    def _hand_over(self, told: Told) -> None:
        """On the engine's thread."""
        self._told.put(told)
        self._bell.ring()

    def _tell(self) -> None:
        while not self._told.empty():
            tell_each(self._told.get())


@contextlib.asynccontextmanager
async def running_server(config: Config) -> AsyncIterator[RunningServer]:
    """A server that listens and says NOT_SERVING until `load()` is done; on leaving it stops gracefully.

    Raises:
        StartError: the port cannot be had.
    """
    server = grpc.aio.server(
        interceptors=[CallInterceptor(_SERVICE)],
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", config.max_request_bytes),
            ("grpc.max_send_message_length", config.max_response_bytes),
        ],
    )
    servicer, health_servicer = LogprobsServicer(), Health(_SERVICE)
    add_LogprobsServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(f"{config.host}:{config.port}")
    except RuntimeError as error:
        raise StartError(f"cannot listen on {config.host}:{config.port}") from error
    await server.start()
    running = RunningServer(config, servicer, health_servicer, port)
    try:
        yield running
    finally:
        health_servicer.close()
        await server.stop(config.grace_s)
        await running.close()


def load(config: Config, hand_over: Callable[[Told], None] = tell_each) -> tuple[Ready, TorchEngine]:
    """Finds, converts if need be, and loads the model. Takes seconds; not for the event loop.

    Args:
        hand_over: as the engine takes it.
    Raises:
        StartError: the model cannot be served.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        source = resolve_model(config.model, config.cache_dir)
        path = str(source.folder or source.hub_id)
        model = load_model(
            LoadOptions(
                path=path,
                name=source.name,
                revision=source.revision,
                max_sequences=config.max_sequences,
                dtype=config.dtype,
                device=config.device,
                context_length=config.context_length,
                kv_cache_bytes=None if config.kv_cache_mib is None else config.kv_cache_mib << 20,
                kernels_dir=config.cache_dir / "kernels" if config.kernels else None,
            )
        )
        tokenizer = load_tokenizer(path, source.name)
        vocabulary = Vocabulary(tokenizer.tokenizer, size=model.description.vocabulary_size)
    except (ModelNotUsableError, ModelNotServableError) as error:
        raise StartError(str(error)) from error
    except UnsupportedTokenizerError as error:
        raise StartError(f"{source.name}: {error}") from error
    engine = TorchEngine(
        model,
        vocabulary,
        max_sequences=config.max_sequences,
        max_step_tokens=config.max_step_tokens,
        max_queue=config.max_queue,
        hand_over=hand_over,
    )
    limits = Limits(
        top_count=config.max_top_count,
        completion_count=config.max_completions,
        beam_count=min(config.max_beams, config.max_sequences),
        stop_strings=_STOP_STRINGS,
        continuations=config.max_continuations,
        alternatives=config.max_alternatives,
        request_bytes=config.max_request_bytes,
        response_bytes=config.max_response_bytes,
        full_distribution=config.allow_full_distribution,
    )
    description = model.description
    ready = Ready(
        engine=engine,
        validator=Validator(vocabulary, description, limits, tokenizer.render, engine.unfit),
        builder=MessageBuilder(vocabulary, description, limits, tokenizer.render is not None),
    )
    return ready, engine
