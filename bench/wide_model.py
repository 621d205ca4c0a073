"""A tiny random model with BLOOM's vocabulary: what scoring needs beside weights is all that its memory shows."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import transformers

__all__ = ["VOCABULARY_SIZE", "save"]

VOCABULARY_SIZE = 250_880
_CONTEXT_LENGTH = 2048


def save(tokenizer: Path, folder: Path) -> None:
    """Writes the model, with a tokenizer that knows a part of its vocabulary."""
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=64, n_layer=2, n_head=2, seq_length=_CONTEXT_LENGTH, eos_token_id=0
    )
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    shutil.copy(tokenizer, folder / "tokenizer.json")


if __name__ == "__main__":
    save(Path(sys.argv[1]), Path(sys.argv[2]))
