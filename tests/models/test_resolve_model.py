"""Which model a name stands for, and what the operator is told when it stands for none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logprobs_server.models.resolve import ModelNotUsableError, ModelSource, resolve_model
from safetensors.numpy import save_file
from tiny_gguf import Tiny


class Recorder:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int | None]] = []
        self.done: list[int] = []

    @contextmanager
    def __call__(self, task: str, total_bytes: int | None) -> Iterator[Any]:
        self.tasks.append((task, total_bytes))
        self.done.append(0)

        def advance(count: int) -> None:
            self.done[-1] += count

        yield advance


def resolve(name: str | Path, cache: Path, progress: Recorder | None = None) -> ModelSource:
    return resolve_model(str(name), cache, progress or Recorder())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that looks like a model's."""
    path = tmp_path / "some-model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": np.zeros(100_000, np.float32)}, path / "model.safetensors")
    return path


def test_a_folder_is_itself(folder: Path, tmp_path: Path) -> None:
    source = resolve(folder, tmp_path / "cache")
    assert (source.folder, source.hub_id, source.name) == (folder, None, "some-model")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["bigscience/bloom-560m", "gpt2", "Qwen/Qwen2.5-0.5B", "a/b_c.d"])
def test_another_name_is_a_hub_id_of_unknown_revision(name: str, tmp_path: Path) -> None:
    assert resolve(name, tmp_path) == ModelSource(folder=None, hub_id=name, name=name, revision="")


@pytest.mark.parametrize(
    "name",
    [
        "./model",
        "/no/such",
        "../no-such-file",
        "a/b/c",
        "a//b",
        "a/",
        "a b",
        "ä/b",
        "a--b",
        "a..b",
        "a.git",
        "a-",
        "a" * 97,
        "\0",
    ],
)
def test_what_is_neither_there_nor_a_hub_id_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotUsableError, match="no such folder or file"):
        resolve(name, tmp_path)


def test_a_missing_gguf_file_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ModelNotUsableError, match=r"model\.gguf: cannot be read: No such file"):
        resolve("some/model.gguf", tmp_path)


def test_a_file_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotUsableError, match=r"neither a folder nor a \.gguf file"):
        resolve(folder / "model.safetensors", tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda f: (f / "config.json").unlink(), "config.json is missing", id="no config"),
        pytest.param(lambda f: (f / "config.json").write_text("{"), "no readable JSON", id="broken config"),
        pytest.param(lambda f: (f / "config.json").write_bytes(b"\xff"), "no readable JSON", id="binary config"),
        pytest.param(lambda f: (f / "config.json").write_text("[]"), "not a JSON object", id="no object"),
        pytest.param(lambda f: (f / "model.safetensors").unlink(), "no weights here", id="no weights"),
        pytest.param(
            lambda f: (f / "model.safetensors").write_text("version https://"), "cut short", id="pointer to weights"
        ),
    ],
)
def test_an_unusable_folder_is_refused_with_the_reason(
    damage: Callable[[Path], object], reason: str, folder: Path, tmp_path: Path
) -> None:
    damage(folder)
    with pytest.raises(ModelNotUsableError, match=f"some-model.*{reason}"):
        resolve(folder, tmp_path)


def test_a_copied_folder_keeps_its_revision(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    revision = resolve(folder, tmp_path).revision
    assert resolve(copy, tmp_path).revision == revision
    assert len(revision) == 16


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param({"a": np.ones(100_000, np.float32)}, id="values"),
        pytest.param({"b": np.zeros(100_000, np.float32)}, id="name"),
        pytest.param({"a": np.zeros(100_001, np.float32)}, id="shape"),
    ],
)
def test_other_weights_are_another_revision(tensors: Any, folder: Path, tmp_path: Path) -> None:
    before = resolve(folder, tmp_path).revision
    save_file(tensors, folder / "model.safetensors")
    assert resolve(folder, tmp_path).revision != before


def test_another_config_is_another_revision(folder: Path, tmp_path: Path) -> None:
    before = resolve(folder, tmp_path).revision
    (folder / "config.json").write_text("{}")
    assert resolve(folder, tmp_path).revision != before


def test_weights_of_the_older_format_have_a_revision_too(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert len(resolve(folder, tmp_path).revision) == 16


def test_a_gguf_file_is_converted_once_and_shows_progress_to_the_last_byte(tmp_path: Path) -> None:
    path = Tiny().write(tmp_path / "tiny.gguf")
    progress, again = Recorder(), Recorder()
    source = resolve(path, tmp_path / "cache", progress)
    assert resolve(path, tmp_path / "cache", again) == source
    assert [task for task, _ in progress.tasks] == ["checking tiny.gguf", "reading tiny", "converting tiny"]
    assert [task for task, _ in again.tasks] == ["checking tiny.gguf"]
    assert (progress.done[0], progress.done[2]) == (progress.tasks[0][1], progress.tasks[2][1])


def test_a_changed_gguf_file_is_another_model(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    first = resolve(Tiny().write(path), tmp_path)
    second = resolve(Tiny(tied=False).write(path), tmp_path)
    assert first.name == second.name == "tiny"
    assert first.revision != second.revision
    assert first.folder != second.folder


def test_a_refused_gguf_file_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    path = Tiny(metadata={"tokenizer.ggml.pre": "dbrx"}).write(tmp_path / "tiny.gguf")
    with pytest.raises(ModelNotUsableError, match="dbrx"):
        resolve(path, tmp_path / "cache")
    assert [entry.suffix for entry in (tmp_path / "cache" / "models").iterdir()] == [".lock"]
