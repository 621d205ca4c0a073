"""Beam search is that of transformers, token for token, and tells tokens as soon as all that may be told agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from beam_oracle import BeamOracle, Hypothesis
from beam_searches import BEAMS, EARLY, EOS_IDS, KINDS, LENGTH, PROMPT, assert_found, search, with_ends
from google.protobuf.duration_pb2 import Duration
from harness import Served, Stream, ids, refusal, running
from logprobs.stream import StreamAssembler
from logprobs.v1 import logprobs_pb2 as pb
from logprobs_server.engine.events import CompletionDecoded, Event
from logprobs_server.engine.types import Job, Sink, Ticket
from tiny_models import save_tiny_model


def common_start(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all start with."""
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return [column[0] for column in columns]


@pytest.fixture(scope="module")
def ending_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beams")
    save_tiny_model("llama", folder / "plain")
    return with_ends(folder / "plain", folder / "ending", EOS_IDS)


@pytest.fixture(scope="module")
def ending(ending_folder: Path) -> Iterator[Served]:
    """A tiny model with many end-of-sequence ids."""
    with running(ending_folder) as served:
        yield served


@pytest.fixture(scope="module")
def found(ending_folder: Path) -> dict[tuple[float, pb.EarlyStopping.ValueType], list[Hypothesis]]:
    """What transformers finds, for every length penalty and kind of early stopping."""
    oracle = BeamOracle(ending_folder)
    return {
        (penalty, early): oracle.search(
            PROMPT, BEAMS, EOS_IDS, max_new_tokens=LENGTH, length_penalty=penalty, early_stopping=EARLY[early]
        )
        for penalty, early in KINDS
    }


def test_the_cases_tell_penalties_and_kinds_of_early_stopping_apart(found: dict[Any, list[Hypothesis]]) -> None:
    results = {kind: str([one.token_ids for one in hypotheses]) for kind, hypotheses in found.items()}
    assert len({results[1.0, early] for early in EARLY}) == len(EARLY)
    assert len(set(results.values())) >= 5


@pytest.mark.parametrize(("penalty", "early"), KINDS)
def test_hypotheses_order_and_scores_are_those_of_transformers(
    penalty: float, early: pb.EarlyStopping.ValueType, ending: Served, found: dict[Any, list[Hypothesis]]
) -> None:
    beams = pb.BeamSearch(beam_count=BEAMS, length_penalty=penalty, early_stopping=early)
    assert_found(ending.generate(search(beam_search=beams)), found[penalty, early])


def test_min_tokens_masks_ends_as_transformers_does(ending: Served, ending_folder: Path) -> None:
    expected = BeamOracle(ending_folder).search(PROMPT, BEAMS, EOS_IDS, max_new_tokens=LENGTH, min_new_tokens=9)
    assert min(len(one.token_ids) for one in expected) > 9
    assert_found(ending.generate(search(stopping=pb.Stopping(min_tokens=9))), expected)


def test_ignored_ends_do_not_end_a_search(ending: Served, ending_folder: Path) -> None:
    expected = BeamOracle(ending_folder).search(PROMPT, BEAMS, [], max_new_tokens=LENGTH)
    assert {len(one.token_ids) for one in expected} == {LENGTH}
    assert_found(ending.generate(search(stopping=pb.Stopping(ignore_eos=True))), expected)


def test_stop_tokens_end_hypotheses_as_end_of_sequence_tokens_do(tiny: Served, ending: Served) -> None:
    stopped = tiny.generate(search(stopping=pb.Stopping(token_ids=EOS_IDS, ignore_eos=True)))
    ended = ending.generate(search())
    assert [stopped.token_ids(i) for i in range(BEAMS)] == [ended.token_ids(i) for i in range(BEAMS)]
    reasons = {stopped.finished(index).reason for index in range(BEAMS)}
    assert pb.FINISH_REASON_STOP_TOKEN in reasons
    assert reasons <= {pb.FINISH_REASON_STOP_TOKEN, pb.FINISH_REASON_MAX_TOKENS}


def test_a_stop_string_ends_hypotheses_whose_text_holds_it(tiny: Served) -> None:
    beams = pb.BeamSearch(beam_count=BEAMS, length_penalty=-1)  # so that ending soon is rewarded
    whole = tiny.generate(search(stopping=pb.Stopping(ignore_eos=True), beam_search=beams))
    string = whole.text()[3:5]
    stopping = pb.Stopping(ignore_eos=True, strings=[string], include=True)
    stream = tiny.generate(search(stopping=stopping, beam_search=beams))
    ended = [i for i in range(BEAMS) if stream.finished(i).reason == pb.FINISH_REASON_STOP_STRING]
    assert ended
    for index in range(BEAMS):
        assert stream.text(index).endswith(string) == (index in ended)
        assert string not in stream.text(index)[: -len(string)]


