"""FlashAttention's own packages and FlashInfer on slots, against what their documentation promises."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from support.flash_attn import WithCacheOnACPU
from support.flashinfer import FlashInferOnACPU
from support.segments import filled, segments_of
from vattention.attention import blocked, flash_attn, flashinfer
from vattention.attention.base import Features, Segment
from vattention.attention.decode_plan import DecodeRows
from vattention.cache import KVCache, KVLayout

CPU = torch.device("cpu")
BATCHES = {
    "decodes": [(2, 1, 17), (0, 1, 140), (3, 1, 1)],
    "mixed": [(2, 17, 17), (0, 1, 140), (3, 12, 70), (1, 1, 64)],
}
SINKS = torch.tensor([-1.0, 0, 1, 2, 3, 30])
ASKED = {
    "plain": Features(0.1),
    "window": Features(0.1, 12),
    "a window that hides nothing": Features(None, 140),
    "soft cap": Features(0.1, softcap=1.5),
    "sinks": Features(0.1, 30, sinks=SINKS),
}
TILE = 64


@pytest.mark.parametrize(
    "layout", [{}, {"head_major": True}, {"kv_together": True, "layers_per_stream": None}], ids=str
)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("version", [2, 3])
def test_flash_attn(version: int, asked: str, batch: str, layout: dict[str, Any]) -> None:
    segments, features = segments_of(BATCHES[batch]), ASKED[asked]
    with KVCache(KVLayout(2, 2, 16, torch.float16, 4, 256, **layout), memory="32MiB", guard=True, poison=True) as cache:
        query, keys, values = filled(cache, segments, 6)
        library = WithCacheOnACPU(tile=1 if version == 2 else TILE)
        family = flash_attn.family(version, library)
        assert family.missing(CPU) is None
        assert family.can(query, keys, values, features)
        out = family.prepare(segments, dtype=keys.dtype, device=CPU)(query, keys, values, features)
        exact = blocked.prepare(segments, dtype=keys.dtype, device=CPU)(query, keys, values, features)
        torch.testing.assert_close(out, exact, atol=1e-2, rtol=0)
        decodes = [segment.length for segment in segments if segment.rows == 1]
        first = library.calls[0]
        if version == 2:
            assert first == (1, max(decodes), False, (11, 0) if asked == "window" else first.window, tuple(decodes))
            if asked in ("plain", "a window that hides nothing", "soft cap"):
                assert first.window == (-1, -1)
            assert len(library.calls) == 1 + len(segments) - len(decodes)
        else:
            assert all(call.longest == call.lengths[0] for call in library.calls), "each is cut at its length"
            assert len(library.calls) == len(segments)
        del keys, values


def test_version_3_would_read_what_is_not_there() -> None:
    """The control of the one above: the same call as for version 2 meets the NaN behind a length."""
    segments = segments_of(BATCHES["decodes"])
    with KVCache(KVLayout(1, 2, 16, torch.float16, 4, 256), memory="32MiB", poison=True) as cache:
        query, keys, values = filled(cache, segments, 6)
        family = flash_attn.family(2, WithCacheOnACPU(tile=TILE))
        out = family.prepare(segments, dtype=keys.dtype, device=CPU)(query, keys, values, Features())
        assert out.isnan().any()
        del keys, values
    assert flash_attn.family(3, WithCacheOnACPU()).decode is None, "no graph holds it"


@pytest.mark.parametrize("q_heads", [2, 6])
@pytest.mark.parametrize(
    "layout", [{}, {"head_major": True}, {"kv_together": True, "layers_per_stream": None}], ids=str
)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("asked", [name for name in ASKED if name != "sinks"])
def test_flashinfer(asked: str, batch: str, layout: dict[str, Any], q_heads: int) -> None:
    segments, features = segments_of(BATCHES[batch]), ASKED[asked]
    with KVCache(KVLayout(2, 2, 64, torch.float16, 4, 256, **layout), memory="32MiB", guard=True, poison=True) as cache:
        query, keys, values = filled(cache, segments, q_heads)
        library = FlashInferOnACPU()
        family = flashinfer.family(library)
        assert family.can(query, keys, values, features)
        exact = blocked.prepare(segments, dtype=keys.dtype, device=CPU)(query, keys, values, features)
        for passes in (1, 2):
            attend = family.prepare(segments, dtype=keys.dtype, device=CPU)
            for _layer in range(3):
                out = attend(query, keys, values, replace(features))  # each layer says it anew
                torch.testing.assert_close(out, exact, atol=1e-2, rtol=0)
            assert library.plans == passes, "once a pass, whatever the layers"
        assert [wrapper.tensor_cores for wrapper in library.wrappers] == [q_heads == 6]
        assert library.prompts[:2] == [(s.rows, s.length) for s in segments if s.rows > 1]
        del keys, values


PASSES = [([2, 0, 3], [17, 140, 1]), ([2, 0, 3], [18, 141, 2]), ([1, 2, 2], [96, 65, 65]), ([3, 0, 1], [1, 64, 128])]


@pytest.mark.parametrize("name", ["flash_attn", "flashinfer"])
def test_one_plan_for_many_passes(name: str) -> None:
    """What a graph would hold: the numbers change in place, and one kind of layer follows another."""
    generator = torch.Generator().manual_seed(0)
    library = FlashInferOnACPU()
    family = flash_attn.family(2, WithCacheOnACPU()) if name == "flash_attn" else flashinfer.family(library)
    assert family.decode is not None
    with KVCache(KVLayout(1, 2, 64, torch.float16, 4, 256), memory="32MiB", guard=True, poison=True) as cache:
        for _ in range(4):
            cache.alloc()
        keys, values = cache.layer(0)
        rows = DecodeRows([0] * 3, [1] * 3, bound=256, device=CPU)
        attend = family.decode(rows)
        for number, (slots, lengths) in enumerate(PASSES):
            cache.step(dict(zip(slots, lengths, strict=True)))
            for slot, length in zip(slots, lengths, strict=True):
                for view in (keys, values):
                    view[slot, :length] = torch.randn((length, 2, 64), generator=generator).half()
            query = torch.randn(6, 3, 64, generator=generator).half()
            rows.update(slots, lengths)
            for features in (Features(0.1), Features(0.1, 12), Features(0.1, softcap=2.0)):
                out = attend(query, keys, values, features)
                for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
                    alone = blocked.prepare([Segment(slot, 0, 1, length)], dtype=keys.dtype, device=CPU)
                    expected = alone(query[:, row : row + 1], keys, values, features)[0]
                    torch.testing.assert_close(out[row], expected, atol=1e-2, rtol=0)
            if name == "flashinfer":
                assert library.plans == 3 * (number + 1)
                assert all(wrapper.captured for wrapper in library.wrappers)
        del keys, values


def test_what_they_cannot_do() -> None:
    def layer(width: int = 64, dtype: torch.dtype = torch.float16, tokens: int = 32) -> torch.Tensor:
        return torch.zeros(4, tokens, 2, width, dtype=dtype)

    query, keys, plain = torch.zeros(4, 3, 64, dtype=torch.float16), layer(), Features()
    for family in (flash_attn.family(2), flash_attn.family(3), flashinfer.family()):
        assert family.missing(CPU) == "it needs a GPU"
        assert family.can(query, keys, keys, plain)
        assert family.can(query, keys, keys, Features(0.1, 16, 2.0))
        assert not family.can(query.float(), layer(dtype=torch.float32), layer(dtype=torch.float32), plain)
        assert not family.can(query.bfloat16(), keys, keys, plain)
        assert not family.can(query, keys, layer(32), plain)
        assert not family.can(query, layer(264), layer(264), plain)
        for odd in (layer(65)[..., :64], layer(128)[..., ::2], layer(72)[..., 4:68]):
            assert not family.can(query, odd, odd, plain)
    sinks = Features(sinks=torch.zeros(4))
    assert flash_attn.family(2).can(query, keys, keys, sinks)
    flash = flashinfer.family()
    assert not flash.can(query, keys, keys, sinks)
    assert not flash.can(query, layer(32), layer(32), plain)
    assert not flash.can(query, layer(tokens=33)[:, :32], layer(tokens=33)[:, :32], plain)
    assert not flash.can(query, keys, torch.zeros(4, 32, 64, 2, dtype=torch.float16).transpose(2, 3), plain)
