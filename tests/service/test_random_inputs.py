"""The bytes of all tokens are those of the text, for random texts and tokens, streamed and not, by several tokenizers.

In-process tests ask the same of many more; these show that nothing is lost on the wire.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import tiny_tokenizers
from harness import Served, ids, running, uniform
from logprobs.v1 import logprobs_pb2 as pb
from random_texts import random_ids, random_texts
from tiny_models import save_model
from tokenizers import Tokenizer
from transformers import LlamaConfig

COUNT = 100
"""Of texts, of token sequences given, and of completions drawn: each for every tokenizer."""
LIMIT = 65_536
TEXTS = list(random_texts(COUNT, seed=3))
LONG = "".join(TEXTS * 2)
FEW = pb.LogprobOptions(top_count=3)
TOKENIZERS = ["embedded", "byte fallback", "normalising", "word piece"]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, embedded_folder: Path) -> Tokenizer:
    """The embedded model's tokenizer, and one of each kind that changes texts."""
    if request.param == "embedded":
        return Tokenizer.from_file(str(embedded_folder / "tokenizer.json"))
    return tiny_tokenizers.KINDS[request.param]()


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny model with that tokenizer."""
    folder = tmp_path_factory.mktemp("random") / "tiny"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_model(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=8192, **sizes), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    with running(folder, max_response_bytes=LIMIT) as server:
        yield server


def plain(content: str) -> pb.Input:
    """A text as an input, without special tokens."""
    return pb.Input(text=content, add_special_tokens=False)


def streamed(served: Served, inputs: Sequence[pb.Input]) -> list[tuple[list[pb.Token], bool]]:
    """Tokens of each input and whether its text changed, by ScoreStream."""
    requests = [
        pb.ScoreStreamRequest(id=str(i), request=pb.ScoreRequest(context=given, logprobs=FEW))
        for i, given in enumerate(inputs)
    ]
    tokens: list[list[pb.Token]] = [[] for _ in inputs]
    changed: dict[int, bool] = {}
    for response in served.stub.ScoreStream(iter(requests)):
        index = int(response.id)
        tokens[index] += response.part.tokens
        for sequence in response.response.sequences:
            tokens[index] += sequence.tokens
            changed[index] = sequence.text_changed
    return [(told, changed[i]) for i, told in enumerate(tokens)]


def of_prompt(served: Served, given: pb.Input) -> tuple[list[pb.Token], bool]:
    """The same of a prompt, by Generate; every message says alike whether it changed."""
    stream = served.generate(pb.GenerateRequest(prompt=given, max_tokens=0, prompt_logprobs=FEW))
    [changed] = {r.prompt_scored.text_changed for r in stream.responses if r.HasField("prompt_scored")}
    return stream.prompt_tokens, changed


def spelled(tokens: Sequence[pb.Token]) -> bytes:
    """The bytes of all, each of which starts where those before it end."""
    starts = list(accumulate((len(token.bytes) for token in tokens), initial=0))
    assert [token.byte_offset for token in tokens] == starts[:-1]
    joined = b"".join(token.bytes for token in tokens)
    for token, start in zip(tokens, starts, strict=False):
        points = len(joined[:start].decode(errors="replace"))
        assert token.code_point_offset in (points, points - 1)  # inside a character: that character's
    return joined


def test_random_texts_keep_their_bytes_or_say_that_they_changed(tokenizer: Tokenizer, served: Served) -> None:
    inputs = list(map(plain, TEXTS))
    num_changed = 0
    for content, given, (tokens, changed) in zip(TEXTS, inputs, streamed(served, inputs), strict=True):
        told = served.stub.Tokenize(pb.TokenizeRequest(input=given))
        joined = spelled(told.tokens)
        token_ids = [token.id for token in told.tokens]
        assert told.text_changed == changed == (joined != content.encode()), repr(content)
        assert [token.id for token in tokens] == token_ids == tokenizer.encode(content, add_special_tokens=False).ids
        assert spelled(tokens) == joined
        if token_ids:
            prompt, prompt_changed = of_prompt(served, given)
            assert prompt == tokens
            assert prompt_changed == changed
        num_changed += changed
    assert 0 < num_changed < len(TEXTS)


def test_a_text_too_long_for_one_message_keeps_its_bytes_too(tokenizer: Tokenizer, served: Served) -> None:
    request = pb.ScoreStreamRequest(id="0", request=pb.ScoreRequest(context=plain(LONG), logprobs=FEW))
    parts = list(served.stub.ScoreStream(iter([request])))
    assert len(parts) > 2
    assert max(part.ByteSize() for part in parts) <= LIMIT
    [(tokens, changed)] = streamed(served, [plain(LONG)])
    assert [token.id for token in tokens] == tokenizer.encode(LONG, add_special_tokens=False).ids
    assert changed == (spelled(tokens) != LONG.encode())
    assert of_prompt(served, plain(LONG)) == (tokens, changed)


def test_continuations_of_random_texts_are_the_rest_of_the_whole(served: Served) -> None:
    draw = random.Random(4)
    for content in TEXTS:
        cut = draw.randint(0, len(content))
        whole = served.stub.Tokenize(pb.TokenizeRequest(input=plain(content)))
        [sequence] = served.score(pb.ScoreRequest(context=plain(content[:cut]), continuations=[plain(content[cut:])]))
        rest = whole.tokens[sequence.context_token_count :]
        assert [(token.id, token.bytes) for token in sequence.tokens] == [(token.id, token.bytes) for token in rest]
        assert sequence.text_changed == whole.text_changed


def test_random_tokens_have_the_bytes_that_detokenize_tells(served: Served) -> None:
    size = served.stub.GetModel(pb.GetModelRequest()).vocabulary_size
    sequences = [token_ids for token_ids in random_ids(COUNT, size) if token_ids]
    inputs = list(map(ids, sequences))
    for token_ids, given, (tokens, changed) in zip(sequences, inputs, streamed(served, inputs), strict=True):
        told = served.stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids))
        assert [token.id for token in tokens] == token_ids
        assert spelled(tokens) == told.bytes
        assert told.text == told.bytes.decode(errors="replace")
        assert not changed
        assert of_prompt(served, given) == (tokens, False)


def test_random_tokens_drawn_have_the_bytes_and_the_text_that_detokenize_tells(served: Served) -> None:
    for seed in range(0, COUNT, 20):
        request = pb.GenerateRequest(
            prompt=ids([3]),
            max_tokens=20,
            completion_count=20,
            sampling=uniform(seed),
            stopping=pb.Stopping(ignore_eos=True),
        )
        stream = served.generate(request)
        for i in range(20):
            told = served.stub.Detokenize(pb.DetokenizeRequest(token_ids=stream.token_ids(i)))
            assert (spelled(stream.tokens(i)), stream.text(i)) == (told.bytes, told.text)
            assert len(stream.token_ids(i)) == 20
