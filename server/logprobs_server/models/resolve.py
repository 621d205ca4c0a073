"""Finds the model that the operator named: the embedded one, a folder, a GGUF file, or one of the model hub's.

Reads no environment and loads no model: the caller says where the cache is, and what becomes of the answer.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from logprobs_server.models import embedded
from logprobs_server.models.cache import make_once
from logprobs_server.models.convert import CONVERTER_VERSION, convert_gguf
from logprobs_server.models.errors import ModelNotUsableError
from logprobs_server.models.folder import check_folder, folder_revision
from logprobs_server.models.progress import Progress, console_progress

__all__ = ["ModelNotUsableError", "ModelSource", "resolve_model"]

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_READ_BYTES = 1 << 20
_DIGITS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model is: in a folder, or on the hub under an id; exactly one of both is set.

    name: what to call it.
    revision: 16 hexadecimal digits that identify the weights; empty where only the hub knows.
    """

    folder: Path | None
    hub_id: str | None
    name: str
    revision: str


def resolve_model(name: str | None, cache_dir: Path, progress: Progress | None = None) -> ModelSource:
    """The model of that name; converts it into the cache if it is not yet there.

    Args:
        name: a folder, a .gguf file or a hub id, looked for in that order; None for the embedded default.
        cache_dir: where converted models are kept.
        progress: told of long work; None writes to standard error.
    Raises:
        ModelNotUsableError: there is no such model, or it cannot be used.
    """
    if progress is None:
        progress = console_progress(sys.stderr)
    if name is None:
        return _embedded(cache_dir, progress)
    path = Path(name)
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() == ".gguf":
        return _gguf(path, cache_dir, progress)
    if path.exists():
        raise ModelNotUsableError(f"{name}: neither a folder nor a .gguf file")
    return _hub(name)


def _embedded(cache_dir: Path, progress: Progress) -> ModelSource:
    def make(folder: Path) -> None:
        with embedded.embedded_gguf(folder.parent, progress) as gguf:
            convert_gguf(gguf, folder, embedded.NAME, progress)

    place = _place(cache_dir, embedded.NAME, embedded.GGUF_SHA256)
    return _converted(make_once(place, make, progress), embedded.NAME, embedded.GGUF_SHA256)


def _gguf(path: Path, cache_dir: Path, progress: Progress) -> ModelSource:
    digest = _digest(path, progress)

    def make(folder: Path) -> None:
        convert_gguf(path, folder, path.stem, progress)

    return _converted(make_once(_place(cache_dir, path.stem, digest), make, progress), path.stem, digest)


def _folder(path: Path) -> ModelSource:
    check_folder(path)
    return ModelSource(folder=path, hub_id=None, name=path.resolve().name, revision=folder_revision(path))


def _hub(name: str) -> ModelSource:
    if not _HUB_ID.fullmatch(name) or "--" in name or ".." in name or name.endswith((".", "-", ".git")):
        raise ModelNotUsableError(f"{name}: there is no such folder or file, and it is no hub id (OWNER/MODEL)")
    return ModelSource(folder=None, hub_id=name, name=name, revision="")


def _place(cache_dir: Path, name: str, digest: str) -> Path:
    return cache_dir / "models" / f"{name}-{digest[:_DIGITS]}-{CONVERTER_VERSION}"


def _converted(folder: Path, name: str, digest: str) -> ModelSource:
    return ModelSource(folder=folder, hub_id=None, name=name, revision=digest[:_DIGITS])


def _digest(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file, progress(f"checking {path.name}", path.stat().st_size) as advance:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                advance(len(block))
    except OSError as error:
        raise ModelNotUsableError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
