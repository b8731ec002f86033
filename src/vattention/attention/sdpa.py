"""torch's own scaled_dot_product_attention on views of the slots: no copy of K or V, no padding.

Three cases, one call a request:
- one new token: the queries that share a KV head become rows of one small query, so every K and V byte is read once
  for the whole group;
- a prompt with nothing cached before it: `is_causal=True`;
- a chunk over cached tokens: `is_causal` would be wrong, as torch aligns it to the *upper left* corner (row i sees
  keys 0..i), where row i of a chunk must see keys 0..cached+i. An additive mask says so; it is built once a batch.

Grouped queries: KV heads are the batch dimension and K, V are expanded over the group with stride 0.

Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from vattention.attention.base import Attend, Segment


def prepare(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
    """The `Kernel` of this file: masks for the chunks among `segments`, and the function each layer calls."""
    work = [(segment, _mask(segment, dtype, device)) for segment in segments]

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None) -> torch.Tensor:
        rows, head_dim, kv_heads = query.shape[1], query.shape[2], keys.shape[2]
        grouped = query.unflatten(0, (kv_heads, -1))  # [kv_heads, group, rows, head_dim], a view
        out = query.new_empty((rows, kv_heads, grouped.shape[1], head_dim))
        for segment, mask in work:
            # Never past `length`: what is there may be unmapped or belong to nobody.
            k = keys[segment.slot, : segment.length].transpose(0, 1)  # [kv_heads, length, head_dim], a view
            v = values[segment.slot, : segment.length].transpose(0, 1)
            if segment.rows == 1:
                q = grouped[:, :, segment.start]  # [kv_heads, group, head_dim]
                out[segment.start] = scaled_dot_product_attention(q[None], k[None], v[None], scale=scaling)[0]
                continue
            q = grouped[:, :, segment.start : segment.end]
            k = k[:, None].expand(-1, q.shape[1], -1, -1)
            v = v[:, None].expand(-1, q.shape[1], -1, -1)
            part = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
            out[segment.start : segment.end] = part.permute(2, 0, 1, 3)
        return out.flatten(1, 2)

    return attend


def _mask(segment: Segment, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """0 where row i of the chunk may look (keys 0..cached+i) and -inf elsewhere, `[rows, length]`; None if not needed.

    In the dtype of the query: torch converts a boolean mask on every call, which would be once a layer.
    """
    if segment.rows == 1 or segment.cached == 0:
        return None
    mask = torch.full((segment.rows, segment.length), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(segment.cached + 1)
