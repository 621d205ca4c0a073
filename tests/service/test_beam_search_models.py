"""Beam search is that of transformers on every architecture, and on the embedded model with whatever may end it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from beam_oracle import BeamOracle
from beam_searches import BEAMS, EARLY, EOS_IDS, KINDS, PROMPT, assert_found, search, with_ends
from harness import Served, ids, running
from logprobs.v1 import logprobs_pb2 as pb
from tiny_models import ARCHITECTURES, RELATIVES, save_tiny_model

TEXT = [504, 3575, 282, 4649, 314]
"""The embedded model's tokens of "The capital of France is"."""
WORDS = [2, 30, 28, 198, 260, 284, 282]
"""Those of <|im_end|>, a full stop, a comma, a line end, " the", " and", " of"."""
QUESTION = pb.ChatMessage(role="user", content="What is the capital of France? One word.")


@pytest.fixture(scope="module")
def embedded_oracle(embedded_folder: Path) -> BeamOracle:
    return BeamOracle(embedded_folder)


@pytest.fixture(scope="module")
def ending_embedded(embedded_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The embedded model, which many words end."""
    folder = with_ends(embedded_folder, tmp_path_factory.mktemp("beams") / "embedded", WORDS)
    with running(folder, context_length=64) as served:
        yield served


@pytest.mark.parametrize("architecture", [one for one in (*ARCHITECTURES, *RELATIVES) if one != "llama"])
@pytest.mark.parametrize("eos", [[0], EOS_IDS], ids=["one end", "many ends"])
def test_other_models_are_searched_as_transformers_does(architecture: str, eos: list[int], tmp_path: Path) -> None:
    save_tiny_model(architecture, tmp_path / "plain")
    folder = with_ends(tmp_path / "plain", tmp_path / "ending", eos)
    expected = BeamOracle(folder).search(PROMPT[:7], 3, eos, max_new_tokens=40)
    with running(folder) as served:
        request = search(prompt=ids(PROMPT[:7]), max_tokens=40, completion_count=3)
        request.beam_search.beam_count = 3
        assert_found(served.generate(request), expected)


@pytest.mark.parametrize(("penalty", "early"), KINDS)
def test_the_embedded_model_is_searched_as_transformers_does(
    penalty: float, early: pb.EarlyStopping.ValueType, ending_embedded: Served, embedded_oracle: BeamOracle
) -> None:
    options = {"length_penalty": penalty, "early_stopping": EARLY[early]}
    expected = embedded_oracle.search(TEXT, BEAMS, WORDS, max_new_tokens=10, **options)
    beams = pb.BeamSearch(beam_count=BEAMS, length_penalty=penalty, early_stopping=early)
    assert_found(ending_embedded.generate(search(prompt=ids(TEXT), max_tokens=10, beam_search=beams)), expected)


def test_a_conversation_of_the_embedded_model_ends_as_transformers_ends_it(
    embedded: Served, embedded_oracle: BeamOracle
) -> None:
    conversation = pb.Input(conversation=pb.Conversation(messages=[QUESTION]))
    prompt = [token.id for token in embedded.stub.Tokenize(pb.TokenizeRequest(input=conversation)).tokens]
    eos = list(embedded.stub.GetModel(pb.GetModelRequest()).eos_token_ids)
    expected = embedded_oracle.search(prompt, BEAMS, eos, max_new_tokens=12)
    assert {one.token_ids[-1] in eos for one in expected} == {True, False}
    assert_found(embedded.generate(search(prompt=ids(prompt), max_tokens=12)), expected)
