"""Which path runs a model: the device path on a GPU where it knows the family and works, transformers otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from logprobs_server.engine.batch import Chunk, Model
from logprobs_server.engine.device import DeviceModel
from logprobs_server.engine.model import loading
from logprobs_server.engine.model.checkpoint import LoadOptions
from logprobs_server.engine.model.general import TransformersModel
from tiny_models import save_tiny_model
from torch import Tensor


@pytest.fixture(params=["llama", "opt"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model in a folder, of a family that the device path knows, and of one that it does not."""
    save_tiny_model(request.param, tmp_path)
    return tmp_path


def loaded(folder: Path, device: str = "cpu") -> Model:
    return loading.load_model(
        LoadOptions(path=str(folder), name=folder.name, revision="", max_sequences=2, dtype="float32", device=device)
    )


def test_a_gpu_gets_the_device_path_for_the_families_it_knows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = "llama" in (folder / "config.json").read_text()
    assert isinstance(loaded(folder), TransformersModel)
    monkeypatch.setattr(loading, "_is_gpu", lambda device: True)
    assert isinstance(loaded(folder), DeviceModel if known else TransformersModel)


@pytest.mark.parametrize("fault", [RuntimeError("no kernel image is available"), "wrong numbers"])
def test_where_the_device_path_fails_transformers_runs_the_model(
    fault: RuntimeError | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_model("llama", tmp_path)

    def forward(model: DeviceModel, chunks: Sequence[Chunk]) -> Tensor:
        if isinstance(fault, RuntimeError):
            raise fault
        return torch.zeros(sum(len(chunk.token_ids) for chunk in chunks), 64)

    monkeypatch.setattr(loading, "_is_gpu", lambda device: True)
    monkeypatch.setattr(DeviceModel, "forward", forward)
    assert isinstance(loaded(tmp_path), TransformersModel)
    assert "left to transformers" in caplog.text
    assert (str(fault) if isinstance(fault, RuntimeError) else "differs from its plain one") in caplog.text
