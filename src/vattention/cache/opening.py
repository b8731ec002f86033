"""Opening a cache: its arguments, and the pool it takes pages from."""

from __future__ import annotations

import operator
from typing import SupportsIndex

import torch

from vattention.cache.layout import KVLayout
from vattention.cache.page_size import check_page_size, choose_page_size
from vattention.errors import ConfigError, VAttentionError
from vattention.memory import Driver, HostDriver, PagePool
from vattention.memory.sizes import parse_size

_DEFAULT_MEMORY = "2GiB"


def open_pool(
    layout: KVLayout,
    *,
    device: str | torch.device,
    memory: str | SupportsIndex | None,
    page_size: SupportsIndex | str | None,
    pool: PagePool | None,
    guard: bool,
) -> tuple[PagePool, Driver | None]:
    """The pool for a cache of this layout, and the driver that is then the cache's own to close.

    Args are those of `KVCache`, and so are the errors. With `pool` that is what comes back, and no driver.
    """
    if not isinstance(layout, KVLayout):
        raise TypeError(f"layout must be a KVLayout, not {type(layout).__name__}")
    if _device_type(device) != "cpu":
        raise ConfigError(f'device {str(device)!r} is not supported yet: use "cpu"')
    if pool is None:
        return _new_pool(layout, memory, page_size, guard)
    if not isinstance(pool, PagePool):
        raise TypeError(f"pool must be a PagePool, not {type(pool).__name__}")
    if memory is not None or page_size is not None:
        raise ConfigError("memory and page_size belong to the pool: leave them out when giving one")
    if guard and not pool.driver.guard:
        raise ConfigError("guard belongs to the driver: give the pool a HostDriver(guard=True)")
    check_page_size(layout, pool.page_size)
    return pool, None


def _new_pool(
    layout: KVLayout, memory: str | SupportsIndex | None, page_size: SupportsIndex | str | None, guard: bool
) -> tuple[PagePool, Driver]:
    budget = parse_size(_DEFAULT_MEMORY if memory is None else memory, "memory")
    wanted = None if page_size is None else parse_size(page_size, "page_size")
    driver = HostDriver(guard=guard)
    try:
        size = wanted or choose_page_size(layout, budget, driver.granularity, driver.mappings.free)
        pool = PagePool(driver, size, budget)
        check_page_size(layout, size)
        return pool, driver
    except VAttentionError:
        driver.close()
        raise


def _device_type(device: str | torch.device) -> str:
    try:
        return torch.device(device).type
    except RuntimeError as error:  # a string that names no device
        raise ConfigError(f"device {device!r}: {error}") from None


def integer(value: SupportsIndex, what: str) -> int:
    """`value` as an int; a bool is none. Raises TypeError, naming `what`."""
    if isinstance(value, bool):
        raise TypeError(f"{what} must be an integer, not a bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an integer, not {type(value).__name__}") from None
