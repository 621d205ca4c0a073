"""Random requests of every method, made from the contract's descriptors: sound ones, and broken ones made of them.

What a field must be like is told by its name; what a test knows of no field is drawn by its type. Knows no server.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from logprobs.v1 import logprobs_pb2 as pb

__all__ = ["METHODS", "damaged", "mutated", "sound_request"]

METHODS: tuple[MethodDescriptor, ...] = tuple(pb.DESCRIPTOR.services_by_name["LogprobsService"].methods)
_REQUIRED = {"context", "prompt", "input", "request", "text", "ids", "messages", "role", "content", "id", "max_tokens"}
_RARE = {"best_of", "full_distribution", "neutral_context", "roll_stride", "time_limit", "stopping", "beam_search"}
_PIECES = ("the horse ", "raced", " ", "\n", "\0", "é", "e\u0301", "字", "🙂", "👩\u200d👧", "<|eos|>", "<|im_end|>")
_NUMBERS = (-(2**63), -(2**31), -1, 0, 1, 2, 7, 100, 101, 300, 2**31 - 1, 2**53 - 1, 2**53, 2**63 - 1)
_FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-38, 0.5, 1.0, 1.5, -1.0, 1e6, 3.4e38, -3.4e38)
_INT32 = (-(2**31), 2**31 - 1)

Draw = random.Random
_SOUND: dict[str, Callable[[Draw, int], Any]] = {
    "ids": lambda draw, vocabulary: draw.randrange(vocabulary),
    "token_ids": lambda draw, vocabulary: draw.randrange(vocabulary),
    "key": lambda draw, vocabulary: draw.randrange(vocabulary),
    "value": lambda draw, _: draw.choice((-math.inf, -5.0, 0.0, 2.5)),
    "role": lambda draw, _: draw.choice(("system", "user", "assistant")),
    "id": lambda draw, _: f"{draw.getrandbits(64):x}",
    "max_tokens": lambda draw, _: draw.randrange(1, 12),
    "completion_count": lambda draw, _: draw.randrange(1, 4),
    "best_of": lambda draw, _: draw.randrange(1, 6),
    "temperature": lambda draw, _: draw.choice((0.0, 0.3, 1.0, 2.0, 1e6)),
    "top_k": lambda draw, _: draw.randrange(20),
    "top_p": lambda draw, _: 1 - draw.random(),
    "min_p": lambda draw, _: draw.random(),
    "typical_p": lambda draw, _: 1 - draw.random(),
    "repetition_penalty": lambda draw, _: draw.uniform(0.5, 2),
    "presence_penalty": lambda draw, _: draw.uniform(-2, 2),
    "frequency_penalty": lambda draw, _: draw.uniform(-2, 2),
    "seed": lambda draw, _: draw.randrange(2**53 - 10),
    "beam_count": lambda draw, _: draw.randrange(1, 5),
    "length_penalty": lambda draw, _: draw.uniform(-1, 2),
    "length_exponent": lambda draw, _: draw.uniform(-10, 10),
    "min_tokens": lambda draw, _: draw.randrange(3),
    "strings": lambda draw, _: _text(draw, 3) or "a",
    "top_count": lambda draw, _: draw.randrange(8),
    "roll_stride": lambda draw, _: draw.randrange(10, 40),
    "seconds": lambda draw, _: draw.randrange(3),
    "nanos": lambda draw, _: draw.randrange(1, 10**9),
}


def sound_request(draw: Draw, method: MethodDescriptor, vocabulary_size: int) -> Message:
    """A request that breaks few rules, mostly none."""
    request = _random(draw, method.input_type, vocabulary_size)
    for message in _messages(request):
        _repair(message)
    return request


def mutated(draw: Draw, request: Message) -> Message:
    """A copy of a request in which up to three fields, anywhere, are cleared or became something hostile."""
    copy = type(request)()
    copy.CopyFrom(request)
    for _ in range(draw.randrange(1, 4)):
        message = draw.choice(list(_messages(copy)))
        if message.DESCRIPTOR.fields:
            _mutate(draw, message, draw.choice(message.DESCRIPTOR.fields))
    return copy


def damaged(draw: Draw, data: bytes) -> bytes:
    """A message's bytes, up to four times changed, doubled, cut or mixed with others."""
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 5)):
        start, stop = sorted((draw.randrange(len(changed) + 1), draw.randrange(len(changed) + 1)))
        match draw.randrange(6):
            case 0 if start < len(changed):
                changed[start] ^= 1 << draw.randrange(8)
            case 1:
                changed[start:start] = draw.randbytes(draw.randrange(1, 9))
            case 2:
                del changed[start : min(stop, start + 8)]
            case 3:
                changed[start:start] = changed[start:stop]
            case 4:
                del changed[draw.randrange(len(changed) + 1) :]
            case 5:
                changed += _random(draw, draw.choice(METHODS).input_type, 300).SerializeToString()
    return bytes(changed)


