"""What is shown: nothing invisible, nothing that steers the terminal, the growing text complete in the end."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logprobs import Client, Generation
from logprobs.live import LiveCompletions
from logprobs.show import show_generation_live, show_ranking, show_score
from logprobs.style import style_of
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.visible import one_line, readable, spelled, visible
from rich.console import Console
from scripted import ScriptedServer, drawn, generation_events

COMPLETIONS = [drawn([b"Par", b"is\n"], [-1.0, -2.0]), drawn([b" Lyon"], [-0.5])]


def console_of(width: int = 80, *, terminal: bool = True) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, height=24, highlight=False, color_system=None)
    return console, out


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


SEEN = [
    pytest.param(b" a", "·a", id="space"),
    pytest.param(b"\n\t\r", "↵\\t\\r", id="line end"),
    pytest.param(b"\x1b[31m", "\\x1b[31m", id="escape"),
    pytest.param("é馬\U0001f40e".encode(), "é馬\U0001f40e", id="letters"),
    pytest.param(b"\xc3", "\\xc3", id="half a character"),
    pytest.param("\u200b\xa0".encode(), "\\u200b\\xa0", id="invisible"),
]


@pytest.mark.parametrize(("data", "expected"), SEEN)
def test_every_byte_of_a_token_is_seen(data: bytes, expected: str) -> None:
    assert visible(data) == expected


@given(st.binary())
def test_nothing_visible_steers_the_terminal(data: bytes) -> None:
    assert visible(data).isprintable()
    text = data.decode("latin-1")
    assert all(c.isprintable() or c in "\n\t\xa0\xad" for c in readable(text))
    assert "\n" not in one_line(text)


def test_a_special_token_is_shown_by_its_name() -> None:
    assert spelled(pb.Token(id=1, special=True, special_name="<|im_end|>")) == "<|im_end|>"


def test_less_probable_tokens_have_other_colours() -> None:
    styles = [style_of(logprob) for logprob in (0.0, -0.7, -2.31, -4.7, float("-inf"), None)]
    assert styles == ["green", "yellow", "dark_orange", "red", "red", "dim"]


def collected(server: ScriptedServer, console: Console) -> Generation:
    with Client(server.target) as client, client.generate("Hi") as stream:
        return show_generation_live(console, stream)


def test_one_completion_runs_as_text(server: ScriptedServer) -> None:
    server.events = generation_events(COMPLETIONS[:1])
    console, out = console_of()
    generation = collected(server, console)
    assert plain(out.getvalue()) == "Paris\n\n"
    assert generation.completions[0].text == "Paris\n"


def test_several_completions_grow_a_row_each(server: ScriptedServer) -> None:
    server.events = generation_events(COMPLETIONS)
    console, out = console_of()
    generation = collected(server, console)
    last = [line.rstrip() for line in plain(out.getvalue()).splitlines()][-2:]
    assert last == ["  0 ✓ Paris↵", "  1 ✓  Lyon"]
    assert generation.ranking is not None


ROWS = [
    pytest.param([b"0123456", b"789abc"], "0123456789abc", id="fits"),
    pytest.param([b"0123456", b"789abcd"], "…123456789abcd", id="one too many"),
    pytest.param([b"0123456789abcdefghijk"], "…89abcdefghijk", id="one piece too long"),
    pytest.param(["馬".encode() * 9], "…馬馬馬馬馬馬", id="wide characters"),
]


@pytest.mark.parametrize(("pieces", "shown"), ROWS)
def test_a_full_row_shows_the_end_of_its_text(pieces: Sequence[bytes], shown: str) -> None:
    console, out = console_of(width=20)
    events = generation_events([drawn(pieces, [-1.0] * len(pieces)), drawn([b"x"], [-1.0])])
    with LiveCompletions(console) as live:
        for event in _in_single_tokens(events):
            live.push(event)
    rows = [line.rstrip() for line in plain(out.getvalue()).splitlines()][-2:]
    assert rows == [f"  0 ✓ {shown}", "  1 ✓ x"]


def test_only_what_leads_a_row_is_dim() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=80)
    with LiveCompletions(console) as live:
        for event in generation_events(COMPLETIONS):
            live.push(event)
    assert "\x1b[2m  1 ✓ \x1b[0m\x1b[32m Lyon" in out.getvalue().replace("\x1b[0;", "\x1b[")


def test_drawing_waits_between_events_but_not_at_the_end() -> None:
    console, out = console_of()
    ticks: Iterator[float] = iter([0.1, 0.1, *[0.11] * 50])
    with LiveCompletions(console, clock=lambda: next(ticks)) as live:
        for event in generation_events(COMPLETIONS):
            live.push(event)
        assert "Lyon" not in out.getvalue()
    assert "Lyon" in out.getvalue()


def _in_single_tokens(events: Sequence[pb.GenerateResponse]) -> Iterator[pb.GenerateResponse]:
    for event in events:
        if not event.HasField("decoded"):
            yield event
        for delta in event.decoded.deltas:
            for token in delta.tokens:
                part = pb.CompletionDelta(completion=delta.completion, tokens=[token], text=token.bytes.decode())
                yield pb.GenerateResponse(decoded=pb.TokensDecoded(deltas=[part]))


def test_without_a_terminal_nothing_is_shown_before_the_end(server: ScriptedServer) -> None:
    server.events = generation_events(COMPLETIONS)
    console, out = console_of(terminal=False)
    generation = collected(server, console)
    assert out.getvalue() == ""
    show_ranking(console, generation)
    assert [line.split()[1] for line in out.getvalue().splitlines()[1:]] == ["-0.5000", "-1.5000"]


def ranking_shown(criterion: int, *places: pb.RankedCompletion) -> list[list[str]]:
    """What is shown of completions of which nothing was sent, word by word."""
    ranked = pb.CompletionsRanked(completions=places)
    ranked.MergeFromString(bytes([2 << 3, criterion]))  # as a later server would send one that is not known here
    generation = Generation(started=None, prompt_tokens=(), prompt_text_changed=False, completions=(), ranking=ranked)
    console, out = console_of()
    show_ranking(console, generation)
    return [line.split() for line in out.getvalue().splitlines()]


def place(value: float, token_count: int, logprob: float) -> pb.RankedCompletion:
    return pb.RankedCompletion(value=value, totals=pb.Totals(token_count=token_count, logprob=logprob))


def test_a_loser_whose_tokens_were_not_sent_is_ranked_without_text() -> None:
    shown = ranking_shown(pb.RANKING_CRITERION_MEAN_LOGPROB, place(-0.5, 2, -1))
    assert shown == [["mean_logprob"], ["1.", "-0.5000", "2", "tokens", "#0", "(not", "sent)"]]


CRITERIA = [
    pytest.param(pb.RANKING_CRITERION_TOTAL_LOGPROB, "total_logprob", id="total"),
    pytest.param(pb.RANKING_CRITERION_LENGTH_NORMALIZED, "length_normalized", id="length normalized"),
    pytest.param(pb.RANKING_CRITERION_BEAM_SCORE, "beam_score", id="beam score"),
    pytest.param(99, "criterion 99", id="not known here"),
]


@pytest.mark.parametrize(("criterion", "name"), CRITERIA)
def test_a_ranking_shows_the_values_that_ranked_beside_the_means(criterion: int, name: str) -> None:
    head, first, empty = ranking_shown(criterion, place(-1.5, 4, -3), place(-math.inf, 0, 0))
    assert head == [*name.split(), "mean_logprob"]
    assert first[:5] == ["1.", "-1.5000", "-0.7500", "4", "tokens"]
    assert empty[:5] == ["2.", "none", "none", "0", "tokens"]


def test_markup_in_a_text_is_only_text() -> None:
    tokens = drawn([b"[bold]", b"[/]"], [-1.0, -1.0])
    console, out = console_of()
    show_score(console, pb.ScoreResponse(sequences=[pb.ScoredSequence(tokens=tokens)]))
    assert "[bold]" in out.getvalue()
    assert "[/]" in out.getvalue()


def test_all_that_is_known_of_a_sequence_is_shown() -> None:
    tokens = drawn([b"a"], [-1.0])
    tokens[0].entropy = 1.25
    tokens[0].named.add(id=1, bytes=b"yes", logprob=-3)
    sequence = pb.ScoredSequence(
        tokens=tokens, totals=pb.Totals(token_count=1, logprob=-1), pmi=0.5, greedy=True, text_changed=True
    )
    sequence.next.top.add(id=1, bytes=b"no", logprob=-2)
    console, out = console_of(width=200)
    show_score(console, pb.ScoreResponse(sequences=[sequence, sequence]))
    for expected in ("entropy", "1.250", "yes -3.00", "no -2.00", "pmi 0.5000", "greedy", "changed", "sequence 1"):
        assert expected in out.getvalue()
