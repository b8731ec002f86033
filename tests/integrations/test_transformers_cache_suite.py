"""What transformers asks of its own caches in tests/utils/test_cache_utils.py, asked of `VirtualCache`.

Each test says which one of theirs it stands for; docs/transformers.md has the table, and why some have no counterpart.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, LlamaConfig, StaticCache
from transformers.cache_utils import Cache

from support.models import demo_model, tiny_model
from vattention import InvalidRequest, VirtualCache


def small(**changes: Any) -> Gemma2Config:
    sizes = {
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "num_attention_heads": 1,
        "head_dim": 1,
        "hidden_size": 1,
    }
    return Gemma2Config(**{**sizes, "sliding_window": 4, "layer_types": ["full_attention"], **changes})


def states(*numbers: float) -> tuple[torch.Tensor, torch.Tensor]:
    one = torch.tensor(numbers, dtype=torch.float32)[None, None, :, None]
    return one, one.clone()


def shown(cache: Cache, layer: int = 0) -> list[float]:
    return cache.layers[layer].keys[0, 0, :, 0].tolist()


def filled(cache: Cache, *, batch: int = 4, layers: int = 10) -> Cache:
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        cache.update(*(torch.rand(batch, 4, 8, 16, generator=generator) for _ in "kv"), layer)
    return cache


TEN_LAYERS = LlamaConfig(num_hidden_layers=10, num_attention_heads=4, hidden_size=64)


def same(one: Cache, other: Cache) -> bool:
    pairs = [
        zip((a.keys, a.values), (b.keys, b.values), strict=True) for a, b in zip(one.layers, other.layers, strict=True)
    ]
    return all(torch.equal(a, b) for pair in pairs for a, b in pair)


def test_shapes_lengths_and_iteration():
    """test_dynamic_cache_retrocompatibility: the parts that outlived the legacy format."""
    with filled(VirtualCache(TEN_LAYERS)) as cache:
        reference = filled(DynamicCache(config=TEN_LAYERS))
        assert len(cache) == len(reference) == 10
        assert cache.get_seq_length() == cache.get_seq_length(9) == reference.get_seq_length() == 8
        assert cache.get_max_length() == reference.get_max_length()
        assert cache.get_mask_sizes(3, 0) == reference.get_mask_sizes(3, 0)
        assert (cache.is_compileable, cache.is_croppable) == (reference.is_compileable, reference.is_croppable)
        assert cache.is_sliding == reference.is_sliding
        assert cache.is_initialized
        assert same(cache, reference)
        for ours, theirs in zip(cache, reference, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))


def test_rebuilt_from_its_parts():
    """test_data_parallel_dynamic_cache: replicas hand over (keys, values) and are put together again."""
    with filled(VirtualCache(TEN_LAYERS)) as cache:
        assert same(DynamicCache(list(cache), config=TEN_LAYERS), cache)


def test_reorder():
    """test_reorder_cache_retrocompatibility."""
    beams = torch.tensor([3, 0, 0, 2])
    reference = filled(DynamicCache(config=TEN_LAYERS))
    reference.reorder_cache(beams)
    with filled(VirtualCache(TEN_LAYERS)) as cache:
        cache.reorder_cache(beams)
        assert same(cache, reference)


@pytest.mark.parametrize("heads", [32, 4, 1], ids=["multi-head", "grouped", "multi-query"])
def test_heads(heads):
    """test_static_cache_mha_mqa_gqa, less the fixed length."""
    config = LlamaConfig(num_attention_heads=32, num_key_value_heads=heads, num_hidden_layers=1)
    with VirtualCache(config) as cache:
        keys, values = cache.update(torch.rand(1, heads, 1, 128), torch.rand(1, heads, 1, 128), 0)
        assert keys.shape == values.shape == (1, heads, 1, 128)


def test_out_of_bounds():
    """test_static_cache_out_of_bounds: an error of ours, which says what to do."""
    with VirtualCache(small(), max_cache_len=4) as cache:
        cache.update(*states(1, 2, 3, 4), 0)
        with pytest.raises(InvalidRequest, match="max_cache_len=4"):
            cache.update(*states(5), 0)


def test_growing():
    """test_static_cache and test_dynamic_cache, scenario 1: no room is shown that nothing was written to."""
    with VirtualCache(small()) as cache:
        cache.update(*states(1, 2), 0)
        cache.update(*states(3), 0)
        assert shown(cache) == [1, 2, 3]
        cache.update(*states(4), 0)
        assert shown(cache) == [1, 2, 3, 4]


def test_layers_grow_independently():
    """test_dynamic_cache, scenario 2."""
    with VirtualCache(small(num_hidden_layers=2, layer_types=["full_attention"] * 2)) as cache:
        cache.update(*states(1, 2), 0)
        cache.update(*states(10, 20), 1)
        cache.update(*states(3), 0)
        cache.update(*states(30), 1)
        cache.update(*states(4), 0)
        assert shown(cache, 0) == [1, 2, 3, 4]
        assert shown(cache, 1) == [10, 20, 30]


def test_sliding_layers():
    """test_sliding_window_cache and test_hybrid_cache_sliding_mode: a window keeps one token less."""
    with VirtualCache(small(layer_types=["sliding_attention"])) as cache:
        keys, _ = cache.update(*states(1, 2, 3, 4), 0)
        assert keys[0, 0, :, 0].tolist() == [1, 2, 3, 4]
        keys, _ = cache.update(*states(5), 0)
        assert keys[0, 0, :, 0].tolist() == [2, 3, 4, 5]
        assert shown(cache) == [3, 4, 5]
        cache.reset()
        keys, _ = cache.update(*states(1, 2, 3, 4, 5, 6), 0)
        assert keys[0, 0, :, 0].tolist() == [1, 2, 3, 4, 5, 6]
        assert shown(cache) == [4, 5, 6]


def test_full_and_sliding_layers_together():
    """test_hybrid_cache and test_hybrid_cache_static_mode; chunks are kept like windows."""
    types = ["full_attention", "sliding_attention"]
    with VirtualCache(small(num_hidden_layers=2, layer_types=types, sliding_window=2)) as cache:
        cache.update(*states(1, 2, 3), 0)
        keys, _ = cache.update(*states(10, 20, 30), 1)
        assert keys[0, 0, :, 0].tolist() == [10, 20, 30]
        cache.update(*states(5), 0)
        keys, _ = cache.update(*states(50), 1)
        assert shown(cache, 0) == [1, 2, 3, 5]
        assert keys[0, 0, :, 0].tolist() == [30, 50]
        assert cache.is_sliding == [False, True]
        assert cache.get_mask_sizes(1, 0) == (5, 0)
        assert cache.get_mask_sizes(1, 1) == (2, 3)


def test_copied_for_many_prompts():
    """test_cache_copy: one prompt computed once, a deep copy for each continuation."""
    model = tiny_model("llama")
    prompt = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    ends = torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    with VirtualCache(model.config) as cache:
        with torch.no_grad():
            model(input_ids=prompt, past_key_values=cache)
        for end in ends:
            whole = torch.cat([prompt, end[None]], 1)
            with copy.deepcopy(cache) as own:
                assert torch.equal(
                    model.generate(whole, past_key_values=own, **options), model.generate(whole, **options)
                )
        assert cache.get_seq_length() == 40


def generated(model: Any, **options: Any) -> tuple[Any, VirtualCache]:
    ids = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(3))
    cache = VirtualCache(model.config)
    options = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, **options}
    return model.generate(ids, past_key_values=cache, **options), cache


@pytest.mark.slow
def test_batched_beams_and_padding_on_the_demo_model():
    """test_cache_batched, test_cache_beam_search, test_cache_extra_left_padding, test_dynamic_cache_hard."""
    model = demo_model().model
    model.set_attn_implementation("sdpa")
    out, cache = generated(model)
    assert out.past_key_values is cache
    assert cache.get_seq_length() == 12 + 8 - 1
    out, cache = generated(model, num_beams=2, num_return_sequences=2)
    assert out.past_key_values is cache
    assert any(len(set(beams.tolist())) > 1 for beams in out.beam_indices)
    ids = torch.randint(1000, 20000, (1, 5), generator=torch.Generator().manual_seed(3))
    plain = model.generate(ids, past_key_values=VirtualCache(model.config), do_sample=False, max_new_tokens=8)
    padded, mask = torch.nn.functional.pad(ids, (27, 0)), torch.nn.functional.pad(torch.ones_like(ids), (27, 0))
    for given in (None, mask):
        cache = VirtualCache(model.config, attention_mask=given)
        longer = model.generate(padded, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=8)
        assert torch.equal(longer[:, 27:], plain)


def test_never_compiled():
    """test_static_cache_no_cuda_graph_skips and static exports: no shape is static."""
    with VirtualCache(LlamaConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=64)) as cache:
        assert not cache.is_compileable
        assert not isinstance(cache, StaticCache)


def test_initialised_early():
    """The export recipes initialise a cache before its first token."""
    with VirtualCache(TEN_LAYERS) as cache:
        cache.early_initialization(4, 4, 16, torch.float32, torch.device("cpu"))
        assert cache.is_initialized
        assert cache.get_seq_length() == cache.stats().created == 0
        assert same(filled(cache), filled(DynamicCache(config=TEN_LAYERS)))


def test_gptj():
    """test_cache_gptj_model."""
    model = tiny_model("gptj", rotary_dim=4)

    ids = torch.randint(3, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    with VirtualCache(model.config) as cache:
        ours = model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert torch.equal(ours, model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0))