def test_there_are_no_more_beams_than_tokens_that_go_on(tiny_folder: Path) -> None:
    stops = pb.Stopping(token_ids=range(1, 65))
    with running(tiny_folder, max_beams=300, max_sequences=300) as served:
        limits = served.stub.GetModel(pb.GetModelRequest()).limits
        assert limits.beam_count == 300
        most = search(max_tokens=2, completion_count=1, stopping=stops, beam_search=pb.BeamSearch(beam_count=235))
        assert len(served.generate(most).ranked.completions) == 235
        most.beam_search.beam_count = 236
        refused = refusal(lambda: served.generate(most))
    rule = "236 is above 235, the tokens that do not end a completion"
    assert refused.violations == [("beam_search.beam_count", rule)]


def test_the_model_tells_the_defaults_of_a_search_and_its_limit(tiny: Served, tiny_folder: Path) -> None:
    model = tiny.stub.GetModel(pb.GetModelRequest())
    assert model.limits.beam_count == 32
    assert model.defaults.beam_search == pb.BeamSearch(
        beam_count=4, length_penalty=1, early_stopping=pb.EARLY_STOPPING_HEURISTIC
    )
    named = tiny.generate(search(beam_search=model.defaults.beam_search)).ranked
    assert tiny.generate(search(beam_search=pb.BeamSearch())).ranked == named
    with running(tiny_folder, max_beams=3) as served:
        assert served.stub.GetModel(pb.GetModelRequest()).defaults.beam_search.beam_count == 3


def test_one_beam_is_greedy_decoding(tiny: Served) -> None:
    request = search(completion_count=1, beam_search=pb.BeamSearch(beam_count=1))
    greedy = pb.GenerateRequest(prompt=ids(PROMPT), max_tokens=LENGTH, sampling=pb.Sampling(temperature=0))
    stream = tiny.generate(request)
    assert stream.token_ids() == tiny.generate(greedy).token_ids()
    assert "ranked" not in stream.kinds


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fewer_completions_are_the_best_and_losers_are_ranked(count: int, ending: Served) -> None:
    whole, stream = ending.generate(search()), ending.generate(search(completion_count=count))
    assert stream.started.completion_count == count
    assert stream.kinds.count("finished") == count
    assert [stream.token_ids(i) for i in range(BEAMS)] == [whole.token_ids(i) for i in range(count)] + [[]] * (
        4 - count
    )
    assert stream.ranked == whole.ranked
    assert stream.ranked.criterion == pb.RANKING_CRITERION_BEAM_SCORE


