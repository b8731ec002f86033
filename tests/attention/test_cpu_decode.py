"""The decode kernel against attention from its definition in float64: any shape, strides, lengths and features."""

import ctypes
import math
import subprocess
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from support.attention import by_definition, strided
from vattention.attention import choose, cpu_decode, native, sdpa
from vattention.attention.base import Features, Segment
from vattention.attention.cpu_decode import Requests, decode
from vattention.cache import KVCache, KVLayout

pytestmark = pytest.mark.skipif(
    cpu_decode._library(torch.float32, 0, 0) is None, reason="no C++ compiler: torch's attention is used"
)

ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of outputs of about 1: what is computed is exact to float32, what is stored to half a unit of its last place."""


LENGTH = st.one_of(st.integers(1, 40), st.integers(1, 40), st.sampled_from([63, 64, 65, 255, 511, 512, 513, 600]))


@given(st.data())
def test_anything(data: Any) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from(list(ERROR)))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    width = draw(st.one_of(st.sampled_from([16, 64, 80, 96, 128]), st.integers(1, 70)))
    value_width = draw(st.one_of(st.just(width), st.sampled_from([8, 64, 128]), st.integers(1, 70)))
    lengths = draw(st.lists(LENGTH, min_size=1, max_size=4))
    slots = draw(st.permutations(range(len(lengths) + 1)))[: len(lengths)]
    rows = draw(st.permutations(range(len(lengths) + 1)))[: len(lengths)]
    requests = list(zip(slots, rows, lengths, strict=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    keys = strided(data, len(slots) + 1, max(lengths) + 1, kv_heads, width, dtype)
    values = strided(data, len(slots) + 1, max(lengths) + 1, kv_heads, value_width, dtype)
    for slot, length in zip(slots, lengths, strict=True):
        keys[slot, :length] = random(length, kv_heads, width)
        values[slot, :length] = random(length, kv_heads, value_width)
    query = random(kv_heads * group, len(lengths) + 1, width).transpose(0, 1) * 2
    asked = Features(
        scaling=draw(st.sampled_from([None, 0.3])),
        window=draw(st.sampled_from([None, None, 1, 7, 32, 300, 10_000])),
        softcap=draw(st.sampled_from([None, None, 0.8, 30.0])),
        sinks=draw(st.sampled_from([None, None, torch.linspace(-3, 5, kv_heads * group)])),
    )
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(len(lengths), max(lengths) + 1, generator=generator) < draw(st.sampled_from([0.02, 0.5, 0.9]))
        for number, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            keys[slot, :length][~mask[number, :length]] = math.nan  # not read
            values[slot, :length][~mask[number, :length]] = math.nan
    out = torch.full((len(lengths) + 1, query.shape[1], value_width), 7.0, dtype=dtype)
    who = Requests(*(torch.tensor(column) for column in zip(*requests, strict=True)))
    assert cpu_decode.can(query, keys, values)
    decode(query, keys, values, asked, who, out, mask=mask)
    expected = by_definition(query, keys, values, asked, requests, mask)
    for row in range(len(out)):
        wanted = expected.get(row, torch.full(out.shape[1:], 7.0, dtype=torch.float64))
        torch.testing.assert_close(out[row].double(), wanted, atol=ERROR[dtype], rtol=ERROR[dtype])


def layer(slots: int, tokens: int, heads: int = 3, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(slots, tokens, heads, width), torch.randn(slots, tokens, heads, width)


def test_the_result_is_the_same_alone_in_any_batch_and_on_any_number_of_threads() -> None:
    keys, values = layer(9, 2100)
    query = torch.randn(9, 9, 64)
    lengths = [1, 2100, 17, 512, 513, 900, 2000, 64, 1024]
    everyone = torch.arange(9)
    before = torch.get_num_threads()
    together = torch.empty(9, 9, 64)
    try:
        torch.set_num_threads(1)
        decode(query, keys, values, Features(), Requests(everyone, everyone, torch.tensor(lengths)), together)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for some in ([0], [1], [8, 3, 1], [2, 5, 6, 7, 4]):
                out = torch.empty(9, 9, 64)
                rows = torch.tensor(some)
                who = Requests(rows, rows, torch.tensor([lengths[row] for row in some]))
                decode(query, keys, values, Features(), who, out)
                assert torch.equal(out[rows], together[rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("width", [64, 48])
def test_unmapped_tokens_are_not_touched(head_major: bool, width: int) -> None:
    """In guard mode a read past the mapped pages kills the process."""
    page = 4096
    layout = KVLayout(2, 2, width, torch.float32, 3, 256, head_major=head_major)
    # Lengths whose last number is the last one of a page: of each head, or of all heads together.
    tokens = math.lcm(page, width * 4) // (width * 4) // (1 if head_major else 2)
    with KVCache(layout, memory="4MiB", page_size=page, guard=True) as cache:
        slots = [cache.alloc(), cache.alloc()]
        assert None not in slots
        lengths = [tokens, 2 * tokens]
        cache.step(dict(zip(slots, lengths, strict=True)))  # type: ignore[arg-type]
        keys, values = cache.layer(1)
        for slot, length in zip(slots, lengths, strict=True):
            keys[slot, :length] = 1.0
            values[slot, :length] = torch.arange(length, dtype=torch.float32)[:, None, None]
        out = torch.empty(2, 6, width)
        who = Requests(torch.tensor(slots), torch.arange(2), torch.tensor(lengths))
        decode(torch.ones(2, 6, width), keys, values, Features(), who, out)
        # Equal keys: the mean of all values.
        torch.testing.assert_close(out[:, 0, 0], torch.tensor([(length - 1) / 2 for length in lengths]))


def test_large_scores_and_sinks_stay_finite() -> None:
    keys, values = layer(1, 40, 1, 16)
    keys[0, 5] = 1000.0
    out = torch.empty(1, 2, 16)
    who = Requests(torch.tensor([0]), torch.tensor([0]), torch.tensor([40]))
    query = torch.full((1, 2, 16), 100.0)
    decode(query, keys, values, Features(), who, out)
    torch.testing.assert_close(out[0], values[0, 5].expand(2, 16))
    keys[0, 5] = 0.0
    decode(query / 100, keys, values, Features(sinks=torch.tensor([300.0, -300.0])), who, out)
    assert not out[0, 0].any()
    decode(query / 100, keys, values, Features(), who, plain := torch.empty(1, 2, 16))
    torch.testing.assert_close(out[0, 1], plain[0, 1])


def test_k_and_v_are_not_copied() -> None:
    keys, values = layer(2, 8000)
    out = torch.empty(2, 9, 64)
    who = Requests(torch.arange(2), torch.arange(2), torch.tensor([8000, 7000]))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        decode(torch.randn(2, 9, 64), keys, values, Features(), who, out)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiler.key_averages())
    assert 0 < allocated < keys.nbytes / 15


def test_rows_of_both_kinds_in_one_batch() -> None:
    keys, values = layer(4, 96)
    segments = [Segment(2, 0, 1, 40), Segment(0, 1, 1, 96), Segment(3, 2, 12, 70), Segment(1, 14, 1, 1)]
    query = torch.randn(9, 15, 64)
    for asked in (Features(), Features(window=9, softcap=2.0, sinks=torch.ones(9))):
        ours = choose.prepare(segments, dtype=torch.float32, device=query.device)(query, keys, values, asked)
        bare = replace(asked, softcap=None, sinks=None)
        stock = sdpa.prepare(segments, dtype=torch.float32, device=query.device)(query, keys, values, bare)
        if bare == asked:
            torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
        wanted = by_definition(query.transpose(0, 1), keys, values, asked, [(2, 0, 40), (0, 1, 96), (1, 14, 1)])
        for row, expected in wanted.items():
            torch.testing.assert_close(ours[row].double(), expected, atol=1e-5, rtol=1e-5)


def test_what_the_kernel_does_not_read() -> None:
    keys, values = layer(1, 8)
    query = torch.randn(1, 9, 64)
    assert cpu_decode.can(query, keys, values)
    assert not cpu_decode.can(query.double(), keys.double(), values.double())
    assert not cpu_decode.can(query.bfloat16(), keys, values)
    assert not cpu_decode.can(query, keys.transpose(1, 3), values)
    assert not cpu_decode.can(query.requires_grad_(), keys, values)
    with torch.no_grad():
        assert cpu_decode.can(query, keys, values)
    assert not cpu_decode.can(query.to("meta"), keys.to("meta"), values.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 16, 24, 256])
def test_a_paged_cache_differs_in_where_tokens_are_and_in_nothing_else(size: int, dtype: torch.dtype) -> None:
    """The same kernel over a block table: the same result, to the last bit."""
    blocks = 768 // size
    keys, values = (x.to(dtype) for x in layer(3, 768))
    query = torch.randn(3, 9, 64).to(dtype)
    everyone = Requests(torch.tensor([2, 0, 1]), torch.tensor([0, 2, 1]), torch.tensor([640, 1, 733]))
    table = torch.randperm(3 * blocks).view(3, blocks).int()
    scattered = [torch.full((3 * blocks, size, 3, 64), math.nan, dtype=dtype) for _ in range(2)]
    for pool, whole in zip(scattered, (keys, values), strict=True):
        pool[table.flatten()] = whole[:, : blocks * size].unflatten(1, (blocks, size)).flatten(0, 1)
    features = Features(window=600, softcap=20.0, sinks=torch.randn(9))
    contiguous, out = torch.empty(2, 3, 9, 64, dtype=dtype)
    decode(query, keys, values, features, everyone, contiguous)
    assert cpu_decode.can(query, *scattered, paged=True)
    decode(query, *scattered, features, everyone, out, table=table)
    assert torch.equal(out, contiguous)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-march=x86-64", "-march=x86-64-v3", "-O1 -fsanitize=undefined"])
@pytest.mark.parametrize("dtype", list(ERROR))
def test_builds_for_other_processors(dtype: torch.dtype, flags: str, tmp_path: Any, monkeypatch: Any) -> None:
    """Without the instructions of this machine, and with every undefined operation trapped."""
    made = tmp_path / "library.so"
    macros = [f"-DNUMBERS={cpu_decode._NUMBERS[dtype]}", "-DWIDTH=0"]
    given = [flag for flag in native._FLAGS if flag != "-march=native"]
    subprocess.run(
        [*native.find_compiler(), *given, *flags.split(), *macros, "-o", made, cpu_decode._SOURCE], check=True
    )
    library = ctypes.CDLL(str(made))
    library.vattention_scratch.restype = ctypes.c_int64
    monkeypatch.setitem(cpu_decode._libraries, (dtype, 0, False), library)
    monkeypatch.setattr(cpu_decode, "_WIDTHS", ())
    extremes = torch.tensor([0.0, 1e-7, 6e-8, 6.1e-5, 65504.0, 1.0, -2.5, 3e-5]).to(dtype)
    keys, values = torch.zeros(1, 1, 1, 8, dtype=dtype), extremes[None, None, None]
    out = torch.empty(1, 1, 8, dtype=dtype)
    who = Requests(torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))
    decode(torch.zeros(1, 1, 8, dtype=dtype), keys, values, Features(), who, out)
    assert torch.equal(out[0, 0], extremes)
    test_anything()
