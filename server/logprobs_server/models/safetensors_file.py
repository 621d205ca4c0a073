"""Writes float32 tensors as a safetensors file, a slice at a time, so that memory does not grow with the model.

The format: eight bytes of header length, a JSON header of names, types, shapes and offsets, then the values.
Knows nothing of where tensors come from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["write_safetensors"]

_ALIGNMENT = 8
_ITEM_BYTES = 4


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], slices: Iterable[NDArray[np.float32]]) -> None:
    """Writes the file.

    Args:
        shapes: name and shape of every tensor, in the order of their values.
        slices: the values of all tensors in that order, cut anywhere.
    Raises:
        ValueError: the slices are not exactly what the shapes ask for.
    """
    with path.open("wb") as file:
        file.write(_header(shapes))
        start = file.tell()
        for values in slices:
            file.write(np.ascontiguousarray(values, dtype="<f4").data.cast("B"))
        if file.tell() - start != _ITEM_BYTES * sum(map(math.prod, shapes.values())):
            raise ValueError("the slices do not fill the shapes")


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for name, shape in shapes.items():
        end = offset + _ITEM_BYTES * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header
