"""What `flex_attention` promises of blocks of keys, from its definition, in float64 on a CPU.

As kernels do, it reads the blocks of keys that it is told, whole, and nothing else: what a mask hides inside a block
still takes part in a product, with weight zero, so that NaN there shows. Where a row has no block at all, the result is
left undefined.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask


def flex_on_a_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    score_mod: Any,
    block_mask: BlockMask,
    scale: float,
    enable_gqa: bool,
    return_aux: AuxRequest | None = None,
) -> Any:
    """`[batch, q_heads, rows, width]` over `[batch, kv_heads, tokens, width]`."""
    assert enable_gqa
    rows, tokens = query.shape[2], key.shape[2]
    assert block_mask.seq_lengths == (rows, tokens)
    q_block, kv_block = block_mask.BLOCK_SIZE
    out = torch.full((*query.shape[:3], value.shape[3]), torch.nan)
    logsumexp = torch.full(query.shape[:3], 12345.0)
    group = query.shape[1] // key.shape[1]
    for batch in range(len(query)):
        for number in range(-(-rows // q_block)):
            count = int(block_mask.kv_num_blocks[batch, 0, number])
            blocks = block_mask.kv_indices[batch, 0, number, :count].tolist()
            if not blocks:
                continue
            places = torch.cat([torch.arange(b * kv_block, min((b + 1) * kv_block, tokens)) for b in blocks])
            own = torch.arange(number * q_block, min((number + 1) * q_block, rows))
            for head in range(query.shape[1]):
                where = (torch.tensor(batch), torch.tensor(head), own[:, None], places[None])
                k, v = key[batch, head // group, places].double(), value[batch, head // group, places].double()
                scores = score_mod(query[batch, head, own].double() @ k.mT * scale, *where)
                scores = scores.masked_fill(~block_mask.mask_mod(*where), float("-inf"))
                out[batch, head, own] = (scores.softmax(-1) @ v).float()
                logsumexp[batch, head, own] = scores.logsumexp(-1).float()
    result = out.to(query.dtype)
    return result if return_aux is None else (result, AuxOutput(lse=logsumexp))
