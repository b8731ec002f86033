"""Tokens: where they lie, and which pages are behind them."""

from vattention.cache.kv_cache import KVCache
from vattention.cache.layout import KVLayout
from vattention.cache.stats import CacheStats

__all__ = ["CacheStats", "KVCache", "KVLayout"]
