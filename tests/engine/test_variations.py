"""Other shapes of the same architectures, through the public names: a saved directory, `LLM`, its answers.

Small models of one shape prove that shape. Here are one KV head, eight query heads to a KV head, heads whose width is
not hidden / heads, widths that are no power of two, windows of one token, two, and more than the context, tied
embeddings and biases; under preemption, in chunks of 1, 3 and 7.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.models import COMMON, OPTIONS, SIZES, TOLERANCE, prompts_of, teacher_forced, tiny_config, tiny_model
from vattention import LLM, SamplingParams
from vattention.engine.architectures import ACCEPTED, WINDOW_IN_MASK
from vattention.engine.judge import judge

PAGE, TOKENS, LONGEST = 4096, 40, 80
SLICED: dict[str, Any] = {"layers_per_stream": None, "kv_together": True}
HIDDEN = 48
"""Of all: wider models would need smaller weights, or float32 rounding alone exceeds the tolerance."""


@dataclass(frozen=True)
class Variation:
    """A shape, and how to run it. `chunk` is the batch of tokens of a pass, and so bounds the requests at once."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int
    chunk: int
    tied: bool = False
    bias: bool = False
    vocab_size: int = 131


VARIATIONS = {
    "multi-query, window of 1": Variation(4, 1, 6, 1, chunk=3),
    "8 to 1, biases": Variation(8, 1, 10, 2, chunk=7, bias=True),
    "wide heads, tied": Variation(4, 2, 20, 500, chunk=3, tied=True, vocab_size=97),
    "token by token": Variation(6, 6, 8, 3, chunk=1, bias=True),
}

# What the shapes of these types are tied to.
_HEADS_BY_WIDTH = ("biogpt", "ctrl", "gpt2", "gpt_bigcode", "gpt_neox", "modernbert-decoder", "opt", "persimmon", "phi")
_OWN_SHAPE = {kind for kind, options in OPTIONS.items() if "kv_lora_rank" in options} | {"bitnet", "helium", "olmoe"}


def changes_for(model_type: str, variation: Variation) -> dict[str, Any]:
    config = tiny_config(model_type)
    changes: dict[str, Any] = {"vocab_size": variation.vocab_size, "tie_word_embeddings": variation.tied}
    if model_type in _HEADS_BY_WIDTH:
        heads = 6 if variation.heads % 6 == 0 else 4
        changes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": HIDDEN // heads}
    elif model_type not in _OWN_SHAPE:
        kv_heads = 1 if model_type == "mimo_v2_flash" else variation.kv_heads  # sliding layers have twice as many
        changes |= {
            "num_attention_heads": variation.heads,
            "num_key_value_heads": kv_heads,
            "head_dim": variation.head_dim,
        }
    if getattr(config, "sliding_window", None) is not None and model_type not in WINDOW_IN_MASK:
        changes["sliding_window"] = variation.window
    if hasattr(config, "vocab_size_per_layer_input"):
        changes["vocab_size_per_layer_input"] = variation.vocab_size
    if variation.bias:
        changes |= {name: True for name in ("attention_bias", "bias", "qkv_bias", "use_bias") if hasattr(config, name)}
    return changes


def cases() -> list[Any]:
    """Every variation of every type; one a type, in turn, unless everything runs at full size."""
    found, names = [], list(VARIATIONS)
    for model_type in sorted(ACCEPTED):
        kept = names[COMMON.index(model_type) % len(names)] if model_type in COMMON else None
        for name in names:
            marks = () if name == kept else pytest.mark.slow
            found.append(pytest.param(model_type, name, id=f"{model_type}-{name}", marks=marks))
    return found


@pytest.mark.parametrize(("model_type", "name"), cases())
def test_a_saved_model_of_another_shape(model_type: str, name: str, tmp_path: Path) -> None:
    variation = VARIATIONS[name]
    model = tiny_model(model_type, seed=len(name), **changes_for(model_type, variation))
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if parameter.endswith("bias"):  # made zero, and so would change nothing
                weight.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert reference.config.hidden_size == HIDDEN == SIZES["hidden_size"]

    seqs = min(3, variation.chunk)
    # One stream a slot, or a page would hold so many tokens that requests never grow out of it.
    layout = judge(reference.config).layout(torch.float32, seqs, LONGEST, **SLICED)
    room = -(-4 * LONGEST * layout.streams[0].token_bytes // (3 * PAGE)) * PAGE  # three requests begin, not all end
    with LLM(
        tmp_path,
        kv_cache_memory=room,
        page_size=PAGE,
        **SLICED,
        max_model_len=LONGEST,
        max_num_seqs=seqs,
        max_num_batched_tokens=variation.chunk,
        poison=True,
    ) as llm:
        prompts = prompts_of(20, 1, 25, 30, vocab_size=variation.vocab_size)
        outputs = llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=2),
            use_tqdm=False,
        )
        assert (llm.engine.scheduler.preemptions > 0) == (seqs > 1)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = torch.tensor(output.outputs[0].token_ids)
        assert len(tokens) == TOKENS
        logits = teacher_forced(reference, prompt, tokens.tolist())
        spread = float(logits.std())
        lead = logits.max(-1).values - logits.gather(1, tokens[:, None])[:, 0]
        assert float(lead.max()) < TOLERANCE * spread
        for row, ours in zip(logits.log_softmax(-1), output.outputs[0].logprobs or (), strict=True):
            assert all(abs(float(row[token]) - said.logprob) < TOLERANCE * spread for token, said in ours.items())
