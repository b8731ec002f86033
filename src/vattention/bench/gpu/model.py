"""A model of a known shape with random weights, made on the device: what it says is no part of what is measured."""

from __future__ import annotations

from typing import Any

import torch

from vattention.attention.base import NAME, register
from vattention.engine.judge import judge
from vattention.engine.loading import LoadedModel

SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3-8B": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0,
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=512,
    ),
}  # fmt: skip
"""As configurations of transformers' Llama have them."""


def configuration(shape: str) -> Any:
    """The configuration of one of `SHAPES`, with nothing tied and no token that ends a text."""
    from transformers import LlamaConfig

    numbers = dict(SHAPES[shape])
    theta = numbers.pop("rope_theta", 10000.0)
    rope = {"rope_type": "default", "rope_theta": theta}
    return LlamaConfig(
        **numbers,
        rope_parameters=rope,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def random_model(shape: str, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> LoadedModel:
    """One of `SHAPES`, ready for `LLM`; its weights are made on the device, none of them on the host."""
    from transformers import LlamaForCausalLM

    register()
    config = configuration(shape)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    network.set_attn_implementation(NAME)
    network.eval().requires_grad_(False)
    size = sum(weight.nbytes for weight in network.parameters())
    return LoadedModel(f"{shape}, random weights", network, None, judge(config), network.dtype, frozenset(), size)
