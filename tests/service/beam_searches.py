"""What tests of beam search ask for, of which models, and how they compare it with what transformers finds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from beam_oracle import Hypothesis
from harness import Stream, ids
from logprobs.v1 import logprobs_pb2 as pb

__all__ = ["BEAMS", "EARLY", "EOS_IDS", "KINDS", "LENGTH", "PROMPT", "assert_found", "search", "with_ends"]

PROMPT = list(range(5, 45))
EOS_IDS = [0, *range(4, 300, 5)]
"""So many that hypotheses end at different lengths; transformers then looks at 62 candidates for each beam."""
BEAMS, LENGTH = 4, 16
EARLY: dict[pb.EarlyStopping.ValueType, bool | str] = {
    pb.EARLY_STOPPING_HEURISTIC: False,
    pb.EARLY_STOPPING_WHEN_FULL: True,
    pb.EARLY_STOPPING_NEVER: "never",
}
PENALTIES = (-1.0, 0.0, 1.0, 2.0)
KINDS = list(itertools.product(PENALTIES, EARLY))


def with_ends(source: Path, folder: Path, eos_token_ids: Sequence[int]) -> Path:
    """The model in `source`, with these end-of-sequence ids, in a new folder that shares its weights."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name in ("config.json", "generation_config.json"):
            settings = json.loads(file.read_text()) | {"eos_token_id": list(eos_token_ids)}
            (folder / file.name).write_text(json.dumps(settings))
        else:
            (folder / file.name).symlink_to(file)
    return folder


def search(**fields: Any) -> pb.GenerateRequest:
    """All four hypotheses of four beams, but for what is given."""
    given = {"prompt": ids(PROMPT), "max_tokens": LENGTH, "completion_count": BEAMS}
    return pb.GenerateRequest(**{**given, "beam_search": pb.BeamSearch(beam_count=BEAMS), **fields})


def assert_found(stream: Stream, expected: Sequence[Hypothesis]) -> None:
    """The hypotheses in their order, with their scores."""
    count = len(expected)
    assert [stream.token_ids(index) for index in range(count)] == [one.token_ids for one in expected]
    assert [place.completion for place in stream.ranked.completions] == list(range(count))
    assert [place.value for place in stream.ranked.completions] == pytest.approx([h.score for h in expected], rel=1e-4)
