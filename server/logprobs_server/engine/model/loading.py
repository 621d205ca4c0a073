"""Makes a model ready to run: on the device path or the lean path where family and machine allow it, else on the
general one. Whichever it is, it is served only if it computes what the model's plain forward pass does.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from logprobs_server.engine import kernels
from logprobs_server.engine.batch import Chunk, Model
from logprobs_server.engine.decoder import architecture_of
from logprobs_server.engine.device import DeviceModel
from logprobs_server.engine.kv_cache import blocks_for
from logprobs_server.engine.lean import LeanModel
from logprobs_server.engine.model.capacity import blocks_that_fit
from logprobs_server.engine.model.checkpoint import LoadOptions, ModelNotServableError, first_line, load_weights
from logprobs_server.engine.model.general import TransformersModel
from logprobs_server.engine.types import ModelDescription

__all__ = ["load_model"]

_log = logging.getLogger(__name__)
_CHECK_TOKENS = 24
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Mean difference, in nats, between a model's plain forward pass and ours from which it is refused."""


def load_model(options: LoadOptions) -> Model:
    """Loads a model's weights and makes it ready to run: on a path of our own where family and machine allow it.

    Raises:
        ModelNotServableError: with the reason.
    """
    model, description = load_weights(options)
    try:
        ids, plain = _plain_logits(model, description)
        check = partial(_check, ids=ids, plain=plain, tolerance=_CHECK_TOLERANCE[model.dtype])
        fast = _device_model(model, description, options, check) if _is_gpu(model.device) else None
        served = fast or _lean_model(model, description, options) or TransformersModel(model, description, options)
        check(served)
        return served
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
        reason = f"{options.name}: {type(model).__name__} cannot be run through a KV cache: {first_line(error)}"
        raise ModelNotServableError(reason) from error


@torch.inference_mode()
def _lean_model(model: Any, description: ModelDescription, options: LoadOptions) -> LeanModel | None:
    """The model on the lean path; None where that does not know its family, or where the kernels cannot be used."""
    if options.kernels_dir is None or model.device.type != "cpu" or model.dtype == torch.float16:
        return None
    architecture = architecture_of(model, description.context_length)
    if architecture is None or not kernels.load(options.kernels_dir):
        return None
    torch.ops.logprobs.set_threads(torch.get_num_threads())
    num_blocks = blocks_that_fit(LeanModel.block_bytes(architecture, model.dtype), description, options, model.device)
    return LeanModel(architecture, description, dtype=model.dtype, num_blocks=num_blocks)


@torch.inference_mode()
def _device_model(
    model: Any, description: ModelDescription, options: LoadOptions, check: Callable[[Model], None]
) -> DeviceModel | None:
    """The model on the device path; None where that does not know its family, or fails on this device."""
    architecture = architecture_of(model, description.context_length)
    if architecture is None:
        return None
    block_bytes = DeviceModel.block_bytes(architecture, model.dtype)
    num_blocks = blocks_that_fit(block_bytes, description, options, model.device)
    try:
        served = DeviceModel(architecture, description, dtype=model.dtype, num_blocks=num_blocks, device=model.device)
        check(served)
    except (ModelNotServableError, RuntimeError) as error:
        _log.warning("left to transformers' own forward pass, which is slower: %s", first_line(error))
        return None
    return served


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@torch.inference_mode()
def _plain_logits(model: Any, description: ModelDescription) -> tuple[list[int], Tensor]:
    """Some token ids and the logits of the model's plain forward pass over them, [tokens, vocab]."""
    count = min(_CHECK_TOKENS, description.context_length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(description.vocabulary_size, (1, count), generator=generator)
    return ids[0].tolist(), model(input_ids=ids.to(model.device), use_cache=False).logits[0]


@torch.inference_mode()
def _check(model: Model, ids: list[int], plain: Tensor, tolerance: float) -> None:
    """Compares a prompt computed in chunks and token by token with the plain forward pass.

    Raises:
        ModelNotServableError: they differ.
    """
    cuts = [0, len(ids) // 2, *range(len(ids) // 2 + 3, len(ids) + 1)]
    blocks = range(1, 1 + blocks_for(len(ids)))
    hidden = torch.cat(
        [
            model.forward([Chunk(token_ids=ids[start:stop], start=start, blocks=blocks)])
            for start, stop in itertools.pairwise(cuts)
        ]
    )
    difference = (_logprobs(model.logits(hidden)) - _logprobs(plain[: len(hidden)])).abs().mean().item()
    if not difference <= tolerance:
        raise ModelNotServableError(
            f"{model.description.name}: its forward pass through a KV cache differs from its plain one by "
            f"{difference:.3g} nats on average; models with other state than keys and values cannot be served"
        )


def _logprobs(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(dim=-1).clamp_(min=-100)
