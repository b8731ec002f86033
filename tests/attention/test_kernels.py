"""The stock kernel on slot views: right values, causality aligned to the lower right, nothing read past the length."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from vattention.attention import blocked, choose, cpu_decode, sdpa
from vattention.attention.base import Features, Segment
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
    segments: list[Segment], query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, asked: Features
) -> torch.Tensor:
    """Attention from its definition, in float64, one row and head at a time: `[rows, q_heads, width of V]`."""
    group = query.shape[0] // keys.shape[2]
    out = torch.empty(query.shape[1], query.shape[0], values.shape[3], dtype=torch.float64)
    for segment in segments:
        for row in range(segment.rows):
            end = segment.cached + row + 1
            first = 0 if asked.window is None else max(0, end - asked.window)
            for head in range(query.shape[0]):
                k = keys[segment.slot, first:end, head // group].double()
                v = values[segment.slot, first:end, head // group].double()
                scores = k @ query[head, segment.start + row].double() * asked.scaling
                if asked.softcap is not None:
                    scores = asked.softcap * (scores / asked.softcap).tanh()
                if asked.sinks is not None:
                    scores = torch.cat([scores, asked.sinks[head : head + 1].double()])
                out[segment.start + row, head] = scores.softmax(0)[: end - first] @ v
    return out


def layer_full_of_nan(kv_heads: int, dim: int, dtype: torch.dtype, head_major: bool = False) -> torch.Tensor:
    nan = torch.full((SLOTS, kv_heads, TOKENS, dim) if head_major else (SLOTS, TOKENS, kv_heads, dim), torch.nan)
    return nan.to(dtype).transpose(1, 2) if head_major else nan.to(dtype)


def random_case(
    q_heads: int, kv_heads: int, dtype: torch.dtype, head_major: bool = False, value_dim: int = 16
) -> tuple[list[Segment], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Segments, query, and a layer that holds numbers below each length and NaN everywhere else."""
    generator = torch.Generator().manual_seed(0)
    segments = segments_of(LENGTHS)
    query = torch.randn(q_heads, segments[-1].end, 16, generator=generator).to(dtype) * 2
    keys, values = (layer_full_of_nan(kv_heads, dim, dtype, head_major) for dim in (16, value_dim))
    for segment in segments:
        for cache in (keys, values):
            shape = (segment.length, kv_heads, cache.shape[3])
            cache[segment.slot, : segment.length] = torch.randn(shape, generator=generator).to(dtype)
    return segments, query, keys, values


KERNELS = {"sdpa": sdpa.prepare, "blocked": blocked.prepare}
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-2), (torch.float16, 1e-2)]
)


@pytest.mark.parametrize("window", [None, 1, 5, 17, 40, 69, 70, 500])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_major", [False, True])
def test_windows(head_major: bool, kernel: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_WINDOWED_ROWS", 5)
    monkeypatch.setattr(blocked, "SCORE_BYTES", 3000)
    check_values(kernel, 6, 2, torch.float32, 1e-5, head_major=head_major, window=window)


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@DTYPES
def test_values(
    q_heads: int, kv_heads: int, dtype: torch.dtype, tolerance: float, kernel: str, window: int | None
) -> None:
    check_values(kernel, q_heads, kv_heads, dtype, tolerance, window=window)


def check_values(
    kernel: str,
    q_heads: int,
    kv_heads: int,
    dtype: torch.dtype,
    tolerance: float,
    *,
    head_major: bool = False,
    window: int | None,
) -> None:
    segments, query, keys, values = random_case(q_heads, kv_heads, dtype, head_major)
    asked = Features(scaling=0.5, window=window)
    out = KERNELS[kernel](segments, dtype=dtype, device=query.device)(query, keys, values, asked)
    assert out.shape == (query.shape[1], q_heads, 16)
    torch.testing.assert_close(out.double(), reference(segments, query, keys, values, asked), atol=tolerance, rtol=0)


@pytest.mark.parametrize("value_dim", [16, 7])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("score_bytes", [1, 8 << 20])
def test_every_feature_in_blocks_of_every_size(
    value_dim: int,
    sinks: bool,
    softcap: float | None,
    window: int | None,
    score_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocked, "SCORE_BYTES", score_bytes)
    segments, query, keys, values = random_case(6, 2, torch.float32, value_dim=value_dim)
    asked = Features(0.5, window, softcap, torch.linspace(-2, 4, 6) if sinks else None)
    attend = choose.prepare(segments, dtype=torch.float32, device=query.device)
    out = attend(query, keys, values, asked)
    torch.testing.assert_close(out.double(), reference(segments, query, keys, values, asked), atol=1e-5, rtol=0)
    for name in ("window", "softcap", "sinks"):
        if getattr(asked, name) is not None:  # the control
            off = attend(query, keys, values, replace(asked, **{name: None}))
            assert float((off - out).abs().max()) > 1e-2


@DTYPES
def test_soft_caps_and_sinks_in_every_dtype(dtype: torch.dtype, tolerance: float) -> None:
    segments, query, keys, values = random_case(6, 2, dtype)
    asked = Features(0.5, None, 0.7, torch.linspace(-2, 4, 6, dtype=dtype))
    out = blocked.prepare(segments, dtype=dtype, device=query.device)(query, keys, values, asked)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), reference(segments, query, keys, values, asked), atol=tolerance, rtol=0)


