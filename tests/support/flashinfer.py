"""What FlashInfer promises of the two things that are used of it, from its documentation, in float64 on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class FlashInferOnACPU:
    """Stands in for the module.

    Attributes:
        prompts: query rows and tokens of each call for a prompt.
        wrappers: every one that was made.
        plans: how often any of them was planned.
    """

    prompts: list[tuple[int, int]] = field(default_factory=list)
    wrappers: list[Wrapper] = field(default_factory=list)
    plans: int = 0

    def BatchDecodeWithPagedKVCacheWrapper(self, *args: Any, **kwargs: Any) -> Wrapper:
        """One more of them."""
        self.wrappers.append(Wrapper(self, *args, **kwargs))
        return self.wrappers[-1]

    def single_prefill_with_kv_cache(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        sm_scale: float | None,
        window_left: int,
        logits_soft_cap: float | None,
    ) -> torch.Tensor:
        """`[rows, q_heads, width]` over `[tokens, kv_heads, width]`."""
        assert causal
        assert q.is_contiguous()
        self.prompts.append((len(q), len(k)))
        return attention(q, k, v, sm_scale, window_left, logits_soft_cap)


class Wrapper:
    """`BatchDecodeWithPagedKVCacheWrapper`: `run` reads what `plan` put down, in its buffers where it has any."""

    def __init__(
        self,
        library: FlashInferOnACPU,
        workspace: torch.Tensor,
        layout: str,
        *,
        use_tensor_cores: bool,
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:
        assert layout == "NHD"
        assert workspace.dtype == torch.uint8
        self.library, self.tensor_cores, self.captured = library, use_tensor_cores, use_cuda_graph
        self.buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        assert use_cuda_graph == all(buffer is not None for buffer in self.buffers)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        q_heads: int,
        kv_heads: int,
        width: int,
        page_size: int,
        *,
        sm_scale: float | None,
        window_left: int,
        logits_soft_cap: float | None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        """Remember everything."""
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert indptr[-1] == len(indices)
        assert ((last_page_len >= 1) & (last_page_len <= page_size)).all()
        numbers = (indptr, indices, last_page_len)
        if self.captured:
            for buffer, new in zip(self.buffers, numbers, strict=True):
                assert buffer is not None
                assert len(new) <= len(buffer)
                assert new is indices or len(new) == len(buffer), "the batch size is fixed"
                buffer[: len(new)] = new
        else:
            self.buffers = tuple(new.clone() for new in numbers)
        self.kind = (q_heads, kv_heads, width, page_size)
        self.asked = (sm_scale, window_left, logits_soft_cap)
        self.dtypes = (q_data_type, kv_data_type)
        self.library.plans += 1

    def run(self, q: torch.Tensor, paged: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """`[requests, q_heads, width]` over `[pages, page_size, kv_heads, width]` each."""
        keys, values = paged
        q_heads, kv_heads, width, page_size = self.kind
        assert self.dtypes == (q.dtype, keys.dtype)
        assert keys.shape[1:] == values.shape[1:] == (page_size, kv_heads, width)
        assert keys.stride() == values.stride(), "the library refuses others"
        indptr, indices, last = (buffer.tolist() for buffer in self.buffers if buffer is not None)
        assert q.shape == (len(last), q_heads, width)
        out = torch.empty_like(q)
        for request, rest in enumerate(last):
            pages = indices[indptr[request] : indptr[request + 1]]
            length = (len(pages) - 1) * page_size + rest
            # Page by page, so that nothing behind the last token is touched.
            counts = [page_size] * (len(pages) - 1) + [rest]
            k, v = (
                torch.cat([side[page, :count] for page, count in zip(pages, counts, strict=True)]) for side in paged
            )
            assert len(k) == length
            out[request] = attention(q[request : request + 1], k, v, *self.asked)[0]
        return out


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, left: int, softcap: float | None
) -> torch.Tensor:
    """The last `len(q)` of `len(k)` tokens."""
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[2] in (64, 128, 256)
    rows, group = len(q), q.shape[1] // k.shape[1]
    own = torch.arange(rows)[:, None] + len(k) - rows
    places = torch.arange(len(k))
    hidden = places > own
    if left >= 0:
        hidden |= places < own - left
    keys, values = (side.double().repeat_interleave(group, 1).transpose(0, 1) for side in (k, v))
    scores = q.double().transpose(0, 1) @ keys.mT * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1).to(q.dtype)
