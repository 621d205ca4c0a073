"""Models: the general path through transformers' own forward pass, for any causal language model it knows.

The only module that imports transformers. A model computes chunks of sequences, keeps their keys and values in
blocks, and turns hidden states into logits; it knows nothing of requests, sampling or log probabilities.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import cached_file

from logprobs_server.engine import kernels
from logprobs_server.engine.batch import Chunk, Model
from logprobs_server.engine.decoder import Architecture, architecture_of
from logprobs_server.engine.device import DeviceModel
from logprobs_server.engine.kv_cache import BLOCK_SIZE, blocks_for
from logprobs_server.engine.lean import LeanModel, kept_dtype
from logprobs_server.engine.types import ModelDescription
from logprobs_server.text.conversation import ConversationEnd, Message, Render, TemplateRefusedError

__all__ = [
    "LoadOptions",
    "LoadedTokenizer",
    "ModelNotServableError",
    "TransformersModel",
    "load_model",
    "load_tokenizer",
]

_log = logging.getLogger(__name__)
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_UNLIMITED_CONTEXT = 2048
"""Context of models whose positions have no end and whose configuration names none: BLOOM was trained on 2,048."""
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_CHECK_TOKENS = 24
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Mean difference, in nats, between a model's plain forward pass and ours from which it is refused."""
_KV_SHARE = 0.5
"""Share of the free memory that the KV cache takes at most when its size is not set."""


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


class _Group:
    """Chunks of equal length as one padded batch: pasts are padded on the left, so that distances stay right."""

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        past, new = max(chunk.start for chunk in chunks), len(chunks[0].token_ids)
        slots = [_slots(chunk.blocks, chunk.start + new) for chunk in chunks]
        self.token_ids = torch.tensor([list(chunk.token_ids) for chunk in chunks], device=device)
        self.position_ids = torch.tensor([list(range(c.start, c.start + new)) for c in chunks], device=device)
        self.attention_mask = torch.tensor(
            [[0] * (past - chunk.start) + [1] * (chunk.start + new) for chunk in chunks], device=device
        )
        # Padding reads block 0, which stays zero. [batch, past] and [batch · new]
        self.past_slots = torch.tensor(
            [[0] * (past - c.start) + s[: c.start] for c, s in zip(chunks, slots, strict=True)],
            device=device,
            dtype=torch.int64,
        )
        self.new_slots = torch.tensor([slot for s in slots for slot in s[-new:]], device=device)


class _BlockLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """One layer's keys and values in blocks, which transformers sees as the past of the group under way."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.stores = (keys, values)  # [slots, heads, head_dim] each
        self.group: _Group | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values, [batch, heads, new, head_dim]; returns past and new ones together."""
        return self._extend(self.stores[0], key_states), self._extend(self.stores[1], value_states)

    def _extend(self, store: Tensor, new: Tensor) -> Tensor:
        assert self.group is not None
        store[self.group.new_slots] = new.transpose(1, 2).flatten(0, 1)
        past = store[self.group.past_slots].transpose(1, 2)  # [batch, heads, past, head_dim]
        return torch.cat([past, new], dim=2)

    def get_seq_length(self) -> int:
        """Length of the group's past, padding included."""
        return 0 if self.group is None else self.group.past_slots.shape[1]


class _HiddenStates(BaseModelOutputWithPast):  # type: ignore[misc]  # transformers is not typed
    """A decoder's output that has nothing but hidden states, whatever else a model's forward hands on."""

    def __getattr__(self, name: str) -> None:
        return None


class _PassThrough(nn.Module):
    """Stands where the decoder stood: the model's own forward then applies its head to hidden states handed in."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _HiddenStates:
        """Hands the hidden states through."""
        return _HiddenStates(last_hidden_state=inputs_embeds)


class TransformersModel:
    """A causal language model run by transformers, its keys and values in blocks. Implements `Model`.

    Takes the model over: what stands for its decoder afterwards only hands hidden states through.
    """

    def __init__(self, model: Any, description: ModelDescription, options: LoadOptions) -> None:
        self.description = description
        self.device = model.device
        self._body = model.get_decoder()
        self._takes_positions = "position_ids" in inspect.signature(self._body.forward).parameters
        self._cache_name = _cache_name(self._body)
        shapes = _kv_shapes(self._body, self.device)
        self.own_threads = False
        self.num_blocks = _num_blocks(shapes, model.dtype, description, options, self.device)
        self._layers = [
            _BlockLayer(*(self._new_store(heads, size, model.dtype) for heads, size in layer)) for layer in shapes
        ]
        self._cache = Cache(layers=list(self._layers))
        _replace_module(model, self._body, _PassThrough())
        self._head = model

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes the chunks and stores their keys and values; returns hidden states [tokens of all, hidden]."""
        order = sorted(range(len(chunks)), key=lambda i: len(chunks[i].token_ids))
        parts: dict[int, Tensor] = {}
        for _, members in itertools.groupby(order, key=lambda i: len(chunks[i].token_ids)):
            indices = list(members)
            hidden = self._run(_Group([chunks[i] for i in indices], self.device))
            parts.update(zip(indices, hidden, strict=True))
        return torch.cat([parts[i] for i in range(len(chunks))])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] that follow hidden states [rows, hidden], in the model's dtype."""
        logits: Tensor = self._head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits
        return logits.squeeze(0)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies keys and values of blocks, (from, to)."""
        sources, targets = (torch.tensor(side, device=self.device) for side in zip(*pairs, strict=True))
        for store in itertools.chain.from_iterable(layer.stores for layer in self._layers):
            blocks = store.view(self.num_blocks, BLOCK_SIZE, *store.shape[1:])
            blocks[targets] = blocks[sources]

    def _run(self, group: _Group) -> Tensor:
        """Runs one group; returns [batch, new, hidden]."""
        for layer in self._layers:
            layer.group = group
        positions = {"position_ids": group.position_ids} if self._takes_positions else {}
        hidden: Tensor = self._body(
            input_ids=group.token_ids,
            attention_mask=group.attention_mask,
            use_cache=True,
            **{self._cache_name: self._cache},
            **positions,
        ).last_hidden_state
        return hidden

    def _new_store(self, heads: int, size: int, dtype: torch.dtype) -> Tensor:
        """Room for all blocks' keys or values: [slots, heads, head_dim]. Untouched memory costs nothing on a CPU."""
        store = torch.empty(self.num_blocks * BLOCK_SIZE, heads, size, dtype=dtype, device=self.device)
        store[:BLOCK_SIZE] = 0
        return store


