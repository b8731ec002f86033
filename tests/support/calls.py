"""A right call of every method of a cache, to be made at the wrong moment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from vattention.cache import KVCache, KVLayout

PAGE = os.sysconf("SC_PAGESIZE")
PAGES = 80
LAYOUT = KVLayout(2, 2, 48, torch.float32, 4, 100)  # 4 streams of 384 bytes a token

HOLDER_METHODS = {"reclaim", "reclaimable"}
"""For the pool, which may ask a closed cache too."""


def everything(cache: KVCache, slot: int) -> dict[str, Callable[[], Any]]:
    """Method name -> a call that is right while `slot` is live."""
    return {
        "alloc": cache.alloc,
        "free": lambda: cache.free(slot),
        "fork": lambda: cache.fork(slot),
        "alloc_range": lambda: cache.alloc_range(1),
        "reorder": lambda: cache.reorder({slot: slot}),
        "pad": lambda: cache.pad({}),
        "length": lambda: cache.length(slot),
        "step": lambda: cache.step({slot: 5}),
        "fits": lambda: cache.fits({slot: 5}, [3]),
        "prefetch": lambda: cache.prefetch({slot: 50}),
        "wait": cache.wait,
        "capacity": cache.capacity,
        "layer": lambda: cache.layer(0),
        "trim": cache.trim,
        "stats": cache.stats,
        "slots": cache.slots,
        "watch": lambda: cache.watch(0),
    }
