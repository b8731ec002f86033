"""FlashAttention on slots: the index arithmetic, against the operator's contract; and what goes to which kernel."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from support.flash import FlashOnACPU
from support.segments import filled, segments_of
from vattention.attention import blocked, choose, placing, varlen
from vattention.attention.base import AttentionBatch, Features
from vattention.cache import KVCache, KVLayout

CPU = torch.device("cpu")
# slot, rows, length: decodes before, between and after prompts, chunks over cached tokens, a whole prompt of one token.
BATCHES = {
    "decodes": [(2, 1, 17), (0, 1, 40), (3, 1, 1)],
    "prompts": [(3, 17, 17), (1, 12, 70), (0, 2, 3)],
    "decodes first": [(2, 1, 17), (0, 1, 40), (3, 12, 70), (1, 5, 5)],
    "mixed": [(2, 17, 17), (0, 1, 40), (3, 12, 70), (1, 1, 1)],
}


@pytest.mark.parametrize(
    "layout", [{}, {"head_major": True}, {"kv_together": True}, {"layers_per_stream": None}], ids=str
)
@pytest.mark.parametrize("window", [None, 1, 5, 17, 40, 69, 70, 500])
@pytest.mark.parametrize("batch", BATCHES)
def test_slots_of_a_real_cache(batch: str, window: int | None, layout: dict[str, Any]) -> None:
    segments = segments_of(BATCHES[batch])
    asked = Features(0.5, window, sinks=torch.tensor([-1.0, 0, 1, 2, 3, 30]) if window in (None, 17) else None)
    with KVCache(KVLayout(3, 2, 16, torch.float16, 4, 96, **layout), memory="16MiB", guard=True, poison=True) as cache:
        query, keys, values = filled(cache, segments, 6)
        assert varlen.can(query, keys, values, asked)
        flash = FlashOnACPU()
        out = varlen.prepare(segments, dtype=keys.dtype, device=CPU, operator=flash)(query, keys, values, asked)
        exact = blocked.prepare(segments, dtype=keys.dtype, device=CPU)(query, keys, values, asked)
        torch.testing.assert_close(out, exact, atol=1e-2, rtol=0)
        wrong = FlashOnACPU(align_right=False)
        out = varlen.prepare(segments, dtype=keys.dtype, device=CPU, operator=wrong)(query, keys, values, asked)
        # The control: a chunk over cached tokens shows to which corner the operator aligns.
        if any(1 < segment.rows < segment.length for segment in segments):
            assert not torch.allclose(out, exact, atol=1e-2, rtol=0)
        del keys, values


def test_decodes_and_prompts_are_separate_calls_in_the_form_that_splits() -> None:
    segments = segments_of(BATCHES["mixed"])
    with KVCache(KVLayout(1, 2, 16, torch.bfloat16, 4, 96), memory="16MiB") as cache:
        query, keys, values = filled(cache, segments, 6)
        flash = FlashOnACPU()
        attend = varlen.prepare(segments, dtype=keys.dtype, device=CPU, operator=flash)
        attend(query, keys, values, Features())
        decodes, prompts = flash.calls
        assert decodes == (1, 40, False, (-1, -1), (40, 1))
        assert prompts == (17, 70, True, (-1, 0), (17, 70))
        attend(query, keys, values, Features(window=40))  # as many as the longest decode has
        assert [call.window for call in flash.calls[2:]] == [(-1, -1), (39, 0)]
        attend(query, keys, values, Features(window=7))  # a decode sees the end of its tokens, still without a window
        assert flash.calls[4] == (1, 7, False, (-1, -1), (7, 1))
        del keys, values


def test_the_numbers_of_a_call() -> None:
    segments = segments_of([(3, 4, 9), (2, 5, 5)])
    call = varlen._plan(segments, 1024, CPU)
    assert [x.tolist() for x in call[:3]] == [[0, 4, 9], [3072, 2048, 2048], [9, 5]]
    assert call[3:] == (5, 9, -1)
    assert all(x.dtype == torch.int32 for x in call[:3])
    assert all(x.device.type == "meta" for x in varlen._plan(segments, 1024, torch.device("meta"))[:3])
    whole, end = (varlen._ends(1024, window, [0, 3], [40, 2]) for window in (None, 7))
    assert [list(x) for x in whole] == [[0, 1, 2], [0, 3072, 3072], [40, 2]]
    assert [list(x) for x in end] == [[0, 1, 2], [33, 3072, 3072], [7, 2]]


def test_a_query_as_transformers_makes_it_is_used_as_it_is_and_any_other_is_copied() -> None:
    segments = segments_of(BATCHES["prompts"])
    with KVCache(KVLayout(1, 2, 16, torch.float16, 4, 96), memory="16MiB") as cache:
        query, keys, values = filled(cache, segments, 6)
        exact = blocked.prepare(segments, dtype=keys.dtype, device=CPU)(query, keys, values, Features())
        odd = torch.zeros(6, query.shape[1], 17, dtype=query.dtype)[..., :16].copy_(query)
        by_number = query.transpose(1, 2).contiguous().transpose(1, 2)
        for form in (query, query.contiguous(), odd, by_number):
            attend = varlen.prepare(segments, dtype=keys.dtype, device=CPU, operator=FlashOnACPU())
            torch.testing.assert_close(attend(form, keys, values, Features()), exact, atol=1e-2, rtol=0)
        del keys, values


def test_what_it_cannot_do() -> None:
    def layer(width: int = 64, dtype: torch.dtype = torch.float16, tokens: int = 32) -> torch.Tensor:
        return torch.zeros(4, tokens, 2, width, dtype=dtype)

    query, keys = torch.zeros(4, 3, 64, dtype=torch.float16), layer()
    plain = Features()
    assert varlen.can(query, keys, keys, plain)
    assert varlen.can(query, keys, keys, Features(0.1, 16))
    assert not varlen.can(query, keys, keys, Features(softcap=1.0))
    assert varlen.can(query, keys, keys, Features(sinks=torch.zeros(4)))
    assert not varlen.can(query.float(), layer(dtype=torch.float32), layer(dtype=torch.float32), plain)
    assert not varlen.can(query.bfloat16(), keys, keys, plain)
    assert not varlen.can(query, keys, layer(32), plain)
    wide = layer(256)
    assert varlen.can(query, wide, wide, plain)
    for width in (264, 60):
        assert not varlen.can(query, layer(width), layer(width), plain)
    for odd in (layer(tokens=33)[:, :32], layer(65)[..., :64], layer(128)[..., ::2], layer(72)[..., 4:68]):
        assert not varlen.can(query, odd, keys, plain)
        assert not varlen.can(query, keys, odd, plain)
    many = torch.empty(1 << 11, 1 << 20, 2, 64, dtype=torch.float16, device="meta")
    assert not varlen.can(query, many, many, plain)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("dtype", "asked", "device_has_it", "flash"),
    [
        (torch.float16, Features(), True, True),
        (torch.bfloat16, Features(window=3), True, True),
        (torch.bfloat16, Features(), False, False),
        (torch.float32, Features(), True, False),
        (torch.float16, Features(softcap=1.0), True, False),
        (torch.float16, Features(sinks=torch.zeros(4)), True, True),
    ],
)
def test_which_kernel_a_gpu_gets(
    dtype: torch.dtype, asked: Features, device_has_it: bool, flash: bool, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without numbers, which do not mix with the CPU's, with the real operator's check of its arguments."""
    used: list[str] = []
    for name, kernel in (("varlen", varlen), ("blocked", blocked)):

        def prepare(*args: Any, name: str = name, real: Any = kernel.prepare, **kwargs: Any) -> Any:
            used.append(name)
            return real(*args, **kwargs, **({"operator": nothing_on_the_host} if name == "varlen" else {}))

        monkeypatch.setattr(kernel, "prepare", prepare)
    monkeypatch.setattr(varlen, "available", lambda device: device_has_it)
    segments = segments_of(BATCHES[batch])
    rows = segments[-1].end
    with torch.device("meta"):
        keys, values = torch.empty(2, 4, 96, 2, 16, dtype=dtype).unbind()
        query, new = torch.empty(4, rows, 16, dtype=dtype), torch.empty(2, rows, 16, dtype=dtype)
        sinks = None if asked.sinks is None else torch.empty(4)
    made = AttentionBatch.build(segments, [(keys, values)], choose.prepare)
    made.write(0, new, new)
    out = made.attend(query, keys, values, replace(asked, sinks=sinks))
    assert (out.shape, out.device.type, out.dtype) == ((rows, 4, 16), "meta", dtype)
    assert used == ["varlen" if flash else "blocked"]
    assert made.single_slots.device.type == made.single_positions.device.type == "meta"


