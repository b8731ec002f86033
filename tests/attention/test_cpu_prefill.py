"""The prompt kernel against attention from its definition in float64: any shape, strides, lengths and features."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.attention import by_definition, strided
from vattention.attention import blocked, choose, cpu_prefill, native
from vattention.attention.base import Features, Segment
from vattention.cache import KVCache, KVLayout

pytestmark = pytest.mark.skipif(
    cpu_prefill._library() is None, reason="no C++ compiler, or a processor that does not multiply bfloat16"
)

BF16 = torch.bfloat16
PLAIN = Features()


def place(segments: list[tuple[int, int, int]]) -> list[Segment]:
    """(slot, rows, length) one after another."""
    start, placed = 0, []
    for slot, rows, length in segments:
        placed.append(Segment(slot, start, rows, length))
        start += rows
    return placed


def expected(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, asked: Features, segments: list[Segment]
) -> torch.Tensor:
    """`[rows, q_heads, width of V]` in float64."""
    each = [(s.slot, s.start + i, s.cached + i + 1) for s in segments for i in range(s.rows)]
    rows = by_definition(query.transpose(0, 1), keys, values, asked, each)
    return torch.stack([rows[row] for row in sorted(rows)])


def compute(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, asked: Features, segments: list[Segment]
) -> torch.Tensor:
    assert cpu_prefill.can(query, keys, values)
    out = torch.full((query.shape[1], query.shape[0], values.shape[3]), math.nan, dtype=BF16)
    cpu_prefill.prepare(segments)(query, keys, values, asked, out)
    return out


# Around the sizes of a task's rows, of a block of keys, and of a vector.
ROWS = st.one_of(st.integers(1, 20), st.sampled_from([23, 24, 25, 63, 64, 65, 130]))
CACHED = st.one_of(st.just(0), st.integers(0, 40), st.sampled_from([63, 64, 127, 128, 129, 300]))


@settings(max_examples=60)
@given(st.data())
def test_anything(data: Any) -> None:
    draw = data.draw
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    width = draw(st.one_of(st.sampled_from([16, 64, 80, 128]), st.integers(1, 70)))
    value_width = draw(st.one_of(st.just(width), st.sampled_from([8, 64, 128]), st.integers(1, 70)))
    shapes = draw(st.lists(st.tuples(ROWS, CACHED), min_size=1, max_size=3))
    slots = draw(st.permutations(range(len(shapes) + 1)))
    segments = place([(slot, rows, rows + cached) for slot, (rows, cached) in zip(slots, shapes, strict=False)])
    tokens = max(segment.length for segment in segments)
    torch.manual_seed(draw(st.integers(0, 1000)))
    keys = strided(data, len(slots), tokens, kv_heads, width, BF16)
    values = strided(data, len(slots), tokens, kv_heads, value_width, BF16)
    for segment in segments:  # NaN everywhere else
        keys[segment.slot, : segment.length].copy_(torch.randn(segment.length, kv_heads, width))
        values[segment.slot, : segment.length].copy_(torch.randn(segment.length, kv_heads, value_width))
    query = torch.randn(segments[-1].end, kv_heads * group, width).to(BF16).transpose(0, 1)
    asked = Features(
        scaling=draw(st.one_of(st.none(), st.just(0.5))),
        window=draw(st.one_of(st.none(), st.integers(1, 200))),
        softcap=draw(st.one_of(st.none(), st.just(1.5))),
        sinks=draw(st.one_of(st.none(), st.just(torch.randn(kv_heads * group)))),
    )
    out = compute(query, keys, values, asked, segments)
    torch.testing.assert_close(
        out.double(), expected(query, keys, values, asked, segments), rtol=2e-2, atol=1e-2, check_dtype=False
    )


def test_no_less_exact_than_products_of_matrices() -> None:
    torch.manual_seed(0)
    segments = place([(0, 300, 500)])
    keys, values = (torch.randn(1, 500, 3, 64).to(BF16) for _ in range(2))
    query = torch.randn(9, 300, 64).to(BF16)
    true = expected(query, keys, values, PLAIN, segments)
    plain = blocked.prepare(segments, dtype=BF16, device=query.device)(query, keys, values, PLAIN)
    ours = compute(query, keys, values, PLAIN, segments)
    assert (ours - true).pow(2).mean() <= 1.05 * (plain - true).pow(2).mean()


@pytest.mark.parametrize("head_major", [False, True])
def test_nothing_is_read_behind_the_last_token(head_major: bool) -> None:
    """In guard mode that would end the process."""
    layout = KVLayout(1, 2, 64, BF16, 2, 1024, head_major=head_major)
    with KVCache(layout, memory="8MiB", page_size="4KiB", guard=True) as cache:
        slot = cache.alloc()
        assert slot is not None
        cache.step({slot: 160})  # whole pages in either layout
        keys, values = cache.layer(0)
        for x in (keys, values):
            x[slot, :160] = torch.randn(160, 2, 64).to(BF16)
        segments = [Segment(slot, 0, 100, 160)]
        query = torch.randn(4, 100, 64).to(BF16)
        out = compute(query, keys, values, PLAIN, segments)
        torch.testing.assert_close(
            out.double(), expected(query, keys, values, PLAIN, segments), rtol=2e-2, atol=1e-2, check_dtype=False
        )


def test_results_do_not_depend_on_threads_or_on_the_others() -> None:
    torch.manual_seed(0)
    keys, values = (torch.randn(3, 400, 3, 64).to(BF16) for _ in range(2))
    segments = place([(2, 100, 400), (0, 77, 77), (1, 150, 300)])
    query = torch.randn(9, 327, 64).to(BF16)
    together = compute(query, keys, values, PLAIN, segments)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(compute(query, keys, values, PLAIN, segments), together)
    finally:
        torch.set_num_threads(before)
    for segment in segments:
        rows = slice(segment.start, segment.end)
        own = Segment(segment.slot, 0, segment.rows, segment.length)
        assert torch.equal(compute(query[:, rows], keys, values, PLAIN, [own]), together[rows])


def test_who_computes_what() -> None:
    """Single rows go to the decode kernel, the others here, each into its own rows; float32 stays with torch."""
    torch.manual_seed(0)
    segments = place([(1, 1, 200), (0, 50, 90), (2, 1, 3)])
    keys, values = (torch.randn(3, 256, 2, 64) for _ in range(2))
    query = torch.randn(4, 52, 64)
    true = expected(query, keys, values, PLAIN, segments)
    for dtype, error in ((BF16, 2e-2), (torch.float32, 1e-5)):
        q, k, v = (x.to(dtype) for x in (query, keys, values))
        assert cpu_prefill.can(q, k, v) is (dtype == BF16)
        out = choose.prepare(segments, dtype=dtype, device=q.device)(q, k, v, PLAIN)
        torch.testing.assert_close(out.double(), true, rtol=error, atol=error, check_dtype=False)


def test_a_changed_header_is_another_library(tmp_path: Any) -> None:
    source = tmp_path / "some.cpp"
    source.write_text('#include "some.h"')
    header = tmp_path / "some.h"
    header.write_text("int a;")
    before = native._fingerprint(source, native.find_compiler())
    header.write_text("int b;")
    assert native._fingerprint(source, native.find_compiler()) != before
