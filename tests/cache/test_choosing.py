"""The layout and the page that are chosen: rules by example, promises on real caches filled at random."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vattention.cache import KVCache, KVLayout
from vattention.cache.choosing import WASTE, Choice, Given, Place, choose
from vattention.errors import ConfigError
from vattention.memory import HostDriver, PagePool

SMOLLM = KVLayout(30, 3, 64, torch.bfloat16, 16, 8192)
LLAMA = KVLayout(32, 8, 128, torch.bfloat16, 16, 131072)
HOST = Place("cpu", 4 << 30, 4096, 52_000)
GPU = Place("cuda", 48 << 30, 2 << 20)


def kind(choice: Choice) -> tuple[bool, int | None, bool]:
    return choice.layout.head_major, choice.layout.layers_per_stream, choice.layout.kv_together


# -- on a CPU


def test_long_requests_are_head_major_on_a_cpu_and_short_ones_are_not() -> None:
    assert kind(choose(SMOLLM, HOST)) == (True, 1, False)
    short = choose(SMOLLM, HOST, expected_tokens=512)
    assert kind(short) == (False, 1, False)
    assert "under 1024 tokens" in short.reason


def test_a_head_is_no_stream_where_that_wastes_too_much() -> None:
    choice = choose(LLAMA, Place("cpu", 256 << 30, 4096, 52_000), expected_tokens=2048)  # pages of 2 MiB and more
    assert kind(choice) == (False, 1, False)
    assert "would waste" in choice.reason


def test_a_head_is_no_stream_where_mappings_would_end() -> None:
    layout = KVLayout(32, 8, 128, torch.bfloat16, 64, 8192)  # 64 slots of 512 streams of 2 mappings
    choice = choose(layout, Place("cpu", 2 << 30, 4096, 52_000))
    assert kind(choice) == (False, 1, False)
    assert "mappings" in choice.reason


def test_short_requests_in_all_slots_must_leave_the_most_of_the_budget() -> None:
    choice = choose(SMOLLM, Place("cpu", 64 << 20, 64 << 10, None))  # 180 first pages of 16 slots: 180 MiB
    assert not choice.layout.head_major


def test_one_kv_head_or_layers_that_differ_are_never_head_major() -> None:
    assert kind(choose(KVLayout(4, 1, 64, torch.float32, 4, 4096), HOST)) == (False, 1, False)
    mixed = KVLayout(2, 4, 64, torch.float32, 4, 4096, shapes=((4, 64, 64), (2, 64, 64)))
    choice = choose(mixed, HOST)
    assert kind(choice) == (False, 1, False)
    assert "differ" in choice.reason


def test_a_cpu_slices_only_where_nothing_else_opens() -> None:
    wide = KVLayout(80, 8, 128, torch.bfloat16, 256, 8192)  # 160 streams of 256 slots: 81,920 mappings
    assert kind(choose(wide, HOST)) == (False, 1, True)
    wider = replace(wide, max_num_seqs=1024)
    choice = choose(wider, HOST)
    assert kind(choice) == (False, 4, True)
    assert "limit" in choice.reason


# -- on a GPU


@pytest.mark.parametrize(
    ("tokens", "layout", "page"),
    [
        (131072, (False, 1, False), 4 << 20),  # 64 streams waste 64 MiB of 16 GiB, and twice that is still under 1%
        (8192, (False, 1, True), 2 << 20),  # 64 MiB of 1 GiB is too much, 32 is not
        (2048, (False, 4, True), 2 << 20),
        (256, (False, 32, True), 2 << 20),
    ],
)
def test_a_gpu_takes_the_densest_layout_that_wastes_little(tokens: int, layout: tuple, page: int) -> None:
    choice = choose(LLAMA, GPU, expected_tokens=tokens)
    assert (kind(choice), choice.page_size) == (layout, page)
    assert choice.expected_waste <= WASTE
    assert not choice.layout.size % page


def test_many_slots_take_fewer_streams_on_a_gpu() -> None:
    choice = choose(replace(LLAMA, max_num_seqs=256), GPU)
    assert kind(choice) == (False, 2, True)  # 16 streams x 2 MiB x 256 slots: 8 of 48 GiB
    assert choice.page_size == 2 << 20


def test_where_all_waste_the_least_is_taken() -> None:
    choice = choose(SMOLLM, GPU, expected_tokens=16)
    assert kind(choice) == (False, 30, True)
    assert "wastes least" in choice.reason


# -- what is given


@pytest.mark.parametrize("place", [HOST, GPU])
def test_what_is_given_stays(place: Place) -> None:
    for head_major in (True, False):
        assert choose(SMOLLM, place, given=Given(head_major=head_major)).layout.head_major is head_major
    assert kind(choose(SMOLLM, place, given=Given(layers_per_stream=None)))[1] == 30
    assert choose(SMOLLM, place, given=Given(kv_together=True)).layout.kv_together
    assert choose(SMOLLM, place, given=Given(page_size=8 << 20)).page_size == 8 << 20
    whole = choose(SMOLLM, place, given=Given(True, 7, True, 2 << 20))
    assert (kind(whole), whole.page_size, whole.reason) == ((True, 7, True), 2 << 20, "as asked for")
    with pytest.raises(ConfigError, match="layers_per_stream"):
        choose(SMOLLM, place, given=Given(layers_per_stream=0))


def test_the_line_says_it_all() -> None:
    line = str(choose(LLAMA, GPU, expected_tokens=8192))
    assert line == (
        "token-major, K and V together; 2 MiB pages of 512 tokens; a request of 8192 tokens wastes about 3.1%:"
        " the densest layout that wastes at most 5%, with room for all slots"
    )


# -- promises

layouts = st.builds(
    KVLayout,
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([16, 24, 64, 128]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(1, 12),
    st.integers(1, 5000),
)
givens = st.builds(
    Given,
    st.sampled_from(["auto", True, False]),
    st.sampled_from(["auto", None, 1, 3]),
    st.sampled_from(["auto", True, False]),
)


@given(
    layout=layouts,
    given_=givens,
    device=st.sampled_from(["cpu", "cuda"]),
    budget=st.integers(1, 64 << 20),
    granularity=st.sampled_from([4096, 65536]),
    mappings=st.sampled_from([None, 40, 400, 4000]),
    expected=st.none() | st.integers(1, 10_000),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=150)
def test_a_choice_opens_stays_within_its_limits_and_keeps_its_promise(
    layout: KVLayout,
    given_: Given,
    device: str,
    budget: int,
    granularity: int,
    mappings: int | None,
    expected: int | None,
    seed: int,
) -> None:
    place = Place(device, budget, granularity, mappings)
    choice = choose(layout, place, expected_tokens=expected, given=given_)
    if given_.layers_per_stream != "auto":
        assert choice.layout.layers_per_stream == (given_.layers_per_stream or layout.num_layers)
    driver = HostDriver()
    try:
        pool = PagePool(driver, choice.page_size, max(1 << 30, choice.page_size))  # waste, not the budget, is looked at
        with KVCache(choice.layout, pool=pool) as cache:
            numbers = random.Random(seed)
            lengths = {}
            for _ in range(min(4, layout.max_num_seqs)):
                tokens = numbers.randint(1, min(layout.max_model_len, 300))
                lengths[cache.alloc(tokens=tokens)] = tokens
            cache.step(lengths)
            stats = cache.stats()
            assert stats.needed == sum(lengths.values()) * layout.bytes_per_token
            assert 0 <= stats.wasted <= len(lengths) * choice.most_waste
            assert 0 < choice.expected_waste * choice.expected_tokens * layout.bytes_per_token <= choice.most_waste
    finally:
        driver.close()


@given(layout=layouts, given_=givens, budget=st.integers(1 << 20, 64 << 20), mappings=st.integers(200, 4000))
@settings(deadline=None, max_examples=60)
def test_where_any_choice_fits_all_slots_fit_within_the_mapping_limit(
    layout: KVLayout, given_: Given, budget: int, mappings: int
) -> None:
    choice = choose(layout, Place("cpu", budget, 4096, mappings), given=given_)
    streams = len(choice.layout.streams)
    smallest = choose(layout, Place("cpu", budget, 4096, mappings), given=Given(False, None, True))
    if given_ == Given() and 2 * layout.max_num_seqs <= mappings and smallest.most_waste <= budget:
        assert 2 * streams * layout.max_num_seqs <= mappings
        driver = HostDriver()
        try:
            with KVCache(choice.layout, pool=PagePool(driver, choice.page_size, budget)) as cache:
                for _ in range(layout.max_num_seqs):
                    slot = cache.alloc()
                    if cache.fits({slot: 1}):
                        cache.step({slot: 1})
                assert cache.stats().mappings <= mappings
        finally:
            driver.close()


def test_expected_waste_is_what_a_cache_wastes_on_average() -> None:
    layout = KVLayout(4, 4, 64, torch.bfloat16, 16, 8192)
    choice = choose(layout, Place("cpu", 512 << 20, 4096, 52_000), expected_tokens=4096)
    numbers = random.Random(0)
    with KVCache(choice.layout, memory="512MiB", page_size=choice.page_size) as cache:
        cache.step({cache.alloc(): numbers.randint(3072, 5120) for _ in range(16)})
        stats = cache.stats()
    assert stats.wasted / stats.needed == pytest.approx(choice.expected_waste, rel=0.5)
