"""Writing safetensors files: the reference reader gets back what was written."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logprobs_server.models.safetensors_file import write_safetensors
from safetensors.numpy import load_file

SHAPES = st.dictionaries(
    st.text(max_size=5).filter("__metadata__".__ne__),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    max_size=4,
)


@given(shapes=SHAPES, cut=st.integers(1, 7))
def test_tensors_read_back_are_those_written_however_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, ...]], cut: int
) -> None:
    path = tmp_path_factory.mktemp("safetensors") / "model.safetensors"
    values = np.arange(sum(map(math.prod, shapes.values())), dtype=np.float32)
    write_safetensors(path, shapes, (values[i : i + cut] for i in range(0, len(values), cut)))
    read = load_file(path)
    assert {name: tensor.shape for name, tensor in read.items()} == shapes
    in_order = [read[name].ravel() for name in shapes]
    assert np.concatenate([np.empty(0, np.float32), *in_order]).tolist() == values.tolist()


@pytest.mark.parametrize("count", [5, 7])
def test_values_that_do_not_fill_the_shapes_are_refused(count: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fill"):
        write_safetensors(tmp_path / "model.safetensors", {"a": (2, 3)}, [np.zeros(count, np.float32)])