def _random(draw: Draw, kind: Descriptor, vocabulary_size: int) -> Message:
    """A message with its required fields, and some of the others."""
    message = GetMessageClass(kind)()
    chosen = {oneof.name: _one_of(draw, oneof.fields) for oneof in kind.oneofs}
    for field in kind.fields:
        oneof = field.containing_oneof
        likely = 1.0 if field.name in _REQUIRED else 0.08 if field.name in _RARE else 0.4
        if oneof is not None and len(oneof.fields) > 1:
            likely = float(chosen[oneof.name] is field)
        if draw.random() < likely:
            _fill(draw, message, field, vocabulary_size)
    return message


def _one_of(draw: Draw, fields: list[FieldDescriptor]) -> FieldDescriptor:
    return fields[-1] if draw.random() < 0.05 else draw.choice(fields[: max(1, len(fields) - 1)])


def _fill(draw: Draw, message: Message, field: FieldDescriptor, vocabulary_size: int) -> None:
    """Sets a field to something sound."""

    def value(of: FieldDescriptor) -> Any:
        if of.name in _SOUND:
            return _SOUND[of.name](draw, vocabulary_size)
        if of.enum_type is not None:
            return draw.choice(of.enum_type.values).number
        return draw.random() < 0.5 if of.type == FieldDescriptor.TYPE_BOOL else _text(draw, 8)

    held = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        held.update({value(entry["key"]): value(entry["value"]) for _ in range(draw.randrange(4))})
    elif field.message_type is not None:
        for _ in range(draw.randrange(1, 4) if field.is_repeated else 1):
            part = _random(draw, field.message_type, vocabulary_size)
            held.append(part) if field.is_repeated else held.CopyFrom(part)
    elif field.is_repeated:
        held.extend(value(field) for _ in range(draw.randrange(1, 30 if field.name == "ids" else 4)))
    else:
        setattr(message, field.name, value(field))


def _repair(message: Message) -> None:
    """Undoes what breaks rules between fields."""
    if isinstance(message, pb.Input):
        if message.WhichOneof("form") != "text":
            message.ClearField("add_special_tokens")
    elif isinstance(message, pb.ScoreRequest):
        for continuation in message.continuations:
            continuation.ClearField("add_special_tokens")
        message.next_token |= message.full_distribution
        if message.long_input != pb.LONG_INPUT_ROLL:
            message.ClearField("roll_stride")
        if not message.continuations:
            message.ClearField("neutral_context")
    elif isinstance(message, pb.GenerateRequest):
        _repair_generate(message)


def _repair_generate(request: pb.GenerateRequest) -> None:
    count = request.completion_count or 1
    if request.HasField("best_of"):
        request.best_of += count
    if request.HasField("beam_search"):
        request.ClearField("best_of")
        request.ClearField("ranking")
        request.beam_search.beam_count += count
    elif request.ranking.criterion == pb.RANKING_CRITERION_BEAM_SCORE:
        request.ranking.ClearField("criterion")
    if request.ranking.criterion != pb.RANKING_CRITERION_LENGTH_NORMALIZED:
        request.ranking.ClearField("length_exponent")
    if request.HasField("max_tokens"):
        request.max_tokens += request.stopping.min_tokens


def _messages(message: Message) -> Iterator[Message]:
    """A message and all that it holds, those that stand in lists included."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else [value]:
                yield from _messages(part)


def _mutate(draw: Draw, message: Message, field: FieldDescriptor) -> None:
    held = getattr(message, field.name)
    if draw.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        held[draw.choice([n for n in _NUMBERS if _INT32[0] <= n <= _INT32[1]])] = draw.choice(_FLOATS)
    elif field.message_type is not None:
        part = _random(draw, field.message_type, 310)
        held.extend([part] * draw.choice((1, 2, 40))) if field.is_repeated else held.CopyFrom(part)
    elif field.is_repeated:
        held.extend([_hostile(draw, field)] * draw.choice((1, 1, 2, 20, 2_000)))
    else:
        setattr(message, field.name, _hostile(draw, field))


def _hostile(draw: Draw, field: FieldDescriptor) -> Any:
    """A value that its type allows and a rule may not."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_ENUM:
            return draw.choice([n for n in _NUMBERS if _INT32[0] <= n <= _INT32[1]])
        case FieldDescriptor.CPPTYPE_INT64:
            return draw.choice(_NUMBERS)
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return draw.choice(_FLOATS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return draw.random() < 0.5
    return draw.choice(("", "\0", _text(draw, 30), _text(draw, 30) * draw.choice((10, 100, 1_000))))


def _text(draw: Draw, most: int) -> str:
    return "".join(draw.choice(_PIECES) for _ in range(draw.randrange(most + 1)))
