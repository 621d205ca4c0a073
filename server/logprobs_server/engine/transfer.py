"""Small numbers to a device and back: to a GPU without waiting, from it with one wait for all that is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["fetched", "sent"]


def sent(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of these numbers on the device; a GPU gets it from pinned memory, in the order of its other work."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)


def fetched(*tensors: Tensor) -> list[list[Any]]:
    """The numbers of tensors that are on one device, as lists."""
    here = [tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).record_event().synchronize()
    return [tensor.tolist() for tensor in here]
