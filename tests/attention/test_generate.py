"""`attn_implementation="vattention"` in transformers' own generate: what eager says, for any cache and mask."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import vattention.attention
from support.models import COMMON, OPTIONS, TOLERANCE, loaded, one_pass, prompts_of, relative_error, shared, tiny_model
from vattention.attention import cpu_decode, generate
from vattention.engine.architectures import ACCEPTED
from vattention.errors import UnsupportedModel

LENGTHS = (45, 20, 31)
SPARSE = {**OPTIONS["deepseek_v3"], "index_topk": 10, "index_n_heads": 2, "index_head_dim": 8}


@pytest.fixture(autouse=True)
def _registered() -> None:
    vattention.attention.register()


def left_padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, `[requests, longest]` each."""
    longest = max(lengths)
    ids, mask = torch.zeros(2, len(lengths), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts_of(*lengths, seed=3)):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


@torch.inference_mode()
def logits(model: Any, name: str, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of every token that is not padding: a prompt, decodes, and chunks over what is cached, of few and many rows."""
    model.set_attn_implementation(name)
    cache, parts, start = DynamicCache(config=model.config), [], 0
    for rows in (ids.shape[1] - 18, 1, 4, 12, 1):
        part = slice(start, start + rows)
        out = model(
            input_ids=ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache, logits_to_keep=0
        )
        parts.append(out.logits)
        start = part.stop
    return torch.cat(parts, 1)[mask.bool()].float()


def compare(model: Any, **batch: torch.Tensor) -> None:
    reference = logits(model, "eager", **batch)
    assert relative_error(logits(model, "vattention", **batch), reference) < TOLERANCE


@pytest.mark.parametrize("model_type", sorted(ACCEPTED))
def test_logits_of_a_left_padded_batch(model_type: str) -> None:
    ids, mask = left_padded(*LENGTHS)
    compare(shared(model_type), ids=ids, mask=mask)


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_keys_picked_by_a_sparse_indexer(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    ids, mask = left_padded(*LENGTHS)
    model = tiny_model(model_type, **SPARSE)
    compare(model, ids=ids, mask=mask)
    dense = tiny_model(model_type, **{**SPARSE, "index_topk": 1000})  # the control
    assert relative_error(logits(dense, "vattention", ids, mask), logits(model, "vattention", ids, mask)) > 0.01


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static-cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 0},
    "chunked-prefill": {"prefill_chunk_size": 7},
    "no-cache": {"use_cache": False},
}


def generated(model: Any, name: str, batch: tuple[torch.Tensor, torch.Tensor], **way: Any) -> torch.Tensor:
    model.set_attn_implementation(name)
    torch.manual_seed(5)
    options = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False, **way}
    return model.generate(batch[0], attention_mask=batch[1], **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "mistral"])
def test_ways_to_generate(model_type: str, way: str) -> None:
    model, batch = shared(model_type), left_padded(*LENGTHS)
    expected = generated(model, "eager", batch, **WAYS[way])
    assert torch.equal(generated(model, "vattention", batch, **WAYS[way]), expected)
    assert len(expected.unique()) > 10  # the control: the model says something


@pytest.mark.parametrize("model_type", COMMON)
def test_greedy_tokens(model_type: str) -> None:
    model, batch = shared(model_type), left_padded(*LENGTHS)
    assert torch.equal(generated(model, "vattention", batch), generated(model, "eager", batch))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma4_text"])
def test_candidates_are_checked_several_at_once(model_type: str) -> None:
    """Assisted decoding: new tokens over cached ones, in one pass, some of them rolled back."""
    model = shared(model_type)
    prompt = torch.tensor([list(prompts_of(12)[0]) * 3])
    batch = (prompt, torch.ones_like(prompt))
    plain = generated(model, "eager", batch)
    assert torch.equal(generated(model, "vattention", batch, prompt_lookup_num_tokens=5), plain)
    helper = tiny_model(model_type, seed=1)
    helper.generation_config.pad_token_id = 0
    assert torch.equal(generated(model, "vattention", batch, assistant_model=helper), plain)


def test_layers_that_share_k_and_v_drop_rows_of_the_prompt() -> None:
    """Gemma 4 computes only the last rows there, and says so to sdpa alone."""
    model = tiny_model("gemma4_text", num_kv_shared_layers=1)
    prompt = torch.tensor([prompts_of(30)[0]])
    rows = []
    for name in ("eager", "vattention"):
        model.set_attn_implementation(name)
        with torch.inference_mode():
            rows.append(model(input_ids=prompt, logits_to_keep=4).logits)
    assert relative_error(rows[1], rows[0]) < TOLERANCE


SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4},
    "bart": {
        **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
        "forced_eos_token_id": None,
    },
}


@pytest.mark.parametrize("way", ["greedy", "beams"])
@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_encoders_and_cross_attention(model_type: str, way: str) -> None:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
    config = CONFIG_MAPPING[model_type](vocab_size=211, d_model=32, **SEQ2SEQ[model_type], **tokens)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "shared" not in name:
                weight.normal_(std=0.4)
    model.generation_config.eos_token_id = None
    ids, mask = left_padded(*LENGTHS)
    batch = ids.flip(1), mask.flip(1)  # encoders are padded on the right
    expected = generated(model, "eager", batch, **WAYS[way])
    assert torch.equal(generated(model, "vattention", batch, **WAYS[way]), expected)
    with torch.inference_mode():
        for name in ("eager", "vattention"):
            model.set_attn_implementation(name)
            out = model(input_ids=batch[0], attention_mask=batch[1], decoder_input_ids=ids[:, -9:]).logits
            expected = out if name == "eager" else expected
    assert relative_error(out, expected) < TOLERANCE


def test_a_model_that_computes_attention_itself_is_refused() -> None:
    config = CONFIG_MAPPING["codegen"](
        vocab_size=211, n_layer=1, n_embd=64, n_head=4, rotary_dim=8, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="vattention")
    with pytest.raises(UnsupportedModel, match="modeling_codegen computes attention itself"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64))


def test_the_engine_makes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches are flat: a mask would be rows x rows."""
    import transformers.masking_utils as made

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask was made")

    model = loaded(tiny_model("mistral")).model
    monkeypatch.setitem(made.AttentionMaskInterface._global_mapping, "sdpa", never)
    monkeypatch.setattr(made, "sdpa_mask", never)
    assert one_pass(model, prompts_of(20)[0]).shape == (20, 211)


# The function itself, against its definition.

BATCH, Q_HEADS, KV_HEADS, TOKENS, DIM = 3, 6, 2, 40, 16


def module(causal: bool = True) -> nn.Module:
    attention = nn.Module()
    attention.is_causal = causal  # type: ignore[assignment]
    attention.num_key_value_groups = Q_HEADS // KV_HEADS  # type: ignore[assignment]
    return attention


def tensors(rows: int, value_dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, and K and V as views with strides of their own: tokens before heads, wider heads, slots further apart."""
    torch.manual_seed(2)
    query = torch.randn(BATCH, rows, Q_HEADS, DIM).transpose(1, 2) * 2
    key = torch.randn(BATCH, TOKENS + 9, KV_HEADS, DIM + 5)[:, :TOKENS, :, :DIM].transpose(1, 2)
    value = torch.randn(BATCH, KV_HEADS + 1, TOKENS, value_dim)[:, :KV_HEADS]
    return query, key, value


def by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    look: torch.Tensor,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """In float64; `look` is broadcast to `[batch, q_heads, rows, tokens]`."""
    key, value = (x.double().repeat_interleave(Q_HEADS // KV_HEADS, 1) for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) * 0.3
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~look, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], 3)
    weights = scores.softmax(3).nan_to_num()[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


def masks(rows: int) -> dict[str, torch.Tensor]:
    causal = torch.ones(rows, TOKENS, dtype=torch.bool).tril(TOKENS - rows)
    padded = (torch.arange(TOKENS) >= torch.tensor([0, 7, 19])[:, None])[:, None, None]
    torch.manual_seed(7)
    by_head = torch.rand(BATCH, Q_HEADS, rows, TOKENS) < 0.5
    by_head[..., 0] = True
    return {
        "causal": causal[None, None],
        "left-padded": padded & causal,
        "one-for-all-rows": padded,
        "by-head": by_head,
        "nothing-to-see": (padded & causal).index_fill(0, torch.tensor(1), False),
    }


@pytest.mark.parametrize("features", ["plain", "softcap", "sinks", "narrow-value"])
@pytest.mark.parametrize("kind", masks(1))
@pytest.mark.parametrize("rows", [1, "1, without a compiler", 3, 30])
def test_values(rows: int | str, kind: str, features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_ROWS", 8)
    if isinstance(rows, str):
        rows = 1
        monkeypatch.setattr(cpu_decode, "can", lambda query, key, value: False)
    query, key, value = tensors(rows, 7 if features == "narrow-value" else DIM)
    look = masks(rows)[kind]
    softcap = 0.9 if features == "softcap" else None
    sinks = torch.linspace(-2, 4, Q_HEADS) if features == "sinks" else None
    expected = by_hand(query, key, value, look, softcap, sinks)
    added = torch.zeros(look.shape).masked_fill(~look, float("-inf"))
    for mask in (look, added):
        out, weights = generate.attention_forward(
            module(), query, key, value, mask, scaling=0.3, softcap=softcap, s_aux=sinks
        )
        assert weights is None
        assert out.is_contiguous()
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("softcap", [None, 0.9])
def test_without_a_mask(softcap: float | None) -> None:
    """One row sees everything; several see up to themselves, aligned upper left; all of it if nothing is causal."""
    all_ = torch.ones(1, 1, 1, TOKENS, dtype=torch.bool)
    for rows, causal in ((1, True), (1, False), (5, False), (TOKENS, False)):
        query, key, value = tensors(rows)
        out, _ = generate.attention_forward(module(causal), query, key, value, None, scaling=0.3, softcap=softcap)
        torch.testing.assert_close(out.double(), by_hand(query, key, value, all_, softcap), atol=1e-5, rtol=0)
    for rows in (5, TOKENS):
        query, key, value = tensors(rows)
        look = torch.ones(rows, TOKENS, dtype=torch.bool).tril()
        expected = by_hand(query, key, value, look, softcap)
        key[:, :, rows:], value[:, :, rows:] = torch.nan, torch.nan  # what a static cache has not written yet
        out, _ = generate.attention_forward(
            module(False), query, key, value, None, scaling=0.3, softcap=softcap, is_causal=True
        )
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("features", [{}, {"softcap": 0.9}, {"s_aux": torch.zeros(Q_HEADS)}])
@pytest.mark.parametrize("rows", [1, 4, 12])
def test_k_and_v_are_not_copied(rows: int, features: dict[str, Any]) -> None:
    query = torch.randn(2, Q_HEADS, rows, 512)
    key, value = (torch.randn(2, 3000, KV_HEADS, 512).transpose(1, 2) for _ in range(2))
    mask = torch.ones(2, 1, rows, 3000, dtype=torch.bool)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        generate.attention_forward(module(), query, key, value, mask, **features)
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert 0 < largest < key.nbytes / 10


@pytest.mark.parametrize("features", [{}, {"softcap": 0.9}, {"s_aux": torch.linspace(-1, 1, Q_HEADS)}])
@pytest.mark.parametrize("rows", [1, 3, 30])
def test_gradients(rows: int, features: dict[str, Any]) -> None:
    look = masks(rows)["left-padded"]
    grads = []
    for exact in (False, True):
        leaves = [x.clone().requires_grad_() for x in tensors(rows)]
        if exact:
            out = by_hand(*leaves, look, features.get("softcap"), features.get("s_aux"))
        else:
            out, _ = generate.attention_forward(module(), *leaves, look, scaling=0.3, **features)
        out.double().square().sum().backward()
        grads.append(leaves)
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-3, rtol=1e-4)


def test_dropout_goes_to_sdpa_and_is_refused_where_sdpa_cannot() -> None:
    query, key, value = tensors(5)
    mask = masks(5)["causal"]
    out, _ = generate.attention_forward(module(), query, key, value, mask, dropout=1.0 - 1e-7)
    assert not out.any()
    with pytest.raises(UnsupportedModel, match="dropout"):
        generate.attention_forward(module(), query, key, value, mask, dropout=0.1, softcap=2.0)
    with pytest.raises(UnsupportedModel, match="position bias"):
        generate.attention_forward(
            module(), query, key, value, mask, s_aux=torch.zeros(Q_HEADS), position_bias=torch.zeros(1, 1, 5, TOKENS)
        )
