"""The attention parts of `make gpu-check`, tiny and on the CPU, with stand-ins for the libraries of a GPU."""

import json

import pytest
import torch

from vattention.attention.base import Features
from vattention.attention.blocked import prepare as blocked
from vattention.bench.gpu import attention, sides
from vattention.bench.gpu.report import Setting, plot

CPU = Setting(torch.device("cpu"), seconds=60, tiny=True)


@pytest.mark.parametrize("part", [attention.prefill, attention.decode])
def test_a_part_runs_and_says_what_it_measured(part, tmp_path):
    report = part(CPU)
    names = {"vattention, contiguous", "vattention, paged"}
    for case in report.samples["cases"]:
        assert set(case["seconds"]) == names
        assert not case["missing"]
        assert all(len(seconds) >= 3 and min(seconds) > 0 for seconds in case["seconds"].values())
        assert case["kv_bytes"] == 2 * case["requests"] * case["tokens"] * 2 * 64 * 2
    assert len(report.samples["cases"]) == 2
    assert report.samples["left_out"] == []
    assert "paged/cont. vattention" in report.text
    assert "tiny" in report.text
    plot(tmp_path / "x.png", report.panels, title="tiny")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(report.samples)


def test_what_there_is_no_time_for_is_named():
    report = attention.prefill(Setting(torch.device("cpu"), seconds=0.0, tiny=True))
    assert report.samples["cases"] == []
    assert report.samples["left_out"] == ["tiny 1 x 48", "tiny 1 x 80"]
    assert "left out for lack of time: tiny 1 x 48" in report.text


# -- libraries: what they promise, over slots and over tables, by way of our own definition of attention


def over(query, keys, values, lengths, *, starts=None, rows=1, table=None, slots=None):
    """`[rows of all, heads, width]`; keys `[slots, tokens, heads, width]`, or blocks behind a table."""
    out = []
    for request, length in enumerate(lengths):
        if table is not None:
            k, v = (side[table[request].long()].flatten(0, 1)[None] for side in (keys, values))
        else:
            k, v = keys[request : request + 1], values[request : request + 1]
        segment = sides.Segment(0, 0, rows, int(length))
        part = query[request * rows : (request + 1) * rows].transpose(0, 1)
        attend = blocked([segment], dtype=query.dtype, device=query.device)
        out.append(attend(part, k[:, :length], v[:, :length], Features()))
    return torch.cat(out)


def varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa, seqused_k, block_table=None
):
    assert enable_gqa
    assert cu_seq_q.dtype == seqused_k.dtype == torch.int32
    assert window_size == ((-1, 0) if max_q > 1 else (-1, -1))
    rows = int(cu_seq_q[1])
    assert rows == max_q
    if block_table is not None:
        assert cu_seq_k is None
        assert block_table.dtype == torch.int32
        return over(query, key, value, seqused_k, rows=rows, table=block_table)
    padded = int(cu_seq_k[1])
    slots = (side.unflatten(0, (-1, padded)) for side in (key, value))
    return over(query, *slots, seqused_k, rows=rows)


def with_kvcache(q, k_cache, v_cache, *, cache_seqlens, causal, block_table=None, page_table=None):
    assert causal
    assert cache_seqlens.dtype == torch.int32
    table = page_table if block_table is None else block_table
    out = over(q.flatten(0, 1), k_cache, v_cache, cache_seqlens, rows=q.shape[1], table=table)
    return out.view(q.shape)


class FlashInfer:
    """The module."""

    def single_prefill_with_kv_cache(self, q, k, v, *, causal):
        assert causal
        return over(q, k[None], v[None], [len(k)], rows=len(q))

    def BatchDecodeWithPagedKVCacheWrapper(self, workspace, layout, *, use_tensor_cores):
        assert (layout, use_tensor_cores) == ("NHD", True)
        return Wrapper(1)

    def BatchPrefillWithPagedKVCacheWrapper(self, workspace, layout):
        return Wrapper(2)


class Wrapper:
    def __init__(self, kind):
        self.kind = kind

    def plan(self, *args, q_data_type, kv_data_type, causal=None):
        queries = None
        if self.kind == 2:
            assert causal
            queries, *args = args
        starts, pages, last, *_, size = args
        assert starts[-1] == len(pages)
        self.rows = 1 if queries is None else int(queries[1])
        self.table = pages.view(len(last), -1)
        self.lengths = (self.table.shape[1] - 1) * size + last
        self.size = size

    def run(self, q, kv):
        keys, values = kv
        assert keys.shape[1] == self.size
        return over(q, keys, values, self.lengths, rows=self.rows, table=self.table)


LIBRARIES = {
    "torch, contiguous": lambda data: sides._torch_contiguous(data, varlen),
    "torch, paged": lambda data: sides._torch_paged(data, varlen),
    **sides.flash_attention("FlashAttention-2", with_kvcache),
    **sides.flash_attention("FlashAttention-3", with_kvcache),
    **sides.flashinfer(FlashInfer()),
}


@pytest.mark.parametrize("part", [attention.prefill, attention.decode])
def test_every_library_is_asked_for_the_same_attention(part, monkeypatch):
    monkeypatch.setattr(sides, "_BLOCKS", {**sides._BLOCKS, "torch": 32, "FlashAttention-2": 32})
    monkeypatch.setattr(sides, "_WORKSPACE", 1)
    report = part(CPU, {"vattention, contiguous": sides.ours, **LIBRARIES})
    for case in report.samples["cases"]:
        assert case["missing"] == {}
        assert set(case["seconds"]) == {"vattention, contiguous", *LIBRARIES}
    assert "paged/cont. FlashInfer" in report.text


def test_a_library_that_computes_something_else_is_not_timed():
    def wrong(data):
        compute = sides.ours(data)
        return lambda layer: 1.1 * compute(layer)

    def broken(data):
        raise TypeError("no such argument")

    report = attention.decode(CPU, {"vattention, contiguous": sides.ours, "wrong": wrong, "broken": broken})
    (case, _) = report.samples["cases"]
    assert set(case["seconds"]) == {"vattention, contiguous"}
    assert "off" in case["missing"]["wrong"]
    assert case["missing"]["broken"] == "TypeError: no such argument"
    assert "broken: left out: TypeError" in report.text


def test_what_is_installed_for_a_gpu_is_found(monkeypatch):
    monkeypatch.setattr(sides.importlib.util, "find_spec", lambda name: None)
    assert {"vattention, contiguous", "gathered, paged"} <= set(sides.sides(torch.device("cuda")))
