"""The command line client through its main(), against a real socket: output, exit status, interruption."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest
from google.protobuf.json_format import Parse
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from logprobs.cli import main
from logprobs.v1 import logprobs_pb2 as pb
from scripted import ScriptedServer, drawn, generation_events, status_with

EVENTS = generation_events([drawn([b"Par", b"is\n"], [-1.0, -2.0]), drawn([b" Lyon"], [-0.5])])
ONE = generation_events([drawn([b"Par", b"is\n"], [-1.0, -2.0])])
INVALID = status_with(
    "INVALID_ARGUMENT",
    "two rules",
    error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="1.5 is outside (0, 1]"),
            error_details_pb2.BadRequest.FieldViolation(field="max_tokens", description="-1 is below 0"),
        ]
    ),
)


class Cli:
    """Runs commands against the scripted server."""

    def __init__(self, server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
        self.server = server
        self._capsys = capsys

    def __call__(self, command: str, *arguments: str) -> tuple[int, str, str]:
        status = main([command, "--target", self.server.target, *arguments])
        captured = self._capsys.readouterr()
        return status, captured.out, captured.err


@pytest.fixture
def cli(server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line client, aimed at the scripted server."""
    return Cli(server, capsys)


def scored() -> pb.ScoreResponse:
    first, *others = drawn([b"The", b" h", b"\n\xf0"], [-9.0, -1.0, -2.0])
    first.ClearField("logprob")
    others[0].top.add(id=5, bytes=b" cat", logprob=-0.5)
    totals = pb.Totals(token_count=2, byte_count=7, logprob=-3)
    return pb.ScoreResponse(sequences=[pb.ScoredSequence(tokens=[first, *others], totals=totals)])


def test_score_shows_each_token_and_the_totals(cli: Cli) -> None:
    cli.server.score.CopyFrom(scored())
    status, out, _ = cli("score", "The h", "--top", "1")
    *rows, totals = out.splitlines()
    assert status == 0
    assert totals == "2 tokens · total -3.0000 · mean -1.5000 · perplexity 4.4817 · bits/byte 0.6183"
    assert [row.split() for row in rows] == [
        ["token", "logprob", "rank", "probability", "most", "probable"],
        ["The", "none"],
        ["·h", "-1.0000", "1", "0.368", "·cat", "-0.50"],
        ["↵\\xf0", "-2.0000", "1", "0.135"],
    ]


def test_generate_prints_the_text_alone_where_there_is_no_terminal(cli: Cli) -> None:
    cli.server.events = ONE
    assert cli("generate", "Hi") == (0, "Paris\n\n", "")


def test_generate_prints_several_completions_best_first(cli: Cli) -> None:
    cli.server.events = EVENTS
    status, out, _ = cli("generate", "Hi", "-n", "2")
    assert status == 0
    head, *lines = out.splitlines()
    assert head.split() == ["mean_logprob"]
    assert [line.split(maxsplit=6) for line in lines] == [
        ["1.", "-0.5000", "1", "tokens", "seed", "8", "Lyon"],
        ["2.", "-1.5000", "2", "tokens", "seed", "7", "Paris↵"],
    ]


def test_generate_tells_tokens_if_something_is_asked_of_them(cli: Cli) -> None:
    cli.server.events = ONE
    _, out, _ = cli("generate", "Hi", "--top", "1")
    assert "is↵" in out


def test_tokenize_shows_ids_bytes_and_offsets(cli: Cli) -> None:
    cli.server.tokenized.tokens.add(id=7, bytes=b" \xc3", byte_offset=2, code_point_offset=1)
    _, out, _ = cli("tokenize", "x")
    assert [line.split() for line in out.splitlines()[1:]] == [["7", "·\\xc3", "20", "c3", "2", "1"], ["1", "token"]]


def test_model_shows_every_value(cli: Cli) -> None:
    cli.server.told.CopyFrom(pb.GetModelResponse(model=pb.ModelIdentity(name="scripted"), eos_token_ids=[1, 2]))
    cli.server.told.defaults.sampling.temperature = 0.8
    _, out, _ = cli("model")
    shown = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert shown["model.name"].strip() == "scripted"
    assert shown["eos_token_ids"].strip() == "1, 2"
    assert shown["defaults.sampling.temperature"].strip() == "0.8"
    assert shown["has_chat_template"].strip() == "False"


JSON = [
    pytest.param(["score", "Hi"], "score", scored(), id="score"),
    pytest.param(["tokenize", "Hi"], "tokenized", pb.TokenizeResponse(tokens=[pb.Token(id=1)]), id="tokenize"),
    pytest.param(["model"], "told", pb.GetModelResponse(context_length=8), id="model"),
]


@pytest.mark.parametrize(("command", "answer", "message"), JSON)
def test_json_is_the_message_in_one_line(cli: Cli, command: Sequence[str], answer: str, message: Message) -> None:
    setattr(cli.server, answer, message)
    status, out, _ = cli(*command, "--json")
    (line,) = out.splitlines()
    assert status == 0
    assert Parse(line, type(message)()) == message


