"""Shows answers in a terminal, with rich. Knows what a terminal is, not which command was given.

Where the output is no terminal there is no colour, no cutting of lines, and of a generation only the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from logprobs.calls import GenerateStream
from logprobs.generation import Completion, Generation
from logprobs.live import LiveCompletions
from logprobs.ranking import bits_per_byte, mean_logprob, perplexity
from logprobs.style import style_of
from logprobs.v1 import logprobs_pb2 as pb
from logprobs.visible import one_line, readable, spelled

__all__ = [
    "make_console",
    "show_generation_live",
    "show_model",
    "show_ranking",
    "show_score",
    "show_tokenized",
    "show_tokens",
]

_MEAN = "mean_logprob"
_LISTS = ("most probable", "named")
_UNBOUNDED = 1 << 16
"""Columns of what is no terminal: files and pipes get whole lines."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leaves it to the program to end."""
        raise BrokenPipeError


def make_console() -> Console:
    """A console on standard output that cuts lines in a terminal only."""
    console = _Console(highlight=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


def show_score(console: Console, response: pb.ScoreResponse) -> None:
    """A table per sequence, its totals below."""
    for index, sequence in enumerate(response.sequences):
        if len(response.sequences) > 1:
            console.print(Text(f"sequence {index}", style="bold"))
        if sequence.tokens:
            show_tokens(console, sequence.tokens)
        console.print(_score_summary(sequence), soft_wrap=True)
        if sequence.HasField("next"):
            console.print(Text("next: ") + _alternatives([*sequence.next.top, *sequence.next.named]), soft_wrap=True)


def show_tokens(console: Console, tokens: Sequence[pb.Token]) -> None:
    """A row per token, coloured by its logprob; a column per thing known of any of them."""
    extra = [(name, cell) for name, cell in _EXTRA_COLUMNS if any(map(cell, tokens))]
    table = _table("token", "logprob>", "rank>", "probability>", *(name for name, _ in extra))
    for token in tokens:
        table.add_row(_coloured(token), *_numbers(token), *(cell(token) for _, cell in extra))
    console.print(table)


def show_generation_live(console: Console, stream: GenerateStream) -> Generation:
    """Shows completions as they grow, one as running text, several a row each; gives the whole.

    Without a terminal it prints one completion's text at the end; several are for `show_ranking`.
    """
    if console.is_terminal:
        with LiveCompletions(console) as live:
            for event in stream:
                live.push(event)
        return stream.collect()
    generation = stream.collect()
    if generation.ranking is None:
        for completion in generation.completions:
            console.out(completion.text, highlight=False)
    return generation


def show_ranking(console: Console, generation: Generation) -> None:
    """A line per completion drawn, best first: what ranked it, the mean beside another criterion, its length and seed;
    text only of those whose tokens were sent."""
    ranking = generation.ranking
    assert ranking is not None, "completions that nobody compared"
    sent = {completion.index: completion for completion in generation.completions}
    criterion = _criterion(ranking.criterion)
    columns = list(dict.fromkeys((criterion, _MEAN)))
    console.print(Text("     " + "  ".join(columns), style="dim"), soft_wrap=True)
    for place, one in enumerate(ranking.completions, 1):
        values = {_MEAN: mean_logprob(one.totals), criterion: one.value if one.totals.token_count else None}
        line = Text(f"{place:>3}. ") + Text("  ").join(_value(values[name], name, one.totals) for name in columns)
        line += Text(f" {_summary(one.totals, one.completion, generation)}  ", style="dim")
        completion = sent.get(one.completion)
        line += Text("(not sent)", style="dim") if completion is None else _text_of(completion)
        console.print(line, soft_wrap=True)


def show_tokenized(console: Console, response: pb.TokenizeResponse) -> None:
    """A row per token: id, text, bytes, offsets."""
    table = _table("id>", "token", "bytes", "byte offset>", "code point offset>")
    for token in response.tokens:
        text = Text(spelled(token), style="dim" if token.special else "")
        table.add_row(str(token.id), text, token.bytes.hex(" "), str(token.byte_offset), str(token.code_point_offset))
    console.print(table)
    console.print(_tokens(len(response.tokens)) + _changed(response.text_changed))


def show_model(console: Console, response: pb.GetModelResponse) -> None:
    """A row per thing that the server tells of itself."""
    told = MessageToDict(response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    table = _table("", "")
    for path, value in _leaves(told):
        table.add_row(Text(path, style="dim"), Text(value))
    console.print(table)


def _table(*columns: str) -> Table:
    """A table of these columns; one whose name ends in ">" is aligned to the right, lists may take several lines."""
    table = Table(box=None, pad_edge=False, show_header=any(columns), header_style="dim")
    for name in columns:
        justify: Literal["left", "right"] = "right" if name.endswith(">") else "left"
        table.add_column(name.rstrip(">"), justify=justify, no_wrap=name not in _LISTS)
    return table


def _coloured(token: pb.Token) -> Text:
    return Text(spelled(token), style=style_of(token.logprob if token.HasField("logprob") else None))


def _numbers(token: pb.Token) -> tuple[str, str, str]:
    if not token.HasField("logprob"):
        return "none", "", ""
    return f"{token.logprob:.4f}", str(token.rank), f"{math.exp(token.logprob):.3g}"


def _alternatives(alternatives: Iterable[pb.Alternative]) -> Text:
    line = Text()
    for alternative in alternatives:
        line.append(spelled(alternative), style=style_of(alternative.logprob))
        line.append(f" {alternative.logprob:.2f}  ", style="dim")
    return line


def _entropy(token: pb.Token) -> Text:
    return Text(f"{token.entropy:.3f}" if token.HasField("entropy") else "")


_EXTRA_COLUMNS: tuple[tuple[str, Callable[[pb.Token], Text]], ...] = (
    ("entropy>", _entropy),
    ("most probable", lambda token: _alternatives(token.top)),
    ("named", lambda token: _alternatives(token.named)),
)


def _score_summary(sequence: pb.ScoredSequence) -> Text:
    totals = sequence.totals
    parts = [_tokens(totals.token_count), f"total {totals.logprob:.4f}"]
    measures = {"mean": mean_logprob, "perplexity": perplexity, "bits/byte": bits_per_byte}
    for name, measure in measures.items():
        value = measure(totals)
        if value is not None:
            parts.append(f"{name} {value:.4f}")
    if sequence.HasField("pmi"):
        parts.append(f"pmi {sequence.pmi:.4f}")
    parts += ["greedy"] * sequence.greedy
    return Text(" · ".join(parts) + _changed(sequence.text_changed), style="bold")


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def _changed(text_changed: bool) -> str:
    return " · the tokenizer changed the text" if text_changed else ""


def _criterion(number: int) -> str:
    """What the contract calls it; of one that came later, its number."""
    known = pb.RankingCriterion.DESCRIPTOR.values_by_number.get(number)
    return known.name.removeprefix("RANKING_CRITERION_").lower() if known else f"criterion {number}"


def _value(value: float | None, name: str, totals: pb.Totals) -> Text:
    """As wide as its name, coloured by the mean logprob."""
    shown = "none" if value is None else f"{value:.4f}"
    return Text(f"{shown:>{len(name)}}", style=style_of(mean_logprob(totals)))


def _summary(totals: pb.Totals, index: int, generation: Generation) -> str:
    started = generation.started
    seed = f"  seed {started.seed + index}" if started is not None and started.HasField("seed") else f"  #{index}"
    return f"{totals.token_count:>4} tokens{seed}"


def _text_of(completion: Completion) -> Text:
    return Text(one_line(completion.text) if completion.text else "(empty)", style="" if completion.text else "dim")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        yield path, readable(", ".join(map(str, value))) or "none"
    else:
        yield path, readable(str(value))
