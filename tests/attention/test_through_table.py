"""The paged baseline's way to torch's FlashAttention, with a stand-in that computes what its documentation promises."""

import pytest
import torch

from vattention.attention import blocked, choose, paged, through_table
from vattention.attention.base import Features, Segment

HEADS, KV_HEADS, WIDTH, BLOCK = 4, 2, 64, 16
LENGTHS = {0: 40, 2: 33, 3: 7, 4: 50}
CPU = torch.device("cpu")


def varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table
):  # fmt: skip
    """`varlen_attn` with a block table, request by request; lower right causality, NaN behind every length."""
    assert cu_seq_k is None
    assert enable_gqa
    assert {cu_seq_q.dtype, seqused_k.dtype, block_table.dtype} == {torch.int32}
    assert max_k == seqused_k.max()
    out = []
    for request, length in enumerate(seqused_k.tolist()):
        first, last = cu_seq_q[request], cu_seq_q[request + 1]
        rows = int(last - first)
        assert rows <= max_q
        left, right = window_size
        assert right == 0 or rows == 1, "not causal"
        k, v = (side[block_table[request].long()].flatten(0, 1)[None] for side in (key, value))
        attend = blocked.prepare([Segment(0, 0, rows, length)], dtype=query.dtype, device=CPU)
        features = Features(scaling=scale, window=None if left < 0 else left + 1)
        out.append(attend(query[first:last].transpose(0, 1), k, v, features))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 5, 1000])
@pytest.mark.parametrize("rows", [{0: 1, 2: 1, 3: 1}, {0: 3, 2: 33}, {0: 1, 2: 5, 3: 1, 4: 9}], ids=str)
def test_blocks_are_read_through_the_table(rows, window, monkeypatch):
    torch.manual_seed(0)
    columns = 4
    order = torch.randperm(5 * columns, dtype=torch.int32).view(5, columns)
    table = torch.full((5, columns), -1, dtype=torch.int32)
    keys, values = (torch.full((20, BLOCK, KV_HEADS, WIDTH), torch.nan).bfloat16() for _ in range(2))
    for slot, length in LENGTHS.items():
        used = -(-length // BLOCK)
        table[slot, :used] = order[slot, :used]
        for column in range(used):
            for side in (keys, values):
                tokens = min(BLOCK, length - column * BLOCK)
                side[order[slot, column], :tokens] = torch.randn(tokens, KV_HEADS, WIDTH).bfloat16()
    segments, start = [], 0
    for slot, count in rows.items():
        segments.append(Segment(slot, start, count, LENGTHS[slot]))
        start += count
    query = torch.randn(HEADS, start, WIDTH).bfloat16()
    features = Features(scaling=0.2, window=window)
    expected = paged.prepare(segments, dtype=torch.bfloat16, device=CPU, table=table, inner=choose.prepare)(
        query, keys, values, features
    )
    calls = []

    def counted(*args, **more):
        calls.append(args[5])
        return varlen(*args, **more)

    got = through_table.prepare(segments, device=CPU, table=table, operator=counted)(query, keys, values, features)
    torch.testing.assert_close(got.float(), expected.float(), atol=2e-2, rtol=2e-2)
    assert (1 in calls) == (1 in rows.values())
    assert len(calls) == len({count > 1 for count in rows.values()})

    # The paged kernel takes this way wherever there is one.
    monkeypatch.setattr(through_table, "available", lambda device, block_size: block_size == BLOCK)
    monkeypatch.setattr(through_table, "_stock", lambda: counted)
    calls.clear()
    again = paged.prepare(segments, dtype=torch.bfloat16, device=CPU, table=table, inner=choose.prepare)
    assert torch.equal(again(query, keys, values, features), got)
    assert calls
    calls.clear()
    again(query, keys, values, Features(scaling=0.2, softcap=3.0))
    assert not calls, "soft caps are beyond it"


def test_it_needs_a_gpu_and_blocks_of_256():
    assert not through_table.available(CPU, 256)
    assert through_table._stock() is not None, "torch 2.12 and later have it"