def test_json_of_a_stream_is_a_line_per_event(cli: Cli) -> None:
    cli.server.events = EVENTS
    _, out, _ = cli("generate", "Hi", "--json")
    assert [Parse(line, pb.GenerateResponse()) for line in out.splitlines()] == EVENTS
    assert "promptTokenCount" in json.loads(out.splitlines()[0])["started"]


def test_arguments_become_the_options_of_the_request(cli: Cli) -> None:
    cli.server.events = ONE
    cli(
        "generate",
        "Hi",
        "--chat",
        "--top-p",
        "0.5",
        "--stop",
        "a",
        "--stop",
        "b",
        "--token-id",
        "3",
        "--min-tokens",
        "1",
    )
    cli("score", "Hi", "a", "b", "--next-token", "--neutral-context", "n")
    generate, score = cli.server.requests
    assert isinstance(generate, pb.GenerateRequest)
    assert isinstance(score, pb.ScoreRequest)
    assert generate.prompt.conversation.messages[0] == pb.ChatMessage(role="user", content="Hi")
    assert (generate.sampling.top_p, list(generate.stopping.strings)) == (0.5, ["a", "b"])
    assert (list(generate.logprobs.token_ids), generate.stopping.min_tokens) == ([3], 1)
    assert not generate.HasField("max_tokens")
    assert ([c.text for c in score.continuations], score.next_token) == (["a", "b"], True)
    assert score.neutral_context.text == "n"


def test_a_dash_reads_standard_input_as_it_is(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ä \r\n".encode())))
    cli("tokenize", "-")
    assert cli.server.requests == [pb.TokenizeRequest(input=pb.Input(text="ä \r\n"))]


def test_the_target_comes_from_the_environment(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGPROBS_TARGET", server.target)
    assert main(["model", "--json"]) == 0


def test_a_refused_request_tells_every_rule_and_ends_with_1(cli: Cli) -> None:
    cli.server.failure = INVALID
    status, out, err = cli("score", "Hi")
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        "logprobs: INVALID_ARGUMENT: two rules",
        "  sampling.top_p: 1.5 is outside (0, 1]",
        "  max_tokens: -1 is below 0",
    ]


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "shown"])
def test_a_broken_stream_ends_with_1(cli: Cli, options: Sequence[str]) -> None:
    cli.server.events, cli.server.failure = EVENTS[:2], status_with("INTERNAL", "our fault")
    status, _, err = cli("generate", "Hi", *options)
    assert (status, err) == (1, "logprobs: the stream broke: INTERNAL: our fault\n")


WRONG = [
    pytest.param(["generate", "Hi", "--top-k", "99999999999"], id="not of its type"),
    pytest.param(["score", "a\udcff"], id="no text"),
]


@pytest.mark.parametrize("arguments", WRONG)
def test_what_cannot_be_sent_ends_with_2(cli: Cli, arguments: Sequence[str]) -> None:
    status, out, err = cli(arguments[0], *arguments[1:])
    assert (status, out) == (2, "")
    assert err.startswith("logprobs: ")
    assert cli.server.requests == []


def test_wrong_arguments_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate"])
    assert caught.value.code == 2
    assert "TEXT" in capsys.readouterr().err


def test_without_rich_json_works_and_the_rest_tells_what_to_install(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("logprobs.show", "logprobs.live"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delattr("logprobs.show", raising=False)
    assert cli("model", "--json")[0] == 0
    status, _, err = cli("model")
    assert status == 2
    assert 'pip install "logprobs[cli]"' in err


def started(target: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "logprobs.cli", *arguments, "--target", target]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("command", [["score", "--json"], ["generate", "--json"], ["generate"]], ids=" ".join)
def test_an_interrupt_cancels_the_call_and_ends_with_130(server: ScriptedServer, command: Sequence[str]) -> None:
    server.events, server.hangs = EVENTS[:2], True
    with started(server.target, *command, "Hi") as process:
        assert server.entered.wait(30)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert server.left.wait(30)


def test_events_are_printed_as_they_come(server: ScriptedServer) -> None:
    server.events, server.hangs = EVENTS[:1], True
    with started(server.target, "generate", "Hi", "--json") as process:
        assert process.stdout is not None
        assert Parse(process.stdout.readline(), pb.GenerateResponse()) == EVENTS[0]
        process.send_signal(signal.SIGINT)


def test_output_that_nobody_reads_ends_quietly(server: ScriptedServer) -> None:
    server.events = generation_events([drawn([b"x"] * 2000, [-1.0] * 2000)])
    for options in ([], ["--json"]):
        with started(server.target, "generate", "Hi", "--top", "1", *options) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.wait(30) == 141
            assert process.stderr.read() == ""
