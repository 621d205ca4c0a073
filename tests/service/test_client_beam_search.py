"""Beam search from the Python client's options and from the command line, against the service."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import Parse
from harness import Served, ids
from logprobs import AsyncClient, Client, InvalidRequestError, mean_logprob
from logprobs.cli import main
from logprobs.v1 import logprobs_pb2 as pb

PROMPT = list(range(5, 45))
TEXT = "the horse"


def asked(prompt: pb.Input, **fields: Any) -> pb.GenerateRequest:
    """Three completions of a search, as the contract puts it."""
    beams = pb.BeamSearch(beam_count=3, length_penalty=2, early_stopping=pb.EARLY_STOPPING_NEVER)
    return pb.GenerateRequest(prompt=prompt, max_tokens=8, completion_count=3, beam_search=beams, **fields)


OPTIONS: Any = {
    "max_tokens": 8,
    "completion_count": 3,
    "beam_count": 3,
    "length_penalty": 2.0,
    "early_stopping": "never",
}


async def test_options_ask_both_clients_for_the_search_that_the_contract_calls_so(tiny: Served) -> None:
    expected = tiny.generate(asked(ids(PROMPT)))
    with Client(tiny.target) as client:
        generation = client.generate(PROMPT, **OPTIONS, criterion="beam_score").collect()
    async with AsyncClient(tiny.target) as async_client:
        assert await async_client.generate(PROMPT, **OPTIONS).collect() == generation
    assert generation.ranking == expected.ranked
    assert generation.ranking.criterion == pb.RANKING_CRITERION_BEAM_SCORE
    found = [[token.id for token in one.tokens] for one in generation.ranked]
    assert found == [expected.token_ids(index) for index in range(3)]


def test_a_criterion_of_its_own_ranks_a_search(tiny: Served) -> None:
    with Client(tiny.target) as client:
        generation = client.generate(PROMPT, **OPTIONS, criterion="total").collect()
    assert generation.ranking is not None
    values = [place.value for place in generation.ranking.completions]
    assert values == sorted((one.totals.logprob for one in generation.completions), reverse=True)


REFUSED = [
    pytest.param({"criterion": "beam_score"}, "ranking.criterion", "only for beam search", id="no search"),
    pytest.param({"beam_count": 0}, "beam_search.beam_count", "0 is outside", id="no beam"),
    pytest.param({"beam_count": 2, "completion_count": 3}, "beam_search.beam_count", "2 is below", id="few beams"),
    pytest.param({"beam_count": 2, "best_of": 2}, "best_of", "does not go with beam_search", id="best_of"),
]


@pytest.mark.parametrize(("options", "field", "rule"), REFUSED)
def test_what_the_server_refuses_names_field_and_rule(options: Any, field: str, rule: str, tiny: Served) -> None:
    with Client(tiny.target) as client, pytest.raises(InvalidRequestError) as caught:
        client.generate(PROMPT, **options).collect()
    [violation] = caught.value.violations
    assert violation.field == field
    assert rule in violation.description


ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in {**OPTIONS, "criterion": "beam_score"}.items()]


def test_the_command_line_prints_the_search_as_events(tiny: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", TEXT, "--target", tiny.target, "--json", *ARGUMENTS]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert Parse(last, pb.GenerateResponse()).ranked == tiny.generate(asked(pb.Input(text=TEXT))).ranked


def test_the_command_line_shows_hypotheses_by_their_scores(tiny: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", TEXT, "--target", tiny.target, *ARGUMENTS]) == 0
    head, *shown = [line.split()[:6] for line in capsys.readouterr().out.splitlines()]
    assert head == ["beam_score", "mean_logprob"]
    assert shown == [
        [f"{one.completion + 1}.", f"{one.value:.4f}", f"{mean_logprob(one.totals):.4f}", "8", "tokens", f"#{index}"]
        for index, one in enumerate(tiny.generate(asked(pb.Input(text=TEXT))).ranked.completions)
    ]


def test_the_command_line_refuses_sampling_with_a_search(tiny: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", TEXT, "--target", tiny.target, "--beam-count", "2", "--seed", "1"]) == 2
    assert capsys.readouterr().err == "logprobs: seed: beam search does not sample\n"