def load_model(options: LoadOptions) -> Model:
    """Loads a model's weights and makes it ready to run: on a path of our own where family and machine allow it.

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
        raise ModelNotServableError(f"{options.name}: the weights cannot be loaded: {_first_line(error)}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelNotServableError(f"{options.name}: the checkpoint lacks weights, among them {missing}")
    model = model.to(device).eval()
    description = _description(options, config, model)
    try:
        ids, plain = _plain_logits(model, description)
        check = partial(_check, ids=ids, plain=plain, tolerance=_CHECK_TOLERANCE[model.dtype])
        fast = _device_model(model, description, options, check) if _is_gpu(device) else None
        served = fast or _lean_model(model, description, options) or TransformersModel(model, description, options)
        check(served)
        return served
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
        reason = f"{options.name}: {type(model).__name__} cannot be run through a KV cache: {_first_line(error)}"
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
    num_blocks = _blocks_of(architecture, model, description, options)
    return LeanModel(architecture, description, dtype=model.dtype, num_blocks=num_blocks)


@torch.inference_mode()
def _device_model(
    model: Any, description: ModelDescription, options: LoadOptions, check: Callable[[Model], None]
) -> DeviceModel | None:
    """The model on the device path; None where that does not know its family, or fails on this device."""
    architecture = architecture_of(model, description.context_length)
    if architecture is None:
        return None
    num_blocks = _blocks_of(architecture, model, description, options)
    try:
        served = DeviceModel(architecture, description, dtype=model.dtype, num_blocks=num_blocks, device=model.device)
        check(served)
    except (ModelNotServableError, RuntimeError) as error:
        _log.warning("left to transformers' own forward pass, which is slower: %s", _first_line(error))
        return None
    return served


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _blocks_of(architecture: Architecture, model: Any, description: ModelDescription, options: LoadOptions) -> int:
    kept = (architecture.key_heads, architecture.head_size)
    shapes = [(kept, kept) for _ in architecture.layers]
    return _num_blocks(shapes, kept_dtype(model.dtype), description, options, model.device)


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
        raise ModelNotServableError(f"{name}: no usable tokenizer: {_first_line(error)}") from error
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
            raise TemplateRefusedError(_first_line(error)) from error
        return text

    return render


def _config(options: LoadOptions) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(options.path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotServableError(f"{options.name}: no usable configuration: {_first_line(error)}") from error
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
        raise ModelNotServableError(f"device {device} is not available: {_first_line(error)}") from error


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


def _cache_name(body: Any) -> str:
    """What a decoder calls its keys and values: transformers renames `past_key_values` to `cache`, model by model."""
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"


def _slots(blocks: Sequence[int], count: int) -> list[int]:
    """Where the first `count` tokens of a sequence with these blocks are."""
    return [block * BLOCK_SIZE + i for block in blocks[: blocks_for(count)] for i in range(BLOCK_SIZE)][:count]


def _replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` where `old` stands inside the model."""
    name = next(name for name, module in model.named_modules() if module is old)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


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


@torch.inference_mode()
def _kv_shapes(body: Any, device: torch.device) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(heads, head_dim) of keys and of values, per layer, seen by computing one token."""
    cache = DynamicCache()
    body(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=True, **{_cache_name(body): cache})
    return [tuple((kv.shape[1], kv.shape[3]) for kv in (layer.keys, layer.values)) for layer in cache.layers]  # type: ignore[misc]


def _num_blocks(
    shapes: list[tuple[tuple[int, int], tuple[int, int]]],
    dtype: torch.dtype,
    description: ModelDescription,
    options: LoadOptions,
    device: torch.device,
) -> int:
    """Blocks of the KV cache, the unused block 0 included."""
    kv_cache_bytes = options.kv_cache_bytes
    token_bytes = dtype.itemsize * sum(heads * size for layer in shapes for heads, size in layer)
    if kv_cache_bytes is None:
        useful = options.max_sequences * description.context_length * token_bytes
        kv_cache_bytes = min(useful, int(_KV_SHARE * _free_memory(device)))
    blocks = kv_cache_bytes // (token_bytes * BLOCK_SIZE)
    least = 2 * blocks_for(description.context_length)
    if blocks < least:
        needed = least * token_bytes * BLOCK_SIZE
        raise ModelNotServableError(
            f"{description.name}: a KV cache of {kv_cache_bytes:,} bytes is too small for a context of "
            f"{description.context_length} tokens, which needs {needed:,}; set a shorter context length"
        )
    return 1 + blocks


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
