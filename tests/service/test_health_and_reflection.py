"""What tools see that know nothing of the contract: health, reflection, and every method through `buf curl`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from harness import SERVICE, Served, answer, refusal, running, text
from logprobs.v1 import logprobs_pb2 as pb
from logprobs_server.health import Health

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ["", SERVICE]
REQUESTS = {
    "Score": pb.ScoreRequest(context=text("a")),
    "Generate": pb.GenerateRequest(prompt=text("a")),
    "Tokenize": pb.TokenizeRequest(input=text("a")),
    "Detokenize": pb.DetokenizeRequest(),
    "GetModel": pb.GetModelRequest(),
}


def health(served: Served) -> list[Any]:
    """The status of the server and that of the service."""
    stub = health_pb2_grpc.HealthStub(served.channel)
    return [stub.Check(health_pb2.HealthCheckRequest(service=name)).status for name in NAMES]


def watched(served: Served) -> Iterator[Any]:
    """The service's status as it changes."""
    stub = health_pb2_grpc.HealthStub(served.channel)
    stream = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    return (response.status for response in stream)


@pytest.fixture(scope="module")
def loading(tiny_folder: Path) -> Iterator[Served]:
    """A server whose model is not there yet."""
    with running(tiny_folder, loaded=False) as served:
        yield served


def test_a_server_that_loads_is_not_serving(loading: Served) -> None:
    assert health(loading) == [NOT_SERVING, NOT_SERVING]


@pytest.mark.parametrize("method", REQUESTS)
def test_calls_while_loading_are_unavailable(method: str, loading: Served) -> None:
    refused = refusal(lambda: answer(loading, REQUESTS[method]))
    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert (refused.info.domain, refused.info.reason) == ("logprobs", "LOADING")


def test_health_follows_loading_and_stopping(tiny_folder: Path) -> None:
    with running(tiny_folder, loaded=False) as served:
        statuses = watched(served)
        assert next(statuses) == NOT_SERVING
        served.load()
        assert next(statuses) == SERVING
        assert health(served) == [SERVING, SERVING]
        assert answer(served, REQUESTS["Score"])
        served.stop()
        assert next(statuses) == NOT_SERVING


def test_who_watches_health_does_not_hold_up_the_end(tiny_folder: Path) -> None:
    with running(tiny_folder, grace_s=3600) as served:  # longer than the test may take
        statuses = watched(served)
        assert next(statuses) == SERVING
        served.stop()
        assert list(statuses) == [NOT_SERVING]


def test_a_watcher_still_sending_when_the_server_closes_is_told_the_last_status() -> None:
    async def statuses() -> list[Any]:
        health_servicer = Health(SERVICE)
        health_servicer.serving()
        watch = health_servicer.Watch(health_pb2.HealthCheckRequest(service=SERVICE), None)
        first = await anext(watch)
        health_servicer.close()  # before the watch comes back from sending the first
        return [first.status, *[response.status async for response in watch]]

    assert asyncio.run(statuses()) == [SERVING, NOT_SERVING]


def test_a_service_nobody_knows_has_no_health(tiny: Served) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(tiny.channel).Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(tiny: Served) -> None:
    database = ProtoReflectionDescriptorDatabase(tiny.channel)
    assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
    assert database.FindFileContainingSymbol(SERVICE).name == "logprobs/v1/logprobs.proto"


def curl(served: Served, method: str, request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Calls a method by its name, without a schema."""
    buf = Path(sys.executable).parent / "buf"
    url = f"http://{served.target}/{SERVICE}/{method}"
    flags = ["--http2-prior-knowledge", "--protocol", "grpc", "--data", json.dumps(request)]
    return subprocess.run([buf, "curl", *flags, url], capture_output=True, text=True, timeout=60, check=False)


CURLED: dict[str, tuple[dict[str, Any], str]] = {
    "Score": ({"context": {"text": "ab"}}, "sequences"),
    "Generate": ({"prompt": {"text": "ab"}, "maxTokens": 1}, "finished"),
    "Tokenize": ({"input": {"text": "ab"}}, "tokens"),
    "Detokenize": ({"tokenIds": [65]}, "text"),
    "GetModel": ({}, "vocabularySize"),
}


@pytest.mark.parametrize("method", CURLED)
def test_curl_reaches_every_method_without_a_schema(method: str, tiny: Served) -> None:
    request, field = CURLED[method]
    done = curl(tiny, method, request)
    assert done.returncode == 0, done.stderr
    assert f'"{field}"' in done.stdout


def test_curl_scores_over_a_stream(tiny: Served) -> None:
    done = curl(tiny, "ScoreStream", {"id": "mine", "request": {"context": {"text": "a"}}})
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["id"] == "mine"
    assert len(answer["response"]["sequences"]) == 1
