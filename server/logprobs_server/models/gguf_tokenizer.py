"""Tokenizers of GGUF files, built from their metadata so that they give the ids that the model was trained on.

Byte-level BPE only, and only with pre-tokenizers whose rules are stated here exactly; others are refused by name.
Knows nothing of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from logprobs_server.models.gguf_file import GgufFile

__all__ = ["GgufTokenizer"]

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
"""Token types of GGUF that matter here."""

_ENDS = ("<|im_end|>", "<|eot_id|>")
"""Control tokens that end a turn of a conversation, whatever the metadata name as the end of a sequence."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen 2 cut text into words; they differ in how many digits a word has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What `tokenizer.ggml.pre` stands for."""

    pre_tokenizer: pre_tokenizers.PreTokenizer
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False
    adds_bos: bool = False


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_RULES = {
    "smollm": _Rules(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL])
    ),
    "gpt-2": _Rules(pre_tokenizer=_BYTE_LEVEL),
    "llama-bpe": _Rules(pre_tokenizer=_split(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True),
    "qwen2": _Rules(pre_tokenizer=_split(r"\p{N}"), normalizer=normalizers.NFC()),
}


class GgufTokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        ModelNotUsableError: it is of a kind that is not supported, or its metadata contradict each other.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._tokens = file.get("tokenizer.ggml.tokens", list)
        self._types = file.get("tokenizer.ggml.token_type", list, [1] * len(self._tokens))
        if len(self._types) != len(self._tokens):
            raise file.refused(f"{len(self._tokens)} tokens have {len(self._types)} types")
        self._rules = self._find_rules()

    @property
    def vocabulary_size(self) -> int:
        """Tokens, unused ones included."""
        return len(self._tokens)

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a sequence or a turn."""
        named = [self._special_id(kind) for kind in ("eos", "eot", "eom")]
        spelled = [i for i, token in enumerate(self._tokens) if token in _ENDS and self._types[i] == _CONTROL]
        return [*dict.fromkeys(i for i in [*named, *spelled] if i is not None)]

    def build(self) -> Tokenizer:
        """The tokenizer itself."""
        rules = self._rules
        tokenizer = Tokenizer(self._bpe())
        if rules.normalizer is not None:
            tokenizer.normalizer = rules.normalizer
        tokenizer.pre_tokenizer = rules.pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens([*self._added()])
        template = self._template()
        if template is not None:
            tokenizer.post_processor = template
        return tokenizer

    def config(self, context_length: int) -> dict[str, object]:
        """What tokenizer_config.json says of it."""
        config: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context_length,
            "clean_up_tokenization_spaces": False,
        }
        for name, kind in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
            token_id = self._special_id(kind)
            if token_id is not None:
                config[f"{name}_token"] = self._tokens[token_id]
        if "tokenizer.chat_template" in self._file:
            config["chat_template"] = self._file.get("tokenizer.chat_template", str)
        return config

    def _find_rules(self) -> _Rules:
        model = self._file.get("tokenizer.ggml.model", str)
        if model != "gpt2":
            raise self._file.refused(f"tokenizer model {model!r} is not supported, only byte-level BPE ('gpt2')")
        name = self._file.get("tokenizer.ggml.pre", str, "default")
        if name not in _RULES:
            raise self._file.refused(f"pre-tokenizer {name!r} is not supported, only {', '.join(_RULES)}")
        return _RULES[name]

    def _bpe(self) -> models.BPE:
        vocabulary = {t: i for i, t in enumerate(self._tokens) if self._types[i] != _UNUSED}
        if len(vocabulary) != len(self._tokens) - self._types.count(_UNUSED):
            raise self._file.refused("two tokens are spelled the same")
        merges = [tuple(merge.split(" ")) for merge in self._file.get("tokenizer.ggml.merges", list)]
        try:
            return models.BPE(vocab=vocabulary, merges=merges, ignore_merges=self._rules.ignore_merges)
        except Exception as error:  # the tokenizers package raises bare exceptions
            raise self._file.refused(f"the tokenizer's merges are unusable: {error}") from error

    def _added(self) -> list[AddedToken]:
        """Tokens that are found in text before it is cut into words."""
        special = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
        return [
            AddedToken(token, special=special[kind], normalized=False)
            for token, kind in zip(self._tokens, self._types, strict=True)
            if kind in special
        ]

    def _template(self) -> processors.TemplateProcessing | None:
        """Adds the special tokens that the model wants around a text."""
        wanted = {"bos": self._rules.adds_bos, "eos": False}
        ids = {
            kind: self._special_id(kind)
            for kind, default in wanted.items()
            if self._file.get(f"tokenizer.ggml.add_{kind}_token", bool, default)
        }
        special = {kind: (self._tokens[i], i) for kind, i in ids.items() if i is not None}
        if not special:
            return None
        bos, eos = ([special[kind][0]] if kind in special else [] for kind in ("bos", "eos"))
        return processors.TemplateProcessing(
            single=[*bos, "$A", *eos], pair=[*bos, "$A", "$B:1", *eos], special_tokens=[*special.values()]
        )

    def _special_id(self, kind: str) -> int | None:
        token_id = self._file.id_of(f"tokenizer.ggml.{kind}_token_id")
        if token_id is not None and not 0 <= token_id < len(self._tokens):
            raise self._file.refused(f"tokenizer.ggml.{kind}_token_id: there is no token {token_id}")
        return token_id
