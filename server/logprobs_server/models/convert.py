"""Converts a GGUF file into a folder of safetensors, configuration and tokenizer, as transformers reads it.

Values are those of the file, dequantised to float32 (which holds every quantisation exactly, as bfloat16 does
not). Knows nothing of caches or of where the file came from.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logprobs_server.models.architectures import Architecture, architecture_of
from logprobs_server.models.gguf_file import GgufFile
from logprobs_server.models.gguf_tokenizer import GgufTokenizer
from logprobs_server.models.progress import Advance, Progress
from logprobs_server.models.safetensors_file import write_safetensors

__all__ = ["CONVERTER_VERSION", "convert_gguf"]

CONVERTER_VERSION = 1
"""Part of a converted folder's name; to be raised whenever a conversion would come out differently."""


def convert_gguf(path: Path, folder: Path, name: str, progress: Progress) -> None:
    """Fills the folder with the model of the GGUF file.

    Raises:
        ModelNotUsableError: the file is damaged, or of a kind that cannot be converted exactly.
    """
    with progress(f"reading {name}", None):
        file = GgufFile(path)
        tokenizer = GgufTokenizer(file)
        architecture = architecture_of(file, tokenizer.vocabulary_size)
        _write_tokenizer(tokenizer, architecture.context_length, folder)
        _write_configs(architecture.config(tokenizer.eos_token_ids), folder)
    shapes = {theirs: file.shape(ours) for ours, theirs in architecture.tensors.items()}
    size = 4 * sum(map(math.prod, shapes.values()))
    free = shutil.disk_usage(folder).free
    if free < size:
        raise file.refused(f"its conversion takes {size:,} bytes of disk, and {free:,} are free in the cache")
    with progress(f"converting {name}", size) as advance:
        write_safetensors(folder / "model.safetensors", shapes, _values(file, architecture, advance))


def _values(file: GgufFile, architecture: Architecture, advance: Advance) -> Iterator[NDArray[np.float32]]:
    """The values of all tensors, in order."""
    for name in architecture.tensors:
        for values in file.values(name, architecture.row_order(name)):
            yield values
            advance(values.nbytes)


def _write_tokenizer(tokenizer: GgufTokenizer, context_length: int, folder: Path) -> None:
    tokenizer.build().save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer.config(context_length))


def _write_configs(config: dict[str, object], folder: Path) -> None:
    _write_json(folder / "config.json", config)
    ids = {key: value for key, value in config.items() if key.endswith("_token_id") and value is not None}
    _write_json(folder / "generation_config.json", ids)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
