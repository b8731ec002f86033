"""Caches for other people's engines."""

from vattention.integrations.transformers_cache import VirtualCache

__all__ = ["VirtualCache"]
