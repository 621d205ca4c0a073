"""Walks over the metadata of a GGUF file to see that they end where the file does, before they are read.

A damaged length can make the gguf package's reader go on until memory is full. Knows no key and keeps no value.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

__all__ = ["check_metadata"]

_HEADER = struct.Struct("<4sIQQ")
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def check_metadata(path: Path) -> None:
    """Checks the structure of the file's metadata.

    Raises:
        ValueError: it is broken; the message says how.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        walk = _Walk(file, path.stat().st_size)
        magic, version, _, keys = _HEADER.unpack(walk.read(_HEADER.size))
        if magic != _MAGIC or version not in _VERSIONS:
            raise ValueError("it does not begin as GGUF version 2 or 3 does")
        for _ in range(keys):
            walk.skip_string()
            walk.skip_value(walk.integer("<I"))


class _Walk:
    """A place in the file, which only goes forward and never beyond the end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def read(self, count: int) -> bytes:
        self._take(count)
        return self._file.read(count)

    def integer(self, form: str) -> int:
        (value,) = struct.unpack(form, self.read(struct.calcsize(form)))
        return int(value)

    def skip_string(self) -> None:
        self._skip(self.integer("<Q"))

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip_string()
        elif kind == _ARRAY:
            self._skip_array()
        else:
            self._skip(self._scalar_bytes(kind))

    def _skip_array(self) -> None:
        kind, count = self.integer("<I"), self.integer("<Q")
        if kind == _STRING:
            for _ in range(count):
                self.skip_string()
        else:
            self._skip(count * self._scalar_bytes(kind))

    def _scalar_bytes(self, kind: int) -> int:
        if kind not in _SCALAR_BYTES:
            raise ValueError(f"its metadata have a value of unknown type {kind}")
        return _SCALAR_BYTES[kind]

    def _skip(self, count: int) -> None:
        self._take(count)
        self._file.seek(count, 1)

    def _take(self, count: int) -> None:
        if count > self._left:
            raise ValueError("it ends within its metadata")
        self._left -= count