def nothing_on_the_host(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """The real operator; on a GPU it refuses a tensor that is elsewhere, without numbers it does not look."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    assert len(tensors) == 6
    assert all(x.device.type == "meta" for x in tensors)
    return torch.ops.aten._flash_attention_forward.default(*args, **kwargs)


@pytest.mark.parametrize("window", [None, 5, 40])
def test_torchs_public_function_is_called_as_the_operator_is(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if varlen._operator(False) is not varlen._varlen_attn:
        pytest.skip("this torch has no seqused_k there")
    assert varlen._operator(True) is torch.ops.aten._flash_attention_forward.default
    flash = FlashOnACPU()

    def varlen_attn(
        *args: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool, seqused_k: torch.Tensor
    ) -> Any:
        assert enable_gqa
        left, right = window_size
        causal = window_size == (-1, 0)  # as torch decides it
        numbers = {"window_size_left": left, "window_size_right": right, "seqused_k": seqused_k}
        return flash(*args, 0.0, causal, False, scale=scale, **numbers)[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    segments = segments_of(BATCHES["mixed"])
    with KVCache(KVLayout(1, 2, 16, torch.float16, 4, 96), memory="16MiB", guard=True, poison=True) as cache:
        query, keys, values = filled(cache, segments, 6)
        out = varlen.prepare(segments, dtype=keys.dtype, device=CPU)(query, keys, values, Features(0.5, window))
        exact = blocked.prepare(segments, dtype=keys.dtype, device=CPU)(query, keys, values, Features(0.5, window))
        torch.testing.assert_close(out, exact, atol=1e-2, rtol=0)
        assert len(flash.calls) == 2
        del keys, values


def test_lists_travel_together() -> None:
    lists = ([3, 1], [], [5])
    assert [x.tolist() for x in placing.place(lists, CPU)] == [[3, 1], [], [5]]
    joined = placing._joined(lists, torch.int32, pin=False)
    parts = placing._split(joined, lists)
    assert [x.tolist() for x in parts] == [[3, 1], [], [5]]
    assert all(x.dtype == torch.int32 and x.untyped_storage().data_ptr() == joined.data_ptr() for x in parts)


def test_a_cpu_has_no_such_operator() -> None:
    assert not varlen.available(CPU)
