"""The stock kernel on slot views: right values, causality aligned to the lower right, nothing read past the length."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from vattention.attention import sdpa
from vattention.attention.base import Segment
from vattention.cache import KVCache, KVLayout

SLOTS, TOKENS = 4, 96
# A fresh prompt, a decode, a chunk over cached tokens, a single token that is a whole prompt.
LENGTHS = [(2, 17, 17), (0, 1, 40), (3, 12, 70), (1, 1, 1)]  # slot, rows, length


def segments_of(lengths: list[tuple[int, int, int]]) -> list[Segment]:
    segments: list[Segment] = []
    for slot, rows, length in lengths:
        segments.append(Segment(slot, segments[-1].end if segments else 0, rows, length))
    return segments


def reference(
    segments: list[Segment], query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention from its definition, in float64, one row and head at a time: `[rows, q_heads, head_dim]`."""
    group = query.shape[0] // keys.shape[2]
    out = torch.empty(query.shape[1], query.shape[0], query.shape[2], dtype=torch.float64)
    for segment in segments:
        for row in range(segment.rows):
            seen = segment.cached + row + 1
            for head in range(query.shape[0]):
                k = keys[segment.slot, :seen, head // group].double()
                v = values[segment.slot, :seen, head // group].double()
                weights = (k @ query[head, segment.start + row].double() * scale).softmax(0)
                out[segment.start + row, head] = weights @ v
    return out


def layer_full_of_nan(kv_heads: int, dim: int, dtype: torch.dtype, head_major: bool = False) -> torch.Tensor:
    nan = torch.full((SLOTS, kv_heads, TOKENS, dim) if head_major else (SLOTS, TOKENS, kv_heads, dim), torch.nan)
    return nan.to(dtype).transpose(1, 2) if head_major else nan.to(dtype)


def random_case(
    q_heads: int, kv_heads: int, dtype: torch.dtype, head_major: bool = False
) -> tuple[list[Segment], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Segments, query, and a layer that holds numbers below each length and NaN everywhere else."""
    generator = torch.Generator().manual_seed(0)
    segments = segments_of(LENGTHS)
    query = torch.randn(q_heads, segments[-1].end, 16, generator=generator).to(dtype) * 2
    keys, values = (layer_full_of_nan(kv_heads, 16, dtype, head_major) for _ in range(2))
    for segment in segments:
        for cache in (keys, values):
            shape = (segment.length, kv_heads, 16)
            cache[segment.slot, : segment.length] = torch.randn(shape, generator=generator).to(dtype)
    return segments, query, keys, values


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_values(q_heads: int, kv_heads: int, dtype: torch.dtype, tolerance: float, head_major: bool) -> None:
    segments, query, keys, values = random_case(q_heads, kv_heads, dtype, head_major)
    attend = sdpa.prepare(segments, dtype=dtype, device=query.device)
    out = attend(query, keys, values, 0.5)
    assert out.shape == (query.shape[1], q_heads, 16)
    torch.testing.assert_close(out.double(), reference(segments, query, keys, values, 0.5), atol=tolerance, rtol=0)


def test_scaling_defaults_to_the_usual_one() -> None:
    segments, query, keys, values = random_case(6, 2, torch.float32)
    attend = sdpa.prepare(segments, dtype=torch.float32, device=query.device)
    torch.testing.assert_close(attend(query, keys, values, None), attend(query, keys, values, 0.25))


def test_a_chunk_aligned_to_the_upper_left_would_be_seen() -> None:
    """The control: what `is_causal=True` makes of a chunk over cached tokens fails the comparison above by far."""
    segments, query, keys, values = random_case(6, 2, torch.float32)
    chunk = next(segment for segment in segments if segment.rows > 1 and segment.cached)
    rows = slice(chunk.start, chunk.end)
    k, v = (cache[chunk.slot, : chunk.length].transpose(0, 1)[None] for cache in (keys, values))
    wrong = scaled_dot_product_attention(query[None, :, rows], k, v, is_causal=True, scale=0.5, enable_gqa=True)
    right = reference(segments, query, keys, values, 0.5)[rows].transpose(0, 1)
    assert float((wrong[0] - right).abs().max()) > 0.5


def test_k_and_v_are_not_copied() -> None:
    """What a call allocates is the output and the kernel's scratch: nothing that grows with the cached tokens."""
    kv_heads, dim, length = 2, 64, 4096
    keys, values = (torch.randn(1, length, kv_heads, dim) for _ in range(2))
    for rows in (1, 8):
        segments = [Segment(0, 0, rows, length)]
        query = torch.randn(kv_heads * 3, rows, dim)
        attend = sdpa.prepare(segments, dtype=torch.float32, device=query.device)
        attend(query, keys, values, None)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            attend(query, keys, values, None)
        events = profiler.key_averages()
        allocated = sum(event.self_cpu_memory_usage for event in events if event.self_cpu_memory_usage > 0)
        assert 0 < allocated < keys.nbytes / 10
        assert not [event.key for event in events if "copy" in event.key and event.count > len(segments)]


def test_unmapped_tokens_are_not_touched() -> None:
    """In guard mode a read past the mapped pages kills the process."""
    layout = KVLayout(2, 2, 64, torch.float32, SLOTS, 64, head_major=True)
    with KVCache(layout, memory="4MiB", page_size=4096, guard=True) as cache:
        # 16 tokens a page: lengths that end with the last mapped page.
        slots = [cache.alloc(), cache.alloc()]
        assert None not in slots
        cache.step({slots[0]: 16, slots[1]: 48})  # type: ignore[dict-item]
        keys, values = cache.layer(1)
        for slot, length in zip(slots, (16, 48), strict=True):
            keys[slot, :length] = 1.0
            values[slot, :length] = torch.arange(length, dtype=torch.float32)[:, None, None]
        segments = segments_of([(slots[0], 16, 16), (slots[1], 8, 48)])  # type: ignore[list-item]
        out = sdpa.prepare(segments, dtype=torch.float32, device=keys.device)(torch.ones(6, 24, 64), keys, values, None)
        # Equal keys: every row is the mean of the values it may see.
        expected = [row / 2 for row in range(16)] + [(40 + row) / 2 for row in range(8)]
        torch.testing.assert_close(out[:, 0, 0], torch.tensor(expected))
