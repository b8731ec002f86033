"""`VirtualCache` under `generate()`: the same tokens as with `DynamicCache`, whatever the model and the decoding."""

from __future__ import annotations

import copy
import functools
import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, LogitsProcessorList
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from support.models import demo_model, tiny_model
from vattention import ConfigError, InvalidRequest, OutOfPages, VirtualCache
from vattention.attention import register
from vattention.integrations.virtual_layer import VirtualLayer

_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {"mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {},
    "bloom": {},
    "olmo2": {},
    "deepseek_v3": {},  # K and V of different width
    "mimo_v2_flash": {},  # and layers of different shapes
    "mistral": {},  # sliding windows in every layer
    "gemma2": {},  # in some
    "gemma3_text": {},
    "gpt_oss": {},
    "cohere2": {},
    "gemma4_text": {},
    "llama4_text": {"attention_chunk_size": 16, "intermediate_size_mlp": 32},  # chunks
    "qwen3_next": _LINEAR,  # recurrent
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 32, **_MAMBA},
    "falcon_h1": {"mamba_d_ssm": 32, **_MAMBA, "mamba_n_heads": 4},  # attention and recurrence in one layer
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "mamba": {"state_size": 8},  # no attention at all
}
"""With what makes their small models; the defaults are those of `tiny_model`."""

RECURRENT = {"qwen3_next", "granitemoehybrid", "falcon_h1", "jamba", "mamba"}
"""transformers cannot roll these back, whatever the cache."""

PAD = 0


@functools.cache
def model_of(model_type: str) -> Any:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    return tiny_model(model_type, **MODELS[model_type])


