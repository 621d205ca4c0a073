"""A GGUF file: its metadata by key and type, its tensors by name as float32. Knows nothing of architectures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
from numpy.typing import NDArray

from logprobs_server.models.errors import ModelNotUsableError
from logprobs_server.models.gguf_metadata import check_metadata

__all__ = ["GgufFile"]

_SLICE_VALUES = 1 << 22
"""Values dequantised at once: the temporary arrays of the gguf package stay below 100 MB."""

T = TypeVar("T")


class GgufFile:
    """An open GGUF file.

    Raises:
        ModelNotUsableError: it cannot be read, is one part of several, or has tensors of an unknown quantisation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_metadata(path)
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
            raise self.refused(f"no readable GGUF file: {error}") from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        if self.get("split.count", int, 1) > 1:
            raise self.refused("one part of a split model; merge the parts into one file first")
        self._check_quantisations()

    def refused(self, reason: str) -> ModelNotUsableError:
        """The error to raise for this file."""
        return ModelNotUsableError(f"{self.path}: {reason}")

    def __contains__(self, key: str) -> bool:
        """Whether the metadata have the key."""
        return key in self._fields

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The metadata's value; a float is the shortest that the stored float32 can stand for.

        Raises:
            ModelNotUsableError: the value is of another type, or missing and there is no default.
        """
        if key not in self._fields:
            if default is None:
                raise self.refused(f"the metadata lack {key}")
            return default
        try:
            value: Any = self._fields[key].contents()
        except UnicodeDecodeError as error:
            raise self.refused(f"{key} is not UTF-8: {error}") from error
        if isinstance(value, float):
            value = float(str(np.float32(value)))
        if type(value) is not kind:
            raise self.refused(f"{key} is {type(value).__name__}, not {kind.__name__}")
        return value

    def id_of(self, key: str) -> int | None:
        """The token id that the metadata have under the key; None without one."""
        return self.get(key, int) if key in self else None

    @property
    def tensor_names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, rows first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def values(self, name: str, row_order: NDArray[np.int64] | None = None) -> Iterator[NDArray[np.float32]]:
        """The tensor's values, some rows at a time.

        Args:
            row_order: the rows to take, in order; all, as they are stored, if None.
        """
        tensor = self._tensors[name]
        rows = np.atleast_2d(tensor.data)
        count = max(1, _SLICE_VALUES // self.shape(name)[-1])
        for start in range(0, len(rows), count):
            part = slice(start, start + count)
            yield gguf.dequantize(rows[part] if row_order is None else rows[row_order[part]], tensor.tensor_type)

    def _check_quantisations(self) -> None:
        for name, tensor in self._tensors.items():
            try:
                gguf.dequantize(np.atleast_2d(tensor.data)[:1], tensor.tensor_type)
            except NotImplementedError:
                kind = tensor.tensor_type.name
                raise self.refused(f"tensor {name} is stored as {kind}, which cannot be dequantised") from None
