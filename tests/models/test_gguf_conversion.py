"""Converting GGUF files: the model that comes out is the one that went in, or the file is refused by name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from logprobs_server.models import gguf_file
from logprobs_server.models.convert import convert_gguf
from logprobs_server.models.errors import ModelNotUsableError
from safetensors.numpy import load_file
from tiny_gguf import CONTEXT, EPS, HEAD_DIM, THETA, TOKENS, Tiny, interleaved, matrices_q8_0
from tokenizers import Tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SOME_TEXT = "In 2024 the cost was 1234.50, don't   ask\n\n why"


@contextlib.contextmanager
def no_progress(task: str, total_bytes: int | None) -> Iterator[Any]:
    yield lambda count: None


def convert(tiny: Tiny, folder: Path) -> Path:
    """The folder, filled with the model as converted from a GGUF file."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "out"
    out.mkdir()
    convert_gguf(tiny.write(folder / "tiny.gguf"), out, "tiny", no_progress)
    return out


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(48).reshape(2, 24) * 5 % len(TOKENS)
    output: torch.Tensor = model(input_ids=ids).logits
    return output


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "own head"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_converted_model_gives_the_logits_of_the_original(architecture: str, tied: bool, tmp_path: Path) -> None:
    tiny = Tiny(architecture=architecture, tied=tied)
    folder = convert(tiny, tmp_path)
    assert torch.equal(logits(loaded(folder)), logits(tiny.model()))


def test_logits_notice_when_query_and_key_rows_are_in_the_wrong_order(tmp_path: Path) -> None:
    rows = Tiny().gguf_tensors()["blk.0.attn_q.weight"]
    tiny = Tiny(tensors={"blk.0.attn_q.weight": interleaved(rows)})
    assert not torch.allclose(logits(loaded(convert(tiny, tmp_path))), logits(tiny.model()), atol=0.01)


def test_quantised_tensors_come_out_bitwise_as_gguf_dequantises_them(tmp_path: Path) -> None:
    tiny = Tiny(quantise=matrices_q8_0)
    tensors = load_file(convert(tiny, tmp_path) / "model.safetensors")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(stored)
    assert {tensor.tensor_type.name for tensor in stored.values()} == {"F32", "Q8_0"}
    for name, values in tensors.items():
        source = stored[str(names.get_name(name, try_suffixes=(".weight",)))]
        in_our_order = interleaved(values) if "q_proj" in name or "k_proj" in name else values
        assert in_our_order.tobytes() == gguf.dequantize(source.data, source.tensor_type).tobytes(), name


def test_the_result_does_not_depend_on_how_many_rows_are_dequantised_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Tiny(quantise=matrices_q8_0)
    whole = convert(tiny, tmp_path / "whole") / "model.safetensors"
    monkeypatch.setattr(gguf_file, "_SLICE_VALUES", 200)
    sliced = convert(tiny, tmp_path / "sliced") / "model.safetensors"
    assert sliced.read_bytes() == whole.read_bytes()