@functools.cache
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 33, 26 and 4 tokens, padded on the left."""
    ids = torch.randint(3, 200, (3, 33), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :29] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def generate(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    name = "cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values"
    torch.manual_seed(7)  # for sampling
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": PAD, "eos_token_id": None, **options}
    return model.generate(ids, attention_mask=mask, **{name: cache}, **options)


def compare(model: Any, ids: torch.Tensor, mask: torch.Tensor, given: bool = True, **options: Any) -> None:
    """The same tokens from both caches; every address that is read without a page behind it faults."""
    expected = generate(model, DynamicCache(config=model.config), ids, mask, **options)
    with VirtualCache(model.config, attention_mask=mask if given else None, page_size=4096, guard=True) as cache:
        got = generate(model, cache, ids, mask, **options)
    assert torch.equal(got, expected)


DECODING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 50},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 8},
}


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("decoding", ["greedy", "beams"])
def test_every_architecture(model_type, decoding):
    ids, mask = prompts()
    compare(model_of(model_type), ids, mask, **DECODING[decoding])


@pytest.mark.parametrize("given", [True, False], ids=["mask given", "no mask"])
@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_every_way_to_decode(model_type, decoding, given):
    ids, mask = prompts()
    compare(model_of(model_type), ids, mask, given, **DECODING[decoding])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "deepseek_v3", "lfm2"])
@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_decoding(model_type, how):
    """Rejected tokens are cropped."""
    model = model_of(model_type)
    ids, _ = prompts()
    ids = torch.cat([ids[:1], ids[:1, :20]], 1)  # it repeats itself, so that something can be looked up
    if how == "assistant":
        assistant = tiny_model(model_type, **MODELS[model_type], seed=1)
        with torch.no_grad():  # one that is right now and then
            for mine, theirs in zip(assistant.parameters(), model.parameters(), strict=True):
                mine.copy_(0.9 * theirs + 0.1 * mine)
        options = {"assistant_model": assistant}
    else:
        options = {"prompt_lookup_num_tokens": 4}
    compare(model, ids, torch.ones_like(ids), **options)


@pytest.mark.parametrize("model_type", MODELS)
def test_turns_of_a_conversation(model_type):
    """Each turn goes on with the cache of the turn before."""
    model = model_of(model_type)
    ids, mask = prompts()
    answers = []
    with VirtualCache(model.config, attention_mask=mask, guard=True, page_size=4096) as cache:
        for kept in (DynamicCache(config=model.config), cache):
            said, seen = ids, mask
            for turn in range(3):
                said = generate(model, kept, said, seen, max_new_tokens=6)
                more = ids[:, -4 - turn :]
                said = torch.cat([said, more], 1)
                seen = torch.cat([mask, torch.ones(3, said.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
            answers.append(said)
        assert torch.equal(*answers)


@pytest.mark.parametrize(
    "decoding", [pytest.param(name, marks=() if name in ("greedy", "beams") else pytest.mark.slow) for name in DECODING]
)
def test_the_demo_model(decoding):
    model = demo_model().model
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        ids = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        compare(model, ids, mask, max_new_tokens=5, **DECODING[decoding])
        if decoding == "chunked prefill":
            repeated = torch.cat([ids[:1], ids[:1]], 1)
            compare(model, repeated, torch.ones_like(repeated), max_new_tokens=12, prompt_lookup_num_tokens=4)
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("head_major", [True, False])
@pytest.mark.parametrize("page_size", [4096, "64KiB"])
def test_layouts_and_pages_change_nothing(head_major, page_size):
    model = model_of("llama")
    ids, mask = prompts()
    expected = generate(model, DynamicCache(config=model.config), ids, mask, num_beams=3)
    with VirtualCache(model.config, head_major=head_major, page_size=page_size) as cache:
        assert torch.equal(generate(model, cache, ids, mask, num_beams=3), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "vattention"])
@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "gpt2"])
def test_other_attention_functions(model_type, implementation):
    """They get strided views, and zeros where padding is."""
    register()
    model, (ids, mask) = model_of(model_type), prompts()
    model.set_attn_implementation(implementation)
    try:
        compare(model, ids, mask)
        compare(model, ids, mask, num_beams=3)
    finally:
        model.set_attn_implementation("eager")


def test_early_exit():
    """Some layers go on where others stop."""
    ids = prompts()[0][:1]
    compare(model_of("llama"), ids, torch.ones_like(ids), assistant_early_exit=2)


def test_what_beams_hold_and_copy():
    """8 beams of a 2,000-token prompt, while generate() searches: one prompt, and what each has written since."""
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 4096}
    model = tiny_model("llama", **sizes, num_attention_heads=2)
    model.set_attn_implementation("sdpa")
    ids = torch.randint(3, 200, (1, 2000), generator=torch.Generator().manual_seed(0))
    streams, page = 2 * 2, 4096
    seen: list[Any] = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(cache.stats())
        return scores

    with VirtualCache(model.config, page_size=page) as cache:
        generate(
            model, cache, ids, torch.ones_like(ids), num_beams=8, max_new_tokens=12,
            logits_processor=LogitsProcessorList([look]),
        )  # fmt: skip
    one = -(-2000 * 256 // page) * page * streams
    for step, stats in enumerate(seen, start=1):  # the first sees eight equal prompts
        assert stats.created <= 1.2 * one, f"step {step}"
        assert stats.copied <= step * 8 * streams * (page - 1)
    assert seen[-1].copied > seen[1].copied


def states(rows: list[int], tokens: int, seed: int = 0, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[batch, 2, tokens, width]`; rows of the same number are the same."""
    made = torch.randn(2, max(rows) + 1, 2, tokens, width, generator=torch.Generator().manual_seed(seed))
    return made[0, rows], made[1, rows]