def test_tokens_are_told_when_all_that_may_be_told_agree(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ends the beams after a step are the hypotheses of a search that may not take another one."""
    stopping, most = pb.Stopping(ignore_eos=True), 2 * LENGTH
    searches = [tiny.generate(search(stopping=stopping, max_tokens=steps)) for steps in range(1, most)]
    agreed = [common_start([stream.token_ids(index) for index in range(BEAMS)]) for stream in searches]
    submit, told = tiny.engine.submit, [list[int | None]() for _ in range(BEAMS)]
    after_steps: list[list[list[int | None]]] = []

    def overheard(job: Job, sink: Sink) -> Ticket:
        def hear(events: Sequence[Event]) -> None:
            for event in events:
                if isinstance(event, CompletionDecoded):
                    told[event.index] += [one.position.token_id for one in event.tokens]
            after_steps.append([list(tokens) for tokens in told])
            sink(events)

        return submit(job, hear)

    monkeypatch.setattr(tiny.engine, "submit", overheard)
    tiny.generate(search(stopping=stopping, max_tokens=most))
    expected = [prefix for prefix, _ in itertools.groupby(agreed) if prefix]
    assert len(expected) > 2
    changes = [tokens for tokens, _ in itertools.groupby(after_steps) if tokens[0]]
    assert changes[:-1] == [[prefix] * BEAMS for prefix in expected]  # the last are whole


def test_another_criterion_tells_the_best_of_all_hypotheses_by_it(ending: Served) -> None:
    ranking = pb.Ranking(criterion=pb.RANKING_CRITERION_TOTAL_LOGPROB)
    beams = pb.BeamSearch(beam_count=BEAMS, length_penalty=2)
    whole = ending.generate(search(beam_search=beams))
    stream = ending.generate(search(beam_search=beams, completion_count=1, ranking=ranking))
    best = stream.ranked.completions[0].completion
    assert best == max(range(BEAMS), key=lambda index: whole.finished(index).totals.logprob)
    assert stream.token_ids(best) == whole.token_ids(best)
    assert stream.kinds.count("finished") == 1
    values = [place.value for place in stream.ranked.completions]
    assert values == sorted((whole.finished(i).totals.logprob for i in range(BEAMS)), reverse=True)


def test_tokens_carry_the_models_numbers_and_were_not_drawn(ending: Served) -> None:
    options = pb.LogprobOptions(top_count=3, token_ids=[7, 0], entropy=True)
    stream = ending.generate(search(logprobs=options))
    assert not stream.started.HasField("seed")
    for index in range(BEAMS):
        tokens = stream.tokens(index)
        request = pb.ScoreRequest(
            context=ids(PROMPT), continuations=[ids([token.id for token in tokens])], logprobs=options
        )
        [scored] = ending.score(request)
        for token, same in zip(tokens, scored.tokens, strict=True):
            assert (token.sampling_logprob, token.sampling_set_size) == (0, 1)
            assert token.rank == same.rank
            assert [one.id for one in token.top] == [one.id for one in same.top]
            assert [one.id for one in token.named] == [7, 0]
            numbers = [token.logprob, token.entropy, token.tail_logprob, *(one.logprob for one in token.named)]
            others = [same.logprob, same.entropy, same.tail_logprob, *(one.logprob for one in same.named)]
            assert numbers == pytest.approx(others, abs=1e-4)
        total = stream.finished(index).totals
        assert total.logprob == pytest.approx(math.fsum(token.logprob for token in tokens), abs=1e-9)


def test_the_client_puts_a_search_together(ending: Served) -> None:
    assembler = StreamAssembler()
    stream = ending.generate(search(completion_count=2, prompt_logprobs=pb.LogprobOptions()))
    for response in stream.responses:
        assembler.push(response)
    generation = assembler.finish()
    assert [one.seed for one in generation.ranked] == [None, None]
    assert [[token.id for token in one.tokens] for one in generation.ranked] == [stream.token_ids(i) for i in range(2)]
    assert len(generation.prompt_tokens) == len(PROMPT)


def test_searches_side_by_side_are_what_they_are_alone(ending: Served) -> None:
    requests = [search(prompt=ids(PROMPT[first:])) for first in range(6)]
    alone = [ending.generate(request).ranked for request in requests]
    calls = [ending.stub.Generate(request) for request in requests]
    plain = ending.stub.Generate(pb.GenerateRequest(prompt=ids(PROMPT), completion_count=5))
    together = [Stream(list(call)).ranked for call in calls]
    assert len(list(plain)) > 5
    for one, other in zip(together, alone, strict=True):
        assert [place.totals.token_count for place in one.completions] == [
            p.totals.token_count for p in other.completions
        ]
        assert [p.value for p in one.completions] == pytest.approx([p.value for p in other.completions], rel=1e-4)


def test_a_full_context_ends_a_search_as_max_tokens_would(tiny_folder: Path, tiny: Served) -> None:
    with running(tiny_folder, context_length=len(PROMPT) + 10) as served:
        full = served.generate(search(max_tokens=100))
    short = tiny.generate(search(max_tokens=10))
    assert [full.token_ids(i) for i in range(BEAMS)] == [short.token_ids(i) for i in range(BEAMS)]
    assert pb.FINISH_REASON_CONTEXT_FULL in {full.finished(i).reason for i in range(BEAMS)}


def test_time_that_is_up_ends_a_search_with_its_beams(tiny: Served) -> None:
    last, asked = 6, iter([*[0.0] * 6, math.inf])
    stopping = pb.Stopping(ignore_eos=True, time_limit=Duration(seconds=3600))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.engine, "_clock", lambda: next(asked))
        stream = tiny.generate(search(stopping=stopping, max_tokens=100))
    whole = tiny.generate(search(stopping=pb.Stopping(ignore_eos=True), max_tokens=last))
    assert [stream.token_ids(i) for i in range(BEAMS)] == [whole.token_ids(i) for i in range(BEAMS)]
    assert {stream.finished(i).reason for i in range(BEAMS)} == {pb.FINISH_REASON_TIME_LIMIT}
    tiny.wait_until_idle()


def test_time_that_is_up_before_a_search_gives_empty_completions(tiny: Served) -> None:
    stream = tiny.generate(search(stopping=pb.Stopping(time_limit=Duration(nanos=1)), completion_count=2))
    assert stream.kinds == ["started", "finished", "finished", "ranked"]
    assert [(place.completion, place.value) for place in stream.ranked.completions] == [
        (i, -math.inf) for i in range(4)
    ]


def test_a_cancelled_search_frees_all_it_held(tiny: Served) -> None:
    call = tiny.stub.Generate(search(max_tokens=1500, stopping=pb.Stopping(ignore_eos=True)))
    assert next(iter(call)).HasField("started")
    call.cancel()
    tiny.wait_until_idle()
    assert tiny.generate(search()).kinds[-1] == "ranked"
