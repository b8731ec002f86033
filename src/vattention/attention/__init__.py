"""Kernels: what turns a query and a slot's K and V into attention, and the metadata that tells it where to look.

`register()` makes `attn_implementation="vattention"` known to transformers; see `attention.generate`.
"""

from __future__ import annotations


def register() -> None:
    """Make `attn_implementation="vattention"` known to transformers, for `model.generate()`. Idempotent."""
    from vattention.attention import generate  # here, so that importing a kernel does not depend on all of them

    generate.register()
