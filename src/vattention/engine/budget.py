"""How much of a GPU is left for K and V, once everything else that takes memory has taken it.

In this order: the weights are there; the cache has its addresses, which cost nothing; graphs are captured and hold
their memory; the largest pass is run once, to see what it takes; and what is then free, less that, is the budget. Pages
come on demand, so a budget that was too large until then has harmed nobody.
"""

from __future__ import annotations

import torch

from vattention.attention.base import NAME, Features
from vattention.cache import KVCache
from vattention.cache.opening import default_budget
from vattention.engine import sampler
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import ConfigError
from vattention.memory.sizes import format_size


class _NoCache:
    """Stands in for a batch: attention is zeros, and no page is touched."""

    def compute(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, features: Features
    ) -> torch.Tensor:
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))


def check_share(share: float | None, device: torch.device, *, given: bool) -> None:
    """Raises ConfigError for a `memory_utilization` that means nothing; `given`: the budget itself was given."""
    if share is None:
        return
    if device.type != "cuda":
        raise ConfigError("memory_utilization is for a GPU: give kv_cache_memory")
    if given:
        raise ConfigError("kv_cache_memory and memory_utilization both say how much: leave one out")


@torch.inference_mode()
def activation_bytes(model: torch.nn.Module, rows: int, requests: int) -> int:
    """Bytes that torch takes from the GPU for the largest pass: `rows` rows, of which `requests` are sampled."""
    device = next(model.parameters()).device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    numbers = torch.zeros((1, rows), dtype=torch.int64, device=device)
    keep = torch.zeros(requests, dtype=torch.int64, device=device)
    output = model(input_ids=numbers, position_ids=numbers, logits_to_keep=keep, use_cache=False, **{NAME: _NoCache()})
    params = SamplingParams(temperature=1)
    sampler.sample(torch.zeros_like(output.logits[0]), [sampler.Row(params, 0, 0)] * requests)
    del output, numbers, keep
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    return max(0, int(peak) - int(before))


def settle_budget(cache: KVCache, share: float | None, activations: int) -> None:
    """Lower the budget of a cache that got a provisional one, for lack of a size, to what is left.

    Args:
        share: `memory_utilization`.
        activations: bytes of the largest pass.

    Raises:
        ConfigError: nothing is left.
    """
    pool = cache.pool
    with pool.lock:  # in which nobody creates pages
        left = default_budget(pool.driver, share) + pool.stats().created * pool.page_size - activations
    if left < pool.page_size:
        raise ConfigError(
            f"weights, graphs and {format_size(activations)} for the largest pass leave no memory for K and V: lower"
            " max_num_batched_tokens, raise memory_utilization, or pass cuda_graphs=False"
        )
    pool.resize(min(left, pool.budget * pool.page_size))
