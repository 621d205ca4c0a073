"""What transformers loads of a model's folder or hub id: configuration, weights and tokenizer.

It refuses what cannot be served at all; it does not know how a model is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers.utils import cached_file

from logprobs_server.engine.types import ModelDescription
from logprobs_server.text.conversation import ConversationEnd, Message, Render, TemplateRefusedError

__all__ = [
    "LoadOptions",
    "LoadedTokenizer",
    "ModelNotServableError",
    "first_line",
    "load_tokenizer",
    "load_weights",
]

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_UNLIMITED_CONTEXT = 2048
"""Context of models whose positions have no end and whose configuration names none: BLOOM was trained on 2,048."""
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


class ModelNotServableError(Exception):
    """A model that cannot be served; the message is the reason, for the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What to load and how.

    path: a folder or a hub id.
    revision: of the weights; empty takes what the hub says.
    dtype: "auto" (bfloat16 on a GPU, float32 on a CPU), "float32", "bfloat16" or "float16".
    device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" …
    context_length: at most the model's own, which None takes.
    kv_cache_bytes: None takes what `max_sequences` of the longest can use, at most half the free memory.
    kernels_dir: where the CPU's kernels are, or are to be built; None does without them.
    """

    path: str
    name: str
    revision: str
    max_sequences: int
    dtype: str = "auto"
    device: str = "auto"
    context_length: int | None = None
    kv_cache_bytes: int | None = None
    kernels_dir: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer, and the model's template for conversations; None if it has none."""

    tokenizer: Tokenizer
    render: Render | None


def load_weights(options: LoadOptions) -> tuple[Any, ModelDescription]:
    """A model as transformers has it, ready to run on its device, and what is to be known of it.

    Raises:
        ModelNotServableError: with the reason.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = _config(options)
    device, dtype = _device(options.device), _dtype(options)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            options.path, config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelNotServableError(f"{options.name}: the weights cannot be loaded: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelNotServableError(f"{options.name}: the checkpoint lacks weights, among them {missing}")
    model = model.to(device).eval()
    return model, _description(options, config, model)


def load_tokenizer(path: str, name: str) -> LoadedTokenizer:
    """The model's tokenizer: its tokenizer.json to the letter, or what transformers makes of older formats.

    Raises:
        ModelNotServableError: there is none, or it has no fast form.
    """
    try:
        known = transformers.AutoTokenizer.from_pretrained(path)
        file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        tokenizer = known.backend_tokenizer if file is None else Tokenizer.from_file(file)
    except Exception as error:  # the tokenizers package raises bare exceptions
        raise ModelNotServableError(f"{name}: no usable tokenizer: {first_line(error)}") from error
    return LoadedTokenizer(tokenizer=tokenizer, render=_renderer(known) if known.chat_template else None)


def _renderer(tokenizer: Any) -> Render:
    """The tokenizer's template as a function of messages."""

    def render(messages: Sequence[Message], end: ConversationEnd) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                tokenize=False,
                add_generation_prompt=end is ConversationEnd.ASSISTANT_HEADER,
                continue_final_message=end is ConversationEnd.CONTINUE_LAST,
            )
        except Exception as error:  # a template is a program of the model's makers, and may raise anything
            raise TemplateRefusedError(first_line(error)) from error
        return text

    return render


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _config(options: LoadOptions) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(options.path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotServableError(f"{options.name}: no usable configuration: {first_line(error)}") from error
    if config.is_encoder_decoder:
        raise ModelNotServableError(
            f"{options.name}: {config.model_type} is an encoder-decoder, not a causal language model"
        )
    other = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other:
        raise ModelNotServableError(
            f"{options.name}: layers of type {', '.join(sorted(other))} keep state without a KV cache"
        )
    return config


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ModelNotServableError(f"device {device} is not available: {first_line(error)}") from error


def _dtype(options: LoadOptions) -> torch.dtype:
    if options.dtype == "auto":
        return torch.bfloat16 if _device(options.device).type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype


def _description(options: LoadOptions, config: Any, model: Any) -> ModelDescription:
    own = next(
        (n for field in _CONTEXT_FIELDS if isinstance(n := getattr(config, field, None), int)),
        _UNLIMITED_CONTEXT,
    )
    if options.context_length is not None and options.context_length > own:
        raise ModelNotServableError(f"context length {options.context_length} is above the model's own, {own}")
    eos = getattr(model.generation_config, "eos_token_id", None)
    eos = config.eos_token_id if eos is None else eos
    return ModelDescription(
        name=options.name,
        revision=options.revision or getattr(config, "_commit_hash", None) or "",
        dtype=str(model.dtype).removeprefix("torch."),
        batch_invariant=False,
        vocabulary_size=model.get_input_embeddings().weight.shape[0],
        context_length=options.context_length or own,
        eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        bos_token_id=config.bos_token_id if isinstance(config.bos_token_id, int) else None,
    )