def test_which_kernel_computes_what(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name, kernel in (("sdpa", sdpa), ("blocked", blocked)):

        def prepare(*args: Any, name: str = name, **kwargs: Any) -> Any:
            used.append(name)
            return lambda query, keys, values, features: None

        monkeypatch.setattr(kernel, "prepare", prepare)
    narrow, wide = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 8)
    prompt, long = [Segment(0, 0, 40, 40)], [Segment(0, 0, 40, 10**7)]
    for features, values, segments, expected in (
        (Features(), narrow, long, "sdpa"),
        (Features(scaling=2.0, window=3), narrow, long, "sdpa"),
        (Features(), narrow, prompt, "blocked"),
        (Features(), narrow, [*prompt, Segment(1, 40, 2, 9), Segment(2, 42, 1, 9)], "blocked"),
        (Features(softcap=2.0), narrow, long, "blocked"),
        (Features(sinks=torch.zeros(1)), narrow, long, "blocked"),
        (Features(), wide, long, "blocked"),
    ):
        monkeypatch.setattr(cpu_decode, "can", lambda *_: True)
        monkeypatch.setattr(cpu_decode, "prepare", lambda segments: lambda *_: None)
        choose.prepare(segments, dtype=torch.float32, device=torch.device("cpu"))(narrow, narrow, values, features)
        assert used.pop() == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_long_prompt_takes_bounded_memory(kernel: str) -> None:
    """3,000 tokens: heads x rows x keys in float32 would be 288 MB."""
    heads, tokens = 8, 3000
    keys, values = (torch.randn(1, tokens, 2, 16) for _ in range(2))
    query = torch.randn(heads, tokens, 16)
    for window in (None, 128):
        attend = KERNELS[kernel]([Segment(0, 0, tokens, tokens)], dtype=torch.float32, device=query.device)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profiler:
            attend(query, keys, values, Features(window=window))
        largest = max(event.cpu_memory_usage for event in profiler.events())
        assert largest < 20 << 20


@pytest.mark.parametrize("kernel", KERNELS)
def test_scaling_defaults_to_the_usual_one(kernel: str) -> None:
    segments, query, keys, values = random_case(6, 2, torch.float32)
    attend = KERNELS[kernel](segments, dtype=torch.float32, device=query.device)
    torch.testing.assert_close(
        attend(query, keys, values, Features()), attend(query, keys, values, Features(scaling=0.25))
    )


def test_a_chunk_aligned_to_the_upper_left_would_be_seen() -> None:
    """The control: what `is_causal=True` makes of a chunk over cached tokens fails the comparison above by far."""
    segments, query, keys, values = random_case(6, 2, torch.float32)
    chunk = next(segment for segment in segments if segment.rows > 1 and segment.cached)
    rows = slice(chunk.start, chunk.end)
    k, v = (cache[chunk.slot, : chunk.length].transpose(0, 1)[None] for cache in (keys, values))
    wrong = scaled_dot_product_attention(query[None, :, rows], k, v, is_causal=True, scale=0.5, enable_gqa=True)
    right = reference(segments, query, keys, values, Features(0.5))[rows].transpose(0, 1)
    assert float((wrong[0] - right).abs().max()) > 0.5


@pytest.mark.parametrize("kernel", KERNELS)
def test_k_and_v_are_not_copied(kernel: str) -> None:
    """What a call allocates is the output and the kernel's scratch: nothing that grows with the cached tokens."""
    kv_heads, dim, length = 2, 512, 4096
    keys, values = (torch.randn(1, length, kv_heads, dim) for _ in range(2))
    for rows in (1, 8):
        segments = [Segment(0, 0, rows, length)]
        query = torch.randn(kv_heads * 3, rows, dim)
        attend = KERNELS[kernel](segments, dtype=torch.float32, device=query.device)
        attend(query, keys, values, Features())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            attend(query, keys, values, Features())
        events = profiler.key_averages()
        allocated = sum(event.self_cpu_memory_usage for event in events if event.self_cpu_memory_usage > 0)
        assert 0 < allocated < keys.nbytes / 8


@pytest.mark.parametrize("kernel", KERNELS)
def test_unmapped_tokens_are_not_touched(kernel: str) -> None:
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
        out = KERNELS[kernel](segments, dtype=torch.float32, device=keys.device)(
            torch.ones(6, 24, 64), keys, values, Features()
        )
        # Equal keys: every row is the mean of the values it may see.
        expected = [row / 2 for row in range(16)] + [(40 + row) / 2 for row in range(8)]
        torch.testing.assert_close(out[:, 0, 0], torch.tensor(expected))


def test_a_sink_far_above_the_scores_takes_all_the_weight() -> None:
    """Its exponential overflows in float32, which must end as weights of 0 and not as NaN."""
    segments, query, keys, values = random_case(6, 2, torch.float32)
    attend = blocked.prepare(segments, dtype=torch.float32, device=query.device)
    sinks = torch.tensor([300.0, -300.0] * 3)
    out = attend(query, keys, values, Features(0.5, sinks=sinks))
    assert not out[:, ::2].any()
    plain = attend(query, keys, values, Features(0.5))
    torch.testing.assert_close(out[:, 1::2], plain[:, 1::2])
