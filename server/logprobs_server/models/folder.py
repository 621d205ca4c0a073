"""Folders in which a model is already as transformers reads it: what they must hold, and which weights they have.

Knows nothing of what is in the weights.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from logprobs_server.models.errors import ModelNotUsableError

__all__ = ["check_folder", "folder_revision"]

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def check_folder(folder: Path) -> None:
    """Tells early, and in words, what transformers would stumble over.

    Raises:
        ModelNotUsableError: configuration or weights are missing or damaged.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelNotUsableError(f"{folder}: no model here: config.json is missing") from None
    except (OSError, ValueError) as error:
        raise ModelNotUsableError(f"{path}: no readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelNotUsableError(f"{path}: not a JSON object")
    if not _weights(folder):
        raise ModelNotUsableError(f"{folder}: no weights here: neither *.safetensors nor *.bin")


def folder_revision(folder: Path) -> str:
    """16 hexadecimal digits that tell one folder's weights from another's.

    Reading all of the weights would take longer than loading them. So this digests config.json and, of each file
    of weights, its name, size, header (safetensors alone) and 64 blocks of 4 KiB, evenly spread: it notices every
    other training run, but not every single value changed.

    Raises:
        ModelNotUsableError: a file of weights is damaged.
    """
    digest = hashlib.sha256(_framed((folder / "config.json").read_bytes()))
    for path in _weights(folder):
        digest.update(_framed(path.name.encode()))
        digest.update(_framed(str(path.stat().st_size).encode()))
        digest.update(_framed(_sampled(path)))
    return digest.hexdigest()[:16]


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def _framed(part: bytes) -> bytes:
    """The part with its length before it, so that no two lists of parts look the same in a row."""
    return len(part).to_bytes(8, "little") + part


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        parts = [_header(path, file, size)] if path.suffix == ".safetensors" else []
        for sample in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            parts.append(file.read(_SAMPLE_BYTES))
    return b"".join(parts)


def _header(path: Path, file: BinaryIO, size: int) -> bytes:
    length = int.from_bytes(file.read(8), "little")
    if 8 + length > size:
        raise ModelNotUsableError(f"{path}: no safetensors file, or cut short")
    return file.read(length)
