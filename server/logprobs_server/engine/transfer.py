"""Small numbers to a device and back: to a GPU without waiting, from it with one wait for all that is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["fetched", "sent"]


def sent(values: Sequence[Any] | Tensor, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """These numbers on the device, where a GPU gets them in the order of its other work; a tensor keeps its dtype."""
    here = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)


def fetched(*tensors: Tensor) -> list[list[Any]]:
    """The numbers of tensors that are on one device, as lists."""
    here = [tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).record_event().synchronize()
    return [tensor.tolist() for tensor in here]
