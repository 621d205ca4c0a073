"""What beam search should give: transformers' own `generate` with `num_beams`, and whether noise would change it.

Shares no code with the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

__all__ = ["BeamOracle", "Hypothesis"]

_NOISE = 1e-5
_NOISY_RUNS = 3


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A returned sequence, without the prompt, and its score."""

    token_ids: list[int]
    score: float


class _Noise(transformers.LogitsProcessor):  # type: ignore[misc]
    """Moves every logprob by a little, in its own way at every step."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + _NOISE * (2 * torch.rand(scores.shape, generator=self._generator) - 1)


class BeamOracle:
    """A model as transformers alone searches it."""

    def __init__(self, folder: Path) -> None:
        transformers.utils.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def search(self, prompt: Sequence[int], beams: int, eos: Sequence[int], **options: Any) -> list[Hypothesis]:
        """All hypotheses, best first; noise must not change which they are.

        Args:
            eos: end-of-sequence ids, none if empty.
            options: further arguments of `generate`.
        """
        found = self._run([prompt], beams, eos, [], options)
        noisy = self._run([prompt] * _NOISY_RUNS, beams, eos, [_Noise()], options)
        assert [one.token_ids for one in noisy] == [one.token_ids for one in found] * _NOISY_RUNS, "noise changes it"
        return found

    @torch.inference_mode()
    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        beams: int,
        eos: Sequence[int],
        processors: list[Any],
        options: dict[str, Any],
    ) -> list[Hypothesis]:
        self._model.generation_config.eos_token_id = list(eos) or None
        self._model.generation_config.pad_token_id = 0
        inputs = torch.tensor(prompts)
        output = self._model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            num_beams=beams,
            num_return_sequences=beams,
            return_dict_in_generate=True,
            output_scores=True,
            logits_processor=transformers.LogitsProcessorList(processors),
            **options,
        )
        lengths = (output.beam_indices >= 0).sum(dim=-1).tolist()  # padding may be an end-of-sequence token
        rows = output.sequences[:, inputs.shape[1] :].tolist()
        scores = output.sequences_scores.tolist()
        return [Hypothesis(row[:length], score) for row, length, score in zip(rows, lengths, scores, strict=True)]
