"""The assembler: any sound stream becomes the same whole however it is cut, and no unsound one passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logprobs import Completion, Generation, IncompleteStreamError, InconsistentStreamError, StreamAssembler
from logprobs.v1 import logprobs_pb2 as pb
from scripted import drawn, generation_events, text_of

Events = list[pb.GenerateResponse]


def assembled(events: Iterable[pb.GenerateResponse]) -> Generation:
    assembler = StreamAssembler()
    for event in events:
        assembler.push(event)
    return assembler.finish()


def told(completion: Completion) -> tuple[object, ...]:
    return completion.index, completion.seed, list(completion.tokens), completion.text, completion.totals


LOGPROBS = st.floats(-50, 0, width=32)
PIECES = st.sampled_from([b"a", b" bc", "é".encode(), b"\xc3", b"\xa9", b"\xff", b"", "\U0001f40e".encode()])


@st.composite
def completions(draw: st.DrawFn) -> list[list[pb.Token]]:
    chosen = draw(st.lists(st.lists(st.tuples(PIECES, LOGPROBS), max_size=8), min_size=1, max_size=4))
    return [drawn([piece for piece, _ in one], [logprob for _, logprob in one]) for one in chosen]


@st.composite
def cut(draw: st.DrawFn, whole: Sequence[Sequence[pb.Token]]) -> Events:
    """The same stream with each completion in pieces, the pieces of all interleaved, text ahead of or behind tokens."""
    events = generation_events(whole)
    queues: list[Events] = []
    for index, tokens in enumerate(whole):
        parts = _cut_in_two_ways(draw, list(tokens))
        deltas = [pb.CompletionDelta(completion=index, tokens=part, text=text) for part, text in parts]
        queue = [pb.GenerateResponse(decoded=pb.TokensDecoded(deltas=[delta])) for delta in deltas]
        finished = next(e for e in events if e.HasField("finished") and e.finished.completion == index)
        queues.append([*queue, finished])
    mixed: Events = []
    while any(queues):
        mixed.append(draw(st.sampled_from([queue for queue in queues if queue])).pop(0))
    return [events[0], *mixed, *(event for event in events if event.HasField("ranked"))]


def _cut_in_two_ways(draw: st.DrawFn, tokens: list[pb.Token]) -> list[tuple[list[pb.Token], str]]:
    text, parts = text_of(tokens), []
    while tokens or text:
        n, m = draw(st.integers(0, len(tokens))), draw(st.integers(0, len(text)))
        parts.append((tokens[:n], text[:m]))
        tokens, text = tokens[n:], text[m:]
        if len(parts) == 20:
            parts.append((tokens, text))
            break
    return parts


@given(st.data())
def test_a_stream_becomes_the_same_whole_however_it_is_cut(data: st.DataObject) -> None:
    whole = data.draw(completions())
    reference = assembled(generation_events(whole))
    pieced = assembled(data.draw(cut(whole)))
    assert list(map(told, pieced.completions)) == list(map(told, reference.completions))
    assert pieced.ranking == reference.ranking


@given(st.data())
def test_a_stream_that_ends_early_never_passes_for_complete(data: st.DataObject) -> None:
    events = data.draw(cut(data.draw(completions())))
    arrived = events[: data.draw(st.integers(0, len(events) - 1))]
    with pytest.raises(IncompleteStreamError) as caught:
        assembled(arrived)
    deltas = [delta for event in arrived for delta in event.decoded.deltas]
    partial = caught.value.partial
    assert sum(len(c.tokens) for c in partial.completions) == sum(len(delta.tokens) for delta in deltas)
    ends = {event.finished.completion for event in arrived if event.HasField("finished")}
    assert {completion.index for completion in partial.completions if completion.finished} == ends


TWO = [drawn([b"a", b"b"], [-1.0, -2.0]), drawn([b"\xc3", b"\xa9", b"c"], [-0.5, -0.25, -0.125])]
PROMPT = drawn([b"P", b"Q"], [-1.0, -1.0])
PROMPT[0].ClearField("logprob")
WORSE, BETTER = 0, 1
STARTED, PROMPTED, DECODED_0, FINISHED_0, DECODED_1, FINISHED_1, RANKED = range(7)


def stream() -> Events:
    """started, prompt, decoded 0, finished 0, decoded 1, finished 1, ranked"""
    return generation_events(TWO, prompt=PROMPT)


def moved(start: int, end: int) -> Callable[[Events], None]:
    return lambda events: events.insert(end, events.pop(start))


def repeated(index: int) -> Callable[[Events], None]:
    return lambda events: events.insert(index, events[index])


def token(events: Events, index: int = DECODED_0, place: int = 0) -> pb.Token:
    return events[index].decoded.deltas[0].tokens[place]


def finished(events: Events) -> pb.CompletionFinished:
    return events[FINISHED_0].finished


def places(events: Events) -> list[pb.RankedCompletion]:
    return list(events[RANKED].ranked.completions)


def stray(events: Events) -> None:
    decoded = pb.TokensDecoded(deltas=[pb.CompletionDelta(completion=2, text="x")])
    events.insert(RANKED, pb.GenerateResponse(decoded=decoded))


def set_(message: object, **values: object) -> None:
    for name, value in values.items():
        setattr(message, name, value)


BREACHES = [
    pytest.param(moved(STARTED, 1), "before the started one", id="an event before the started one"),
    pytest.param(repeated(STARTED), "a second started event", id="started twice"),
    pytest.param(lambda e: set_(e[STARTED].started, completion_count=0), "no completions", id="nothing to come"),
    pytest.param(moved(PROMPTED, 2), "after the first token", id="prompt after a token"),
    pytest.param(repeated(PROMPTED), "more prompt tokens", id="prompt twice"),
    pytest.param(lambda e: e[PROMPTED].prompt_scored.tokens.pop(), "before the prompt was told whole", id="prompt cut"),
    pytest.param(
        lambda e: set_(e[PROMPTED].prompt_scored.tokens[0], logprob=-1.0), "first with one", id="logprob of the first"
    ),
    pytest.param(
        lambda e: e[PROMPTED].prompt_scored.tokens[1].ClearField("logprob"), "without a logprob", id="prompt logprob"
    ),
    pytest.param(lambda e: e.insert(DECODED_1, e[DECODED_0]), "after its end", id="tokens after finished"),
    pytest.param(repeated(FINISHED_0), "a second end", id="finished twice"),
    pytest.param(repeated(DECODED_0), "a token at byte 0 where 2", id="a delta twice"),
    pytest.param(lambda e: set_(e[DECODED_0].decoded.deltas[0], completion=-1), "negative index", id="index below 0"),
    pytest.param(stray, "more completions than the 2", id="an unknown completion"),
    pytest.param(
        lambda e: e[DECODED_0].decoded.deltas.append(pb.CompletionDelta()), "two deltas of one", id="two deltas"
    ),
    pytest.param(lambda e: set_(token(e, place=1), byte_offset=2), "at byte 2 where 1", id="offset ahead"),
    pytest.param(lambda e: set_(token(e, place=1), byte_offset=0), "at byte 0 where 1", id="offset behind"),
    pytest.param(lambda e: set_(token(e, place=1), bytes=b"x"), "not its tokens' bytes", id="another byte"),
    pytest.param(lambda e: set_(token(e, place=1), bytes=b"bb"), "not its tokens' bytes", id="one more byte"),
    pytest.param(
        lambda e: set_(e[DECODED_0].decoded.deltas[0], text="a"), "not its tokens' bytes", id="text that is short"
    ),
    pytest.param(
        lambda e: set_(e[DECODED_1].decoded.deltas[0], text="e\u0301c"), "not its tokens' bytes", id="text normalised"
    ),
    pytest.param(lambda e: e[DECODED_0].decoded.deltas[0].tokens.pop(), "not its tokens' bytes", id="a token lost"),
    pytest.param(lambda e: set_(token(e), logprob=-1.01), "add up to", id="another logprob"),
    pytest.param(lambda e: set_(token(e), logprob=float("nan")), "add up to nan", id="no number"),
    pytest.param(lambda e: token(e).ClearField("logprob"), "do not count", id="a logprob lost"),
    pytest.param(lambda e: set_(token(e), sampling_logprob=-9.0), "sampling logprob", id="another sampling logprob"),
    pytest.param(lambda e: set_(finished(e).totals, token_count=3), "do not count", id="another token count"),
    pytest.param(lambda e: set_(finished(e).totals, byte_count=1), "do not count", id="another byte count"),
    pytest.param(lambda e: set_(finished(e).totals, logprob=-3.01), "add up to", id="another total"),
    pytest.param(lambda e: set_(finished(e), reason=0), "without a reason", id="no reason"),
    pytest.param(lambda e: set_(finished(e), stop_string="b"), "does not go with", id="a stop that did not stop it"),
    pytest.param(
        lambda e: set_(finished(e), reason=pb.FINISH_REASON_STOP_TOKEN), "does not go with", id="a stop not told"
    ),
    pytest.param(moved(RANKED, 5), "before the end of completion 1", id="ranked before the end"),
    pytest.param(moved(RANKED, 4), "before 1 of its completions", id="ranked before a completion"),
    pytest.param(lambda e: e[RANKED].ranked.completions.pop(), "fewer than two", id="one ranked"),
    pytest.param(lambda e: set_(places(e)[0], completion=0), "each completion drawn once", id="one ranked twice"),
    pytest.param(lambda e: set_(places(e)[0], completion=2), "each completion drawn once", id="unknown one ranked"),
    pytest.param(lambda e: e[RANKED].ranked.completions.append(places(e)[0]), "drawn once", id="one too many"),
    pytest.param(lambda e: e[RANKED].ranked.completions.reverse(), "not best first", id="worst first"),
    pytest.param(lambda e: set_(places(e)[0].totals, logprob=-9.0), "totals of completion 1", id="other totals"),
    pytest.param(repeated(RANKED), "after the ranking", id="ranked twice"),
    pytest.param(lambda e: e.append(e[DECODED_0]), "after the ranking", id="tokens after the ranking"),
]


@pytest.mark.parametrize(("breach", "rule"), BREACHES)
def test_each_breach_of_the_contract_is_refused(breach: Callable[[Events], object], rule: str) -> None:
    events = stream()
    breach(events)
    with pytest.raises(InconsistentStreamError, match=rule):
        assembled(events)


MISSING = [
    pytest.param(lambda e: e.clear(), "a started event", id="nothing came"),
    pytest.param(lambda e: e.pop(), "a ranking", id="no ranking"),
    pytest.param(lambda e: e.__delitem__(slice(FINISHED_1, None)), "the end of completion 1", id="one unfinished"),
    pytest.param(lambda e: e.__delitem__(slice(DECODED_1, None)), "1 of its completions", id="one absent"),
]


@pytest.mark.parametrize(("drop", "what"), MISSING)
def test_what_is_missing_at_the_end_is_told(drop: Callable[[Events], object], what: str) -> None:
    events = stream()
    drop(events)
    with pytest.raises(IncompleteStreamError, match=what):
        assembled(events)


def test_a_refused_event_changes_nothing() -> None:
    events = stream()
    good = pb.CompletionDelta(completion=1, text="x")
    bad = pb.CompletionDelta(completion=0, tokens=[pb.Token(byte_offset=5)])
    assembler = StreamAssembler()
    assembler.push(events[STARTED])
    assembler.push(events[PROMPTED])
    with pytest.raises(InconsistentStreamError):
        assembler.push(pb.GenerateResponse(decoded=pb.TokensDecoded(deltas=[good, bad])))
    for event in events[DECODED_0:]:
        assembler.push(event)
    assert assembler.finish() == assembled(events)


def test_an_event_of_an_unknown_kind_is_skipped() -> None:
    events = stream()
    for place in range(len(events), -1, -1):
        events.insert(place, pb.GenerateResponse())
    assert assembled(events) == assembled(stream())


def test_a_finish_reason_that_is_added_later_is_kept() -> None:
    events = generation_events(TWO[:1])
    events[-1].finished.reason = 99  # type: ignore[assignment]
    (completion,) = assembled(events).completions
    assert completion.finish_reason == 99
    assert completion.finished


def test_a_completion_replays_from_the_seed_it_is_told_with() -> None:
    assert [completion.seed for completion in assembled(stream()).completions] == [7, 8]


def test_without_a_seed_completions_have_none() -> None:
    events = stream()
    events[STARTED].started.ClearField("seed")
    assert {completion.seed for completion in assembled(events).completions} == {None}


def test_the_best_comes_first_in_ranked() -> None:
    assert [completion.index for completion in assembled(stream()).ranked] == [BETTER, WORSE]


def test_what_was_drawn_beyond_the_completions_sent_is_in_the_ranking_alone() -> None:
    """best_of: three drawn, the best one sent."""
    events = generation_events([TWO[1]])
    events[1].decoded.deltas[0].completion = events[2].finished.completion = 2
    loser = pb.Totals(token_count=1, logprob=-5)
    ranked = pb.CompletionsRanked()
    ranked.completions.add(completion=2, value=-0.3, totals=events[-1].finished.totals)
    ranked.completions.add(completion=0, value=-5, totals=loser)
    ranked.completions.add(completion=1, value=-5, totals=loser)
    generation = assembled([*events, pb.GenerateResponse(ranked=ranked)])
    assert [completion.index for completion in generation.ranked] == [2]
    with pytest.raises(IncompleteStreamError, match="a ranking"):
        assembled(events)
    ranked.completions.reverse()
    with pytest.raises(InconsistentStreamError, match="best are not the completions sent"):
        assembled([*events, pb.GenerateResponse(ranked=ranked)])


def test_scoring_a_prompt_alone_gives_its_tokens_and_an_empty_completion() -> None:
    generation = assembled(generation_events([[]], prompt=PROMPT))
    assert list(generation.prompt_tokens) == PROMPT
    assert [completion.tokens for completion in generation.completions] == [()]


def test_a_time_limit_may_end_the_stream_within_the_prompt() -> None:
    events = [event for event in generation_events([[]], prompt=PROMPT) if not event.HasField("decoded")]
    events[PROMPTED].prompt_scored.tokens.pop()
    with pytest.raises(InconsistentStreamError, match="before the prompt was told whole"):
        assembled(events)
    events[-1].finished.reason = pb.FINISH_REASON_TIME_LIMIT
    assert list(assembled(events).prompt_tokens) == PROMPT[:-1]


def test_infinite_logprobs_add_up() -> None:
    events = generation_events([drawn([b"a", b"b"], [float("-inf"), -1.0])])
    assert assembled(events).completions[0].mean_logprob == float("-inf")


def test_a_completion_tells_what_follows_from_its_totals() -> None:
    completion = assembled(stream()).completions[0]
    assert completion.bytes == b"ab"
    assert completion.mean_logprob == pytest.approx(-1.5)
    assert completion.perplexity == pytest.approx(4.4816891)
    assert completion.bits_per_byte == pytest.approx(2.1640426)