@pytest.mark.parametrize("given", [False, True])
def test_rows_of_the_same_prompt_share_it_from_the_start(given: bool):
    rows, tokens = [0, 0, 0, 1, 1], 600
    config = tiny_model("llama", num_hidden_layers=1, num_key_value_heads=2, head_dim=16).config
    mask = torch.ones(5, tokens)
    mask[3:, :100] = 0
    reference = DynamicCache(config=config)
    with VirtualCache(config, page_size=4096, attention_mask=mask if given else None, guard=True) as cache:
        for part in range(3):  # a prompt in chunks
            new = states(rows, tokens, seed=part)
            both = cache.update(*new, 0), reference.update(*new, 0)
            for ours, theirs in zip(*both, strict=True):
                assert torch.equal(ours[:3], theirs[:3])
                assert torch.equal(ours[3:, :, 100 * given :], theirs[3:, :, 100 * given :])
            assert cache.stats().created <= 0.55 * 5 * 3600 * 128 * (part + 1) * tokens / 1800
        shared = cache.stats().created
        one = states([0, 1, 2, 3, 4], 1)  # each goes its own way
        cache.update(*one, 0)
        reference.update(*one, 0)
        cache.update(*states(rows, 200, seed=9), 0)  # equal again, but not what is before it
        theirs = reference.update(*states(rows, 200, seed=9), 0)
        assert cache.stats().created > shared
        assert torch.equal(cache.layers[0].keys[:3], theirs[0][:3])
        assert torch.equal(cache.layers[0].values[:3], theirs[1][:3])


def test_zeros_of_another_sign_are_not_the_same():
    config = tiny_model("llama", num_hidden_layers=1, num_key_value_heads=2, head_dim=16).config
    key, value = states([0, 0], 40)
    key[:, 0, 0, 0] = torch.tensor([0.0, -0.0])
    with VirtualCache(config) as cache:
        ours, _ = cache.update(key, value, 0)
        assert torch.equal(ours[:, 0, 0, 0].signbit(), torch.tensor([False, True]))


def test_no_room_for_the_tails_of_rows_that_share_leaves_nothing_behind():
    config = tiny_model("llama", num_hidden_layers=1, num_key_value_heads=2, head_dim=16).config
    with VirtualCache(config, page_size=4096, memory=7 * 4096, head_major=False) as cache:
        cache.update(*states([0, 0], 20), 0)  # K and V, a page of each row and stream
        before, needed = cache.layers[0].keys.clone(), cache.stats().needed
        # More than there is for one row; and enough for one, but not for the tail of the other.
        for tokens, short in ((300, 18), (40, 2)):
            with pytest.raises(OutOfPages, match=f"{short} pages needed"):
                cache.update(*states([0, 0], tokens, seed=1), 0)
            assert (cache.get_seq_length(), cache.stats().needed) == (20, needed)
            assert torch.equal(cache.layers[0].keys, before)
        key, value = cache.update(*states([0, 0], 5, seed=2), 0)
        assert torch.equal(key[:, :, :20], before)
        assert torch.equal(value[:, :, 20:], states([0, 0], 5, seed=2)[1])


