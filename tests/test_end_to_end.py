"""The whole path on the embedded model: golden numbers, exact bytes of streamed text, every RPC without a schema."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceStub
from logprobs_server.demo import local_server
from serving import serving

GOLDEN = [None, -16.071, -8.589, -13.942, -0.120, -1.047, -10.875, -2.796]
BUF = Path(sys.executable).with_name("buf")


@pytest.fixture(scope="module")
def stub(embedded_folder: Path) -> Iterator[LogprobsServiceStub]:
    """A server with the embedded model."""
    with serving(embedded_folder) as stub:
        yield stub


def test_the_horse_raced_past_the_barn(stub: LogprobsServiceStub) -> None:
    request = pb.ScoreRequest(
        context=pb.Input(text="The horse raced past the barn fell."), logprobs=pb.LogprobOptions(top_count=5)
    )
    tokens = stub.Score(request).sequences[0].tokens
    assert b"".join(token.bytes for token in tokens) == b"The horse raced past the barn fell."
    told = [token.logprob if token.HasField("logprob") else None for token in tokens]
    assert told == [None, *(pytest.approx(value, abs=1e-3) for value in GOLDEN[1:])]
    assert [len(token.top) for token in tokens] == [0, *[5] * 7]


PROMPTS = {
    "emoji": "Repeat: 😀🚀👍🏽 😀🚀👍🏽 😀🚀",
    "flags": "🇫🇷 🇩🇪 🇯🇵 🇫🇷 🇩🇪",
    "chinese": "中国的首都是北京。日本的首都是",
    "japanese": "日本の首都は東京です。日本の首都は",
    "korean": "안녕하세요. 안녕하",
}


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 40], ids=lambda n: f"{n} tokens")
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_bytes_of_streamed_tokens_are_the_bytes_of_the_text(
    stub: LogprobsServiceStub, prompt: str, max_tokens: int
) -> None:
    stops = pb.Stopping(strings=["。。", "🚀🚀🚀"], ignore_eos=True)
    for temperature in (0.0, 1.2):
        sampling = pb.Sampling(temperature=temperature, seed=7)
        request = pb.GenerateRequest(
            prompt=pb.Input(text=prompt), max_tokens=max_tokens, sampling=sampling, stopping=stops, completion_count=2
        )
        tokens: dict[int, list[pb.Token]] = {0: [], 1: []}
        texts = {0: "", 1: ""}
        totals = {}
        for event in stub.Generate(request):
            for delta in event.decoded.deltas:
                tokens[delta.completion] += delta.tokens
                texts[delta.completion] += delta.text
            if event.WhichOneof("event") == "finished":
                totals[event.finished.completion] = event.finished.totals
        for index in (0, 1):
            joined = b"".join(token.bytes for token in tokens[index])
            assert texts[index] == joined.decode("utf-8", "replace")
            assert totals[index].byte_count == len(joined)
            assert totals[index].token_count == len(tokens[index])
            if not any(token.trimmed for token in tokens[index]):
                spelled = stub.Detokenize(pb.DetokenizeRequest(token_ids=[token.id for token in tokens[index]]))
                assert spelled.bytes == joined


def test_these_prompts_make_the_model_split_characters(stub: LogprobsServiceStub) -> None:
    """Else the test above would protect nothing."""
    split = set()
    for name, prompt in PROMPTS.items():
        request = pb.GenerateRequest(
            prompt=pb.Input(text=prompt),
            max_tokens=40,
            sampling=pb.Sampling(temperature=0),
            stopping=pb.Stopping(ignore_eos=True),
        )
        tokens = [t for event in stub.Generate(request) for delta in event.decoded.deltas for t in delta.tokens]
        if any("\ufffd" in token.bytes.decode("utf-8", "replace") for token in tokens):
            split.add(name)
    assert {"emoji", "chinese", "japanese"} <= split


CALLS = {
    "Score": {"context": {"text": "Two plus two is"}},
    "Generate": {"prompt": {"text": "Two plus two is"}, "max_tokens": 2},
    "Tokenize": {"input": {"text": "Two plus two"}},
    "Detokenize": {"token_ids": [504, 6391]},
    "GetModel": {},
    "ScoreStream": {"id": "a", "request": {"context": {"text": "Two"}}},
}


@pytest.fixture(scope="module")
def target(embedded_folder: Path) -> Iterator[str]:
    """The address of a server process."""
    with local_server([]) as address:
        yield address


@pytest.mark.parametrize("method", CALLS)
def test_buf_curl_reaches_every_rpc_by_reflection(method: str, target: str, tmp_path: Path) -> None:
    url = f"http://{target}/logprobs.v1.LogprobsService/{method}"
    command = [
        str(BUF),
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        "--data",
        json.dumps(CALLS[method]),
        url,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    if method == "ScoreStream":
        assert "unimplemented" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("{")
