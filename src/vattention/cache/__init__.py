"""Tokens: where they lie, and which pages are behind them."""

from vattention.cache.kv_cache import KVCache
from vattention.cache.layout import KVLayout
from vattention.cache.paged import PagedKVCache
from vattention.cache.stats import CacheStats, SlotStats

Cache = KVCache | PagedKVCache
"""What an engine can keep K and V in."""

__all__ = ["Cache", "CacheStats", "KVCache", "KVLayout", "PagedKVCache", "SlotStats"]