def test_encoder_and_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    small = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    model = T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0)).eval()
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    for options in ({}, {"num_beams": 3}):
        options |= {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
        expected = model.generate(ids, **options)
        with VirtualCache(model.config, guard=True) as cache:
            both = EncoderDecoderCache(cache, DynamicCache(config=model.config))
            assert torch.equal(model.generate(ids, past_key_values=both, **options), expected)
            assert cache.stats().needed > 0


# -- forward passes of one's own ---------------------------------------------------------------------------------------


def forward(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


@torch.no_grad()
def test_forks_share_what_they_have_in_common():
    model, ids = model_of("llama"), prompts()[0][:2]
    long = ids.repeat(1, 30)
    with VirtualCache(model.config, page_size=4096) as cache:
        forward(model, cache, long)
        alone = cache.stats()
        with copy.deepcopy(cache) as twin:
            both = cache.stats()
            assert both.needed == 2 * alone.needed
            streams = sum(isinstance(layer, VirtualLayer) for layer in cache.layers) * 2 * 2  # K and V of two heads
            assert both.created - alone.created <= streams * 2 * 4096
            assert both.copied < streams * 2 * 4096
            a, b = forward(model, cache, ids[:, :5]), forward(model, twin, ids[:, 5:9])
            twin.crop(-20)
            c = forward(model, twin, ids[:, 3:6])
            for logits, said in ((a, [long, ids[:, :5]]), (b, [long, ids[:, 5:9]])):
                assert torch.allclose(
                    logits, forward(model, None, torch.cat(said, 1))[:, -logits.shape[1] :], atol=1e-4
                )
            said = torch.cat([torch.cat([long, ids[:, 5:9]], 1)[:, :-20], ids[:, 3:6]], 1)
            assert torch.allclose(c, forward(model, None, said)[:, -3:], atol=1e-4)
            a = forward(model, cache, ids[:, 7:8])
        assert cache.stats().needed == alone.needed + 6 * alone.needed // long.shape[1]
        assert torch.allclose(a, forward(model, None, torch.cat([long, ids[:, :5], ids[:, 7:8]], 1))[:, -1:], atol=1e-4)


@torch.no_grad()
def test_one_prompt_for_many_samples():
    """Prefill once, then repeat the rows: the prompt takes its memory once."""
    model, ids = model_of("llama"), prompts()[0][:1].repeat(1, 40)
    caches = DynamicCache(config=model.config), VirtualCache(model.config, page_size=4096)
    for cache in caches:
        forward(model, cache, ids)
    one = caches[1].stats()
    for cache in caches:
        cache.batch_repeat_interleave(6)
    six = caches[1].stats()
    assert six.needed == 6 * one.needed
    assert six.created - one.created <= 6 * 3 * 2 * 2 * 4096  # rows, layers, K and V, heads
    same = [forward(model, cache, prompts()[0][:1, :6].T) for cache in caches]
    assert torch.equal(*same)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([4, 1]))
    assert torch.equal(*[forward(model, cache, prompts()[0][:1, :2].T) for cache in caches])
    for cache in caches:
        cache.batch_select_indices(torch.tensor([False, True]))
    assert torch.equal(*[forward(model, cache, prompts()[0][:1, 8:9].T) for cache in caches])
    caches[1].close()


@torch.no_grad()
def test_as_many_rows_as_are_reserved():
    """Rows are added in place where no fork can be behind them, and elsewhere where one may be."""
    model, ids = model_of("llama"), prompts()[0][:1]
    with VirtualCache(model.config, max_batch_size=8) as cache:
        forward(model, cache, ids)
        cache.batch_repeat_interleave(8)
        assert forward(model, cache, ids[:, :1].repeat(8, 1)).shape[0] == 8
        cache.batch_select_indices(torch.tensor([2]))
        with cache.fork() as twin:
            cache.batch_repeat_interleave(3)
            said = forward(model, None, torch.cat([ids, ids[:, :1], ids[:, 4:6]], 1))[:, -2:]
            for kept in (cache, twin):
                logits = forward(model, kept, ids[:, 4:6].repeat(len(kept.layers[0].keys), 1))
                assert torch.allclose(logits, said.expand_as(logits), atol=1e-4)
            with pytest.raises(ConfigError, match="no 6 neighbouring rows"):
                cache.batch_repeat_interleave(2)
            assert torch.equal(*[kept.layers[0].keys[:1, :, : ids.shape[1] + 1] for kept in (cache, twin)])


@torch.no_grad()
def test_reset_makes_it_ready_for_another_batch():
    model, (ids, mask) = model_of("llama"), prompts()
    with VirtualCache(model.config, attention_mask=mask) as cache:
        generate(model, cache, ids, mask)
        cache.reset()
        assert (cache.get_seq_length(), cache.stats().needed, cache.stats().created) == (0, 0, 0)
        again = generate(model, cache, ids[:1], mask[:1])
        assert torch.equal(again, generate(model, DynamicCache(config=model.config), ids[:1], mask[:1]))
        cache.crop(-1000)
        assert torch.equal(forward(model, cache, ids), forward(model, DynamicCache(config=model.config), ids))


@torch.no_grad()
@pytest.mark.parametrize("left", [10, 1, 0])
def test_cropped_into_the_padding(left):
    """What comes then is stored, though the first prompt was padded there."""
    model, (ids, mask) = model_of("llama"), prompts()
    kept = torch.cat([mask[:, :left], torch.ones_like(ids)], 1)
    logits = []
    with VirtualCache(model.config, attention_mask=mask, page_size=4096, guard=True) as cache:
        for used in (DynamicCache(config=model.config), cache):
            model(input_ids=ids, attention_mask=mask, past_key_values=used)
            used.crop(left - ids.shape[1])
            out = model(input_ids=ids, attention_mask=kept, past_key_values=used)
            used.crop(-5)
            logits.append((out.logits, model(input_ids=ids[:, :2], past_key_values=used).logits))
    seen = kept[:, left:].bool()
    assert torch.equal(logits[0][0][seen], logits[1][0][seen])
    assert torch.allclose(logits[0][1][0], logits[1][1][0], atol=1e-4)  # the others have padding behind them


@torch.no_grad()
def test_memory_follows_a_crop():
    model, ids = model_of("llama"), prompts()[0].repeat(1, 30)
    with VirtualCache(model.config, page_size=4096) as cache:
        forward(model, cache, ids)
        whole = cache.stats()
        cache.crop(-900)
        assert cache.get_seq_length() == ids.shape[1] - 900
        assert cache.stats().created < 0.2 * whole.created
        with pytest.raises(ValueError, match="minus"):
            cache.crop(5)


def test_gradients_do_not_flow_through_it():
    model, ids = model_of("llama"), prompts()[0][:1]
    with VirtualCache(model.config) as cache:
        logits = forward(model, cache, ids)  # with gradients: nobody said no_grad
        assert torch.allclose(logits, forward(model, None, ids), atol=1e-5)
        with pytest.raises(InvalidRequest, match="for inference"):
            logits.sum().backward()


def test_written_in_inference_mode_and_out_of_it():
    model, ids = model_of("llama"), prompts()[0][:1]
    with VirtualCache(model.config) as cache:
        with torch.inference_mode():
            forward(model, cache, ids)
        with torch.no_grad():
            logits = forward(model, cache, ids[:, :3])
            assert torch.allclose(logits, forward(model, None, torch.cat([ids, ids[:, :3]], 1))[:, -3:], atol=1e-4)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_two_models_on_one_cache_are_told():
    ids = prompts()[0]
    small, large = model_of("llama"), model_of("olmo2")
    with VirtualCache(small.config) as cache, torch.no_grad():
        forward(small, cache, ids)
        with pytest.raises(InvalidRequest, match="one model and one batch"):
            forward(small, cache, ids[:2])
        other = tiny_model("llama", num_key_value_heads=3)
        with pytest.raises(InvalidRequest, match=r"holds 3 rows of 2 heads of 8 and 8 .* brings 3 rows of 3 heads"):
            forward(other, cache, ids)
        deeper = tiny_model("llama", num_hidden_layers=4)
        with pytest.raises(InvalidRequest, match=r"there is no layer 3: .* a model of 3 layers"):
            forward(deeper, cache, ids)
        with pytest.raises(InvalidRequest, match="bfloat16"):
            forward(copy.deepcopy(large).bfloat16(), cache, ids)


def test_closed():
    model, ids = model_of("llama"), prompts()[0]
    cache = VirtualCache(model.config)
    with torch.no_grad():
        forward(model, cache, ids)
    shown = cache.layers[0].keys
    assert shown.any()
    cache.close()
    cache.close()
    assert cache.closed
    assert not shown.any()  # addresses stay, with nothing behind them
    for use in (lambda: forward(model, cache, ids), cache.stats, cache.fork, lambda: copy.deepcopy(cache)):
        with pytest.raises(InvalidRequest, match="closed"):
            use()


@torch.no_grad()
def test_full():
    model, ids = model_of("llama"), prompts()[0]
    with VirtualCache(model.config, max_cache_len=40) as cache:
        forward(model, cache, ids)
        with pytest.raises(InvalidRequest, match="41 tokens do not fit max_cache_len=40"):
            forward(model, cache, ids[:, :8])
        cache.crop(-1)
        forward(model, cache, ids[:, :8])
    with VirtualCache(model.config, memory="64KiB", page_size=4096, head_major=False) as cache:  # 16 pages
        with pytest.raises(OutOfPages, match="6 pages needed, 4 can be had"):  # K and V of 3 rows, in the third layer
            forward(model, cache, ids)
        assert {layer.get_seq_length() for layer in cache.layers} == {0}  # the other two have none either
        logits = forward(model, cache, ids[:2])
        assert torch.allclose(logits, forward(model, None, ids[:2]), atol=1e-4)


def test_arguments():
    config = model_of("llama").config
    for options, problem in (
        ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
        ({"max_cache_len": -1}, "max_cache_len must be at least 1"),
        ({"attention_mask": torch.ones(3)}, r"\[batch, tokens\]"),
        ({"attention_mask": [[1]]}, r"\[batch, tokens\]"),
    ):
        with pytest.raises(ConfigError, match=problem):
            VirtualCache(config, **options)
    for options in ({"max_batch_size": 1.5}, {"max_cache_len": True}):
        with pytest.raises(TypeError, match="must be an integer"):
            VirtualCache(config, **options)
    with pytest.raises(TypeError, match=r"pass model\.config"):
        VirtualCache("llama")
    with torch.no_grad(), VirtualCache(config, max_batch_size=2) as cache:
        with pytest.raises(ConfigError, match="a batch of 3 does not fit max_batch_size=2"):
            forward(model_of("llama"), cache, prompts()[0])
        forward(model_of("llama"), cache, prompts()[0][:2])
        with pytest.raises(ConfigError, match="larger max_batch_size"):
            cache.batch_repeat_interleave(2)
    problem = "attention_mask has 2 rows, and the first batch has 3"
    with (
        torch.no_grad(),
        VirtualCache(config, attention_mask=torch.ones(2, 33)) as cache,
        pytest.raises(ConfigError, match=problem),
    ):
        forward(model_of("llama"), cache, prompts()[0])


# -- nothing is left behind --------------------------------------------------------------------------------------------


class Stop(Exception):
    """Raised in the middle of generate()."""


def stop_after(tokens: int) -> Callable[..., Any]:
    calls = iter(range(tokens))

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if next(calls, None) is None:
            raise Stop
        return scores

    return process


def held() -> tuple[int, int, int]:
    """File descriptors, mappings, and bytes of shared memory (which memfds are) that this process has."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        mappings = sum("vattention" in line for line in maps)
    with open("/proc/self/status") as status:
        shared = next(int(line.split()[1]) for line in status if line.startswith("RssShmem"))
    return len(os.listdir("/proc/self/fd")), mappings, shared


@pytest.mark.parametrize("dropped", [False, True], ids=["closed", "dropped"])
def test_a_thousand_caches_leave_nothing(dropped, full_size):
    model, (ids, mask) = model_of("llama"), prompts()
    ids, mask = ids[:2, -12:], mask[:2, -12:]
    problems: list[BaseException] = []

    def work(count: int) -> None:
        try:
            for number in range(count):
                cache = VirtualCache(model.config, page_size=4096)
                try:
                    with pytest.raises(Stop):
                        generate(
                            model, cache, ids, mask, num_beams=1 + number % 2, max_new_tokens=4,
                            logits_processor=LogitsProcessorList([stop_after(number % 3)]),
                        )  # fmt: skip
                finally:
                    if not dropped:
                        cache.close()
        except BaseException as error:
            problems.append(error)

    work(3)
    before = held()
    each = 500 if full_size else 30
    threads = [threading.Thread(target=work, args=(each,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    assert held() == before


def test_a_dropped_fork_gives_its_rows_back():
    model, ids = model_of("llama"), prompts()[0]
    with VirtualCache(model.config, page_size=4096) as cache, torch.no_grad():
        forward(model, cache, ids.repeat(1, 10))
        before = cache.stats()
        for _ in range(100):  # more than there are rows for
            cache.fork()
        assert cache.stats().needed == before.needed
        assert cache.stats().created <= 2 * before.created
    cache = VirtualCache(model.config)
    with torch.no_grad():
        forward(model, cache, ids)
    twin = cache.fork()
    cache.close()
    with torch.no_grad():
        assert torch.allclose(
            forward(model, twin, ids[:, :2]), forward(model, None, torch.cat([ids, ids[:, :2]], 1))[:, -2:], atol=1e-4
        )
    twin.close()
