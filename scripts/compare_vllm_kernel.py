"""vLLM's decode attention on the CPU against ours over the same block tables. Run by vLLM's environment:

    PYTHONPATH=src ENVIRONMENT/bin/python scripts/compare_vllm_kernel.py

Both are called through their Python doors, one call a layer, in turns, over more layers than the processor's caches
hold; ours with K and V of a block lying token by token and head by head. vLLM's scheduler metadata is made once and not
measured. What each computes is compared too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vattention.attention import cpu_decode
from vattention.attention.base import Features, Segment

BYTES = 128 << 20
REQUESTS, ROUNDS = 8, 9
DTYPE = torch.bfloat16
ERROR = 0.01


def main() -> None:
    """Every shape, length and block size; a line each."""
    current_platform.import_kernels()
    print(f"bfloat16, {REQUESTS} requests, {torch.get_num_threads()} threads; microseconds a layer, medians")
    for shape in ((9, 3, 64), (32, 8, 128)):
        for tokens in (512, 2048, 4096):
            for size in (16, 128, 256):
                print(compare(*shape, tokens, size), flush=True)


@torch.inference_mode()
def compare(q_heads: int, kv_heads: int, width: int, tokens: int, size: int) -> str:
    """One line of the table."""
    isa = _get_attn_isa(DTYPE, size, width)
    columns = -(-tokens // size)
    blocks = REQUESTS * columns
    table = torch.randperm(blocks, dtype=torch.int32).view(REQUESTS, columns)
    positions = torch.arange(tokens)
    places = (table[:, positions // size].long() * size + positions % size).flatten()
    keys, values = torch.randn(2, REQUESTS * tokens, kv_heads, width).to(DTYPE)
    query = torch.randn(REQUESTS, q_heads, width).to(DTYPE)
    layers = max(2, BYTES // (keys.nbytes + values.nbytes))

    by_token, by_head, theirs = [], [], []
    for _ in range(layers):
        by_token.append([_filled(blocks, size, side, places) for side in (keys, values)])
        by_head.append([side.transpose(1, 2).contiguous().transpose(1, 2) for side in by_token[-1]])
        k, v = torch.zeros(blocks, kv_heads, 2 * size, width, dtype=DTYPE).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, k, v, places, isa)
        theirs.append((k, v))

    lengths = torch.full((REQUESTS,), tokens, dtype=torch.int32)
    starts = torch.arange(REQUESTS + 1, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        REQUESTS, q_heads, kv_heads, width, lengths, DTYPE, starts, True, -1, isa, True
    )
    own = cpu_decode.prepare([Segment(i, i, 1, tokens) for i in range(REQUESTS)], table)
    assert cpu_decode.can(query, *by_token[0], paged=True)
    outputs = {name: torch.empty(REQUESTS, q_heads, width, dtype=DTYPE) for name in ("vllm", "by token", "by head")}

    def vllm() -> None:
        for k, v in theirs:
            ops.cpu_attention_with_kv_cache(
                query, k, v, outputs["vllm"], starts, lengths, width**-0.5, True, None, -1, table, 0.0, plan, None
            )

    def ours(name: str, views: Sequence[Any]) -> None:
        for k, v in views:
            own(query.transpose(0, 1), k, v, Features(), outputs[name])

    sides: dict[str, Callable[[], None]] = {
        "vllm": vllm,
        "by token": partial(ours, "by token", by_token),
        "by head": partial(ours, "by head", by_head),
    }
    for side in sides.values():
        side()
    for out in outputs.values():
        assert (out.float() - outputs["vllm"].float()).abs().max() < ERROR
    rounds = [{name: _seconds(side) / layers for name, side in sides.items()} for _ in range(ROUNDS)]
    cells = [f"{q_heads}/{kv_heads}x{width}", f"{tokens:5}", f"blocks of {size:3} ({isa})"]
    for name in sides:
        took = statistics.median(each[name] for each in rounds)
        ratio = statistics.median(each["vllm"] / each[name] for each in rounds)
        cells.append(f"{name} {took * 1e6:6.0f} ({ratio:.2f}x)")
    return "  ".join(cells)


def _filled(blocks: int, size: int, side: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    pool = side.new_empty((blocks, size, *side.shape[1:]))
    pool.flatten(0, 1).index_copy_(0, places, side)
    return pool


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
