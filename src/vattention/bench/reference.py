"""What transformers itself says: its own generate, its own attention and its own cache, on the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vattention.attention.base import NAME
from vattention.engine.loading import LoadedModel


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and the logits that each was chosen from, `[tokens, vocabulary]` in float32, on the CPU."""

    tokens: tuple[int, ...]
    logits: torch.Tensor


class Reference:
    """The model of `loaded`, its attention switched to one of transformers' own while it answers.

    Args:
        attention: "sdpa" or "eager".
    """

    def __init__(self, loaded: LoadedModel, attention: str = "sdpa") -> None:
        self._model: Any = loaded.model
        self._attention = attention
        self._device = loaded.device

    def generate(self, prompt: Sequence[int], tokens: int) -> Answer:
        """Exactly `tokens` tokens, prompt alone in its batch; end-of-sequence is a token like any other."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=[],  # None would mean the model's own
            pad_token_id=0,  # never used: there is no padding in a batch of one
            repetition_penalty=1.0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        ids = torch.tensor([prompt], device=self._device)
        with self._own_attention(), torch.inference_mode():
            out = self._model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return Answer(tuple(out.sequences[0, len(prompt) :].tolist()), torch.cat(out.logits).float().cpu())

    def teacher_forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """The logits that each of `tokens` would be chosen from after those before it, in one pass without a cache.

        `[tokens, vocabulary]` in float32.
        """
        ids = torch.tensor([[*prompt, *tokens[:-1]]], device=self._device)
        with self._own_attention(), torch.inference_mode():
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens)).logits
        return logits[0].float().cpu()

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        self._model.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            self._model.set_attn_implementation(NAME)
