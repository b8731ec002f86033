"""Small random models that see, and what transformers itself makes of them.

A random model is blind unless made to see: with the usual small weights attention hardly matters, and tied embeddings
repeat the input whatever attention says. So embeddings are untied, and q and k are large.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vattention.attention.base import NAME, register
from vattention.cache import KVCache, KVLayout
from vattention.engine.engine import Engine
from vattention.engine.loading import LoadedModel, judge, load_model
from vattention.engine.request import Request
from vattention.engine.runner import Runner
from vattention.engine.sampling_params import SamplingParams

# Waking a second thread costs more than such small work, and ten times more than that on a busy machine.
torch.set_num_threads(1)

TOLERANCE = 1e-4
"""Of float32 logits, as a share of their spread; a wrong scale or mask moves them by more than their spread."""

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_model(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of this type, in eval mode, with an attention of transformers' own."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    torch.manual_seed(seed)
    # Eager, because sdpa refuses soft caps and sinks.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj.w", "k_proj.w", "qkv_proj.w", "query_key_value.w")):
                weight.mul_(2)
            elif any(part in name for part in ("q_norm", "k_norm", "query_layernorm", "key_layernorm")):
                weight.mul_(2)  # normalised q and k forget the size of the weights before them
    return model


def prompts_of(*lengths: int, seed: int = 1, vocab_size: int = SIZES["vocab_size"]) -> list[tuple[int, ...]]:
    """Random prompts of these many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(vocab_size, (n,), generator=generator).tolist()) for n in lengths]


def greedy(model: Any, prompt: Sequence[int], tokens: int) -> tuple[int, ...]:
    """What transformers' own generate says, with its own cache, alone."""
    ids = torch.tensor([prompt])
    # Without the mask, generate would guess that tokens equal to the padding token are padding.
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0
    )
    return tuple(out[0, len(prompt) :].tolist())


@torch.inference_mode()
def teacher_forced(model: Any, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    """The logits from which each token of `output` is chosen, `[output, vocabulary]`, by one pass without any cache."""
    ids = torch.tensor([[*prompt, *output[:-1]]])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()


@dataclass
class Recorder:
    """Stands between an engine and its runner, and keeps the logits of every token by request."""

    runner: Any
    logits: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    passes: list[list[tuple[str, int, int]]] = field(default_factory=list)

    def forward(self, chunks: Sequence[Any]) -> torch.Tensor:
        logits = self.runner.forward(chunks)
        self.passes.append([(chunk.request.request_id, chunk.start, chunk.end) for chunk in chunks])
        places = [(chunk, position) for chunk in chunks for position in chunk.wanted]
        for (chunk, position), row in zip(places, logits, strict=True):
            if chunk.samples and position == chunk.end - 1:
                self.logits.setdefault(chunk.request.request_id, {})[chunk.end] = row.float().clone()
        return logits

    def of(self, request_id: str) -> torch.Tensor:
        """`[output, vocabulary]`, in order of position."""
        rows = self.logits[request_id]
        return torch.stack([rows[position] for position in sorted(rows)])


@functools.cache
def demo_model() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32, read once a session."""
    return load_model(None, dtype="float32")


def loaded(model: Any, tokenizer: Any = None) -> LoadedModel:
    """A `tiny_model` as `load_model` would hand it over."""
    register()
    model.set_attn_implementation(NAME)
    size = sum(weight.nbytes for weight in model.parameters())
    return LoadedModel("tiny", model, tokenizer, judge(model.config), model.dtype, frozenset(), size)


@contextmanager
def as_transformers(model: Any) -> Iterator[Any]:
    """The same model computing attention the way transformers does, without this package."""
    model.set_attn_implementation("sdpa")
    try:
        yield model
    finally:
        model.set_attn_implementation(NAME)


def engine_for(model: LoadedModel, *, max_num_seqs: int = 4, max_model_len: int = 256, **options: Any) -> Engine:
    """An engine with a `Recorder` in it; options are those of KVLayout, KVCache and Engine."""
    shape = model.geometry
    ours = {name: options.pop(name) for name in ("head_major", "layers_per_stream", "kv_together") if name in options}
    theirs = {"max_num_batched_tokens": options.pop("max_num_batched_tokens", 64)}
    theirs |= {name: options.pop(name) for name in ("seed", "eos_token_ids", "tokenizer") if name in options}
    layout = KVLayout(
        shape.num_layers, shape.num_kv_heads, shape.head_dim, model.dtype, max_num_seqs, max_model_len, **ours
    )
    cache = KVCache(layout, **{"memory": "256MiB", **options})
    return Engine(
        Recorder(Runner(model.model, cache)),  # type: ignore[arg-type]
        cache,
        vocab_size=shape.vocab_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        **theirs,
    )


def run(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Request]:
    """Add all, step until nobody is left."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    requests = [engine.add_request(prompt, wanted) for prompt, wanted in zip(prompts, each, strict=True)]
    while engine.unfinished:
        engine.step()
    return requests


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits, as a share of their spread."""
    return float((got - expected).abs().max() / expected.std())
