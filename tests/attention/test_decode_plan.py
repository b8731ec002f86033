"""Decodes whose numbers change in place: one plan over many passes, against kernels prepared for each of them."""

import pytest
import torch

from support.flash import FlashOnACPU
from vattention.attention import blocked, choose, varlen
from vattention.attention.base import Features, Segment
from vattention.attention.decode_batch import DecodeBatch
from vattention.attention.decode_plan import DecodePlan, DecodeRows
from vattention.cache import KVCache, KVLayout
from vattention.errors import InvalidRequest, UnsupportedModel

CPU = torch.device("cpu")
PASSES = [([2, 0, 3], [17, 40, 1]), ([2, 0, 3], [18, 41, 2]), ([1, 2], [96, 5]), ([3, 0, 1], [1, 1, 1])]


@pytest.mark.parametrize("window", [None, 1, 17, 40, 500])
def test_one_plan_for_many_passes(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    asked = Features(0.5, window)
    with KVCache(KVLayout(1, 2, 16, torch.float16, 4, 96), memory="16MiB", guard=True, poison=True) as cache:
        for _ in range(4):
            cache.alloc()
        keys, values = cache.layer(0)
        rows = DecodeRows([0] * 3, [1] * 3, bound=96, device=CPU)
        plan = DecodePlan(rows, varlen.decode(rows, operator=FlashOnACPU()))
        batch, addresses = DecodeBatch([(keys, values)], 3, plan), None
        for slots, lengths in PASSES:
            cache.step(dict(zip(slots, lengths, strict=True)))
            for slot, length in zip(slots, lengths, strict=True):
                for view in (keys, values):
                    view[slot, :length] = torch.randn((length, 2, 16), generator=generator).half()
            query, new = (torch.randn(heads, 3, 16, generator=generator).half() for heads in (6, 2))
            batch.update([0] * len(slots), slots, lengths)
            batch.begin()
            out = batch.compute(0, query[None], new[None], new[None], asked)[0]
            for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
                assert torch.equal(keys[slot, length - 1], new[:, row])
                alone = blocked.prepare([Segment(slot, 0, 1, length)], dtype=keys.dtype, device=CPU)
                expected = alone(query[:, row : row + 1], keys, values, asked)[0]
                torch.testing.assert_close(out[row], expected, atol=1e-2, rtol=0)
            tensors = [rows.slots_there, *rows.keep(("varlen", keys.shape[1], window), fail)]
            addresses = addresses or [tensor.data_ptr() for tensor in tensors]
            assert addresses == [tensor.data_ptr() for tensor in tensors]
        del keys, values


def fail(*_: object) -> list[list[int]]:
    raise AssertionError("made already")


def test_what_kernels_derive_follows_each_update() -> None:
    rows, seen = DecodeRows([4, 5], [7, 8], bound=10, device=CPU), []
    (sums,) = rows.keep("sums", lambda slots, lengths: [[a + b for a, b in zip(slots, lengths, strict=True)]])
    assert rows.keep("sums", fail)[0] is sums
    rows.watch("seen", lambda slots, lengths: seen.append((slots, lengths)))
    rows.watch("seen", fail)
    assert (sums.tolist(), sums.dtype, len(rows)) == ([11, 13], torch.int32, 2)
    rows.update([1, 0], [10, 1])
    assert sums.tolist() == [11, 1]
    assert seen == [((4, 5), (7, 8)), ((1, 0), (10, 1))]
    assert rows.slots_there.tolist() == [1, 0]
    for slots, lengths in (([1], [1]), ([1, 2], [1]), ([1, 2], [1, 11]), ([1, 2], [0, 1])):
        with pytest.raises(InvalidRequest, match="make another plan"):
            rows.update(slots, lengths)
    assert (sums.tolist(), rows.lengths) == ([11, 1], (10, 1))


def test_a_layer_that_cannot_be_captured_says_so() -> None:
    plan = choose.decode_plan(2, bound=8, dtype=torch.float16, device=CPU)
    keys = torch.zeros(4, 8, 2, 16, dtype=torch.float16)
    with pytest.raises(UnsupportedModel, match="cannot be captured"):
        plan.attend(torch.zeros(2, 2, 16).half(), keys, keys, Features())