def test_positions_stretched_by_frequency_are_those_of_llama3(tmp_path: Path) -> None:
    tiny = Tiny(rope=LLAMA3_ROPE)
    plain = THETA ** -(torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    tiny.tensors["rope_freqs.weight"] = (plain / tiny.model().model.rotary_emb.inv_freq).numpy()
    converted = logits(loaded(convert(tiny, tmp_path)))
    torch.testing.assert_close(converted, logits(tiny.model()), atol=1e-4, rtol=0)
    assert not torch.allclose(converted, logits(Tiny().model()), atol=0.01)


def test_positions_stretched_evenly_are_transformers_linear_ones(tmp_path: Path) -> None:
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    tiny = Tiny(rope={"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}, metadata=scaling)
    assert torch.equal(logits(loaded(convert(tiny, tmp_path))), logits(tiny.model()))


def test_context_length_rope_base_epsilon_and_special_ids_survive(tmp_path: Path) -> None:
    loaded_config = transformers.AutoConfig.from_pretrained(convert(Tiny(), tmp_path))
    assert loaded_config.max_position_embeddings == CONTEXT
    assert loaded_config.rope_parameters["rope_theta"] == THETA
    assert loaded_config.rms_norm_eps == EPS
    assert (loaded_config.bos_token_id, loaded_config.pad_token_id) == (1, 2)


def test_a_turn_end_is_an_end_of_sequence_besides_the_one_that_the_file_names(tmp_path: Path) -> None:
    folder = convert(Tiny(), tmp_path)
    assert config(folder)["eos_token_id"] == [0, 2]
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [0, 2]


@pytest.mark.parametrize(
    ("tiny", "reason"),
    [
        pytest.param(Tiny(metadata={"general.architecture": "mamba"}), "architecture 'mamba'", id="architecture"),
        pytest.param(Tiny(metadata={"tokenizer.ggml.model": "llama"}), "tokenizer model 'llama'", id="tokenizer"),
        pytest.param(Tiny(metadata={"tokenizer.ggml.pre": "dbrx"}), "pre-tokenizer 'dbrx'", id="pre-tokenizer"),
        pytest.param(Tiny(metadata={"tokenizer.ggml.pre": None}), "pre-tokenizer 'default'", id="no pre-tokenizer"),
        pytest.param(Tiny(metadata={"tokenizer.ggml.merges": ["Ġ zz"]}), "merges", id="merge of no token"),
        pytest.param(Tiny(metadata={"tokenizer.ggml.merges": ["Ġ"]}), "merges", id="merge of one"),
        pytest.param(Tiny(metadata={"tokenizer.ggml.eos_token_id": 999}), "no token 999", id="special id"),
        pytest.param(
            Tiny(metadata={"tokenizer.ggml.tokens": TOKENS[:-1], "tokenizer.ggml.token_type": None}),
            "token_embd.weight has the shape",
            id="token count",
        ),
        pytest.param(Tiny(metadata={"tokenizer.ggml.token_type": [1]}), "1 types", id="type count"),
        pytest.param(
            Tiny(metadata={"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}), "spelled the same", id="twin tokens"
        ),
        pytest.param(Tiny(metadata={"llama.block_count": None}), "lack llama.block_count", id="missing key"),
        pytest.param(Tiny(metadata={"llama.block_count": "two"}), "str, not int", id="wrong type"),
        pytest.param(Tiny(metadata={"llama.attention.head_count": 0}), "head_count is 0", id="no heads"),
        pytest.param(Tiny(metadata={"split.count": 3}), "one part of a split model", id="split"),
        pytest.param(Tiny(metadata={"llama.rope.dimension_count": 8}), "only 8", id="partial rotation"),
        pytest.param(Tiny(metadata={"llama.rope.scaling.type": "yarn"}), "'yarn'", id="yarn"),
        pytest.param(
            Tiny(metadata={"llama.attention.head_count": 8}), "blk.0.attn_q.weight has the shape", id="head count"
        ),
        pytest.param(
            Tiny(tensors={"rope_freqs.weight": np.ones(3, np.float32)}), "rope_freqs.weight", id="rope factors"
        ),
        pytest.param(
            Tiny(tensors={"blk.1.ffn_up.weight": None}), "blk.1.ffn_up.weight .* is missing", id="missing tensor"
        ),
        pytest.param(
            Tiny(tensors={"blk.0.attn_q.bias": np.ones(64, np.float32)}), "blk.0.attn_q.bias", id="unknown tensor"
        ),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused_by_name(tiny: Tiny, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotUsableError, match=f"tiny.gguf: .*{reason}"):
        convert(tiny, tmp_path)


def test_a_quantisation_that_cannot_be_dequantised_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelNotUsableError, match=r"token_embd\.weight is stored as I32"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path, "tiny", no_progress)


def test_more_than_fits_on_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ModelNotUsableError, match="1,000 are free"):
        convert(Tiny(), tmp_path)


@pytest.fixture(scope="session")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Tiny().write(tmp_path_factory.mktemp("tiny") / "tiny.gguf").read_bytes()


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 0.999), flips=st.lists(st.tuples(st.integers(0, 11_000), st.integers(0, 255)), max_size=3))
def test_a_damaged_file_is_refused_or_converted_and_never_crashes(
    tiny_bytes: bytes, tmp_path_factory: pytest.TempPathFactory, cut: float, flips: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(tiny_bytes if flips else tiny_bytes[: int(cut * len(tiny_bytes))])
    for position, byte in flips:
        content[position] = byte
    (folder / "tiny.gguf").write_bytes(content)
    expectation = contextlib.suppress(ModelNotUsableError) if flips else pytest.raises(ModelNotUsableError)
    with expectation:
        convert_gguf(folder / "tiny.gguf", folder, "tiny", no_progress)


def tokenizer(tmp_path: Path, **metadata: Any) -> Tokenizer:
    folder = convert(Tiny(metadata={f"tokenizer.ggml.{key}": value for key, value in metadata.items()}), tmp_path)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_control_tokens_are_special_and_user_defined_ones_are_not(tmp_path: Path) -> None:
    encoding = tokenizer(tmp_path).encode("a<|im_end|><think>")
    assert encoding.tokens == ["a", "<|im_end|>", "<think>"]
    assert tokenizer(tmp_path / "again").decode(encoding.ids) == "a<think>"


def test_spelled_special_tokens_can_be_encoded_as_plain_text(tmp_path: Path) -> None:
    plain = tokenizer(tmp_path)
    plain.encode_special_tokens = True
    assert plain.encode("<|im_end|>").tokens == [*"<|im_end|>"]


def test_unused_tokens_have_an_id_but_no_piece(tmp_path: Path) -> None:
    assert tokenizer(tmp_path).id_to_token(TOKENS.index("[PAD4]")) is None


@pytest.mark.parametrize(
    ("pre", "add_bos", "ids"),
    [
        ("smollm", None, []),
        ("smollm", False, []),
        ("smollm", True, [1]),
        ("llama-bpe", None, [1]),
        ("llama-bpe", False, []),
        ("qwen2", None, []),
    ],
)
def test_a_bos_is_added_where_the_file_says_so_or_else_as_llama3_does(
    pre: str, add_bos: bool | None, ids: list[int], tmp_path: Path
) -> None:
    assert tokenizer(tmp_path, pre=pre, add_bos_token=add_bos).encode("").ids == ids


def test_an_eos_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    assert tokenizer(tmp_path, add_eos_token=True).encode("a").tokens == ["a", "<|endoftext|>"]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("smollm", ["In", "Ġ", "2", "0", "2", "4"]),
        ("gpt-2", ["In", "Ġ2024"]),
        ("llama-bpe", ["In", "Ġ", "202", "4"]),
        ("qwen2", ["In", "Ġ", "2", "0", "2", "4"]),
    ],
)
def test_digits_are_cut_as_the_pre_tokenizer_says(pre: str, words: list[str], tmp_path: Path) -> None:
    cut = tokenizer(tmp_path, pre=pre).pre_tokenizer.pre_tokenize_str(SOME_TEXT)
    assert [word for word, _ in cut][: len(words)] == words


@pytest.mark.parametrize(
    ("pre", "reference"), [("gpt-2", transformers.GPT2Tokenizer), ("qwen2", transformers.Qwen2Tokenizer)]
)
def test_words_are_those_of_the_tokenizers_that_transformers_has(pre: str, reference: Any, tmp_path: Path) -> None:
    ours = tokenizer(tmp_path, pre=pre)
    theirs = reference(vocab={"a": 0}, merges=[]).backend_tokenizer
    cuts = [each.pre_tokenizer.pre_tokenize_str(SOME_TEXT) for each in (ours, theirs)]
    assert cuts[0] == cuts[1]


def test_the_chat_template_survives(tmp_path: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(convert(Tiny(), tmp_path))
    rendered = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|im_start|>hi<|im_end|>"
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|im_start|>", "<|endoftext|>", "<|im_end|>")


def test_an_array_longer_than_the_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    content = bytearray(Tiny().write(tmp_path / "tiny.gguf").read_bytes())
    key = b"tokenizer.ggml.token_type"
    length_at = content.index(key) + len(key) + 8  # after the types of value and items
    content[length_at : length_at + 8] = (1 << 20).to_bytes(8, "little")
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(ModelNotUsableError, match="ends within its metadata"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path, "tiny", no_progress)
