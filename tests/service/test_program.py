"""The program: what it prints, how it ends, and what the operator is told when it does not start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import safetensors.torch
import transformers
from harness import Stream, text, wait_until
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.v1.logprobs_pb2_grpc import LogprobsServiceStub
from logprobs_server.__main__ import main
from tiny_models import save_model

LENGTH = 1500
TIMEOUT_S = 120
LONG = pb.GenerateRequest(prompt=text("ab"), max_tokens=LENGTH, stopping=pb.Stopping(ignore_eos=True))


@contextmanager
def program(*flags: str) -> Iterator[subprocess.Popen[str]]:
    """The server as a program of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "logprobs_server", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_lets_streams_finish_and_refuses_new_calls(number: signal.Signals, tiny_folder: Path) -> None:
    with program("--model", str(tiny_folder), "--port", "0", "--threads", "1") as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line.startswith("serving tiny on 127.0.0.1:")
        with grpc.insecure_channel(line.rpartition(" ")[2]) as channel:
            stub = LogprobsServiceStub(channel)
            call = stub.Generate(LONG)
            first = next(call)
            process.send_signal(number)
            wait_until(lambda: _is_refused(stub))
            assert process.poll() is None
            stream = Stream([first, *call])
        assert stream.finished().totals.token_count == LENGTH
        rest, errors = process.communicate(timeout=TIMEOUT_S)
    assert rest == ""
    assert "Traceback" not in errors
    assert process.returncode == 0


def _is_refused(stub: LogprobsServiceStub) -> bool:
    try:
        stub.GetModel(pb.GetModelRequest())
    except grpc.RpcError as error:
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return False


def test_a_program_that_cannot_start_says_so_and_fails(tmp_path: Path) -> None:
    with program("--model", str(tmp_path), "--port", "0") as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert output == ""
    assert errors.splitlines()[-1] == f"logprobs-server: {tmp_path}: no model here: config.json is missing"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the program here until it ends; gives the exit status and what it told the operator."""
    monkeypatch.setenv("GRPC_VERBOSITY", "ERROR")  # the program sets it too; this puts it back

    def run(*flags: object) -> tuple[int, str]:
        try:
            status = main([str(flag) for flag in flags])
        except SystemExit as ended:
            status = int(str(ended.code))
        output, errors = capfd.readouterr()
        assert output == ""
        assert "Traceback" not in errors
        return status, errors

    return run


def test_a_port_in_use_is_told(tiny_folder: Path, start: Callable[..., tuple[int, str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, errors = start("--model", tiny_folder, "--port", port)
    assert status == 1
    assert told(errors) == [f"logprobs-server: cannot listen on 127.0.0.1:{port}"]


def told(errors: str) -> list[str]:
    """The lines that the program itself wrote."""
    return [line for line in errors.splitlines() if line.startswith("logprobs-server: ")]


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _weight_missing(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def _weights_cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _tokenizer_too_large(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["toomany"] = 300
    path.write_text(json.dumps(content))


def _architecture(config: transformers.PreTrainedConfig) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        config.save_pretrained(folder)

    return replace


def _state_space(folder: Path) -> None:
    save_model(transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4), folder)


UNSERVABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (_no_config, "config.json is missing"),
    "broken config": (_broken_config, "no readable JSON"),
    "no weights": (_no_weights, "no weights here"),
    "a weight missing": (_weight_missing, "model.layers.1.mlp.up_proj.weight"),
    "weights cut short": (_weights_cut_short, "the weights cannot be loaded"),
    "encoder and decoder": (_architecture(transformers.T5Config(vocab_size=300)), "t5 is an encoder-decoder"),
    "state space": (_state_space, "keep state without a KV cache"),
    "no tokenizer": (_no_tokenizer, "tokenizer"),
    "tokenizer of more tokens than the model": (_tokenizer_too_large, "the model only 300 tokens"),
}
"""What is wrong with a model, and what the operator must be told."""


@pytest.mark.parametrize("case", UNSERVABLE)
def test_a_model_that_cannot_be_served_is_told_in_one_line(
    case: str, tiny_folder: Path, tmp_path: Path, start: Callable[..., tuple[int, str]]
) -> None:
    spoil, reason = UNSERVABLE[case]
    folder = tmp_path / "spoilt"
    shutil.copytree(tiny_folder, folder)
    spoil(folder)
    status, errors = start("--model", folder, "--port", 0, "--threads", 1)
    assert status == 1
    [line] = told(errors)
    assert "spoilt" in line
    assert reason in line
    assert len(line) < 600


def test_a_cache_too_small_for_one_sequence_is_told(tiny_folder: Path, start: Callable[..., tuple[int, str]]) -> None:
    status, errors = start("--model", tiny_folder, "--port", 0, "--kv-cache-mib", 1)
    assert status == 1
    [line] = told(errors)
    assert "a KV cache of 1,048,576 bytes is too small" in line


BAD_FLAGS: dict[str, tuple[list[str], str]] = {
    "unknown": (["--nonsense", "1"], "--nonsense"),
    "no number": (["--port", "http"], "--port"),
    "below its range": (["--port", "-1"], "--port: -1 is below 0"),
    "above its range": (["--port", "70000"], "--port: 70000 is above 65535"),
    "two words": (["--max-queue", "0"], "--max-queue: 0 is below 1"),
    "three words": (["--max-response-bytes", "1"], "--max-response-bytes: 1 is below 65536"),
    "no choice": (["--dtype", "int8"], "--dtype: 'int8' is none of auto, float32, bfloat16, float16"),
    "log level": (["--log-level", "loud"], "--log-level: 'loud' is none of"),
    "nan": (["--grace-s", "nan"], "--grace-s: nan is below 0"),
    "no value": (["--model"], "--model"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_is_named(case: str, start: Callable[..., tuple[int, str]]) -> None:
    flags, reason = BAD_FLAGS[case]
    status, errors = start(*flags)
    assert status == 2
    assert reason in errors.splitlines()[-1]
