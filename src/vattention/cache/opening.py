"""Opening a cache: its arguments, and the pool it takes pages from."""

from __future__ import annotations

import operator
from typing import SupportsIndex

import torch

from vattention.cache.choosing import Place
from vattention.cache.layout import KVLayout
from vattention.cache.page_size import check_page_size, choose_page_size
from vattention.errors import ConfigError, VAttentionError
from vattention.memory import CudaDriver, Driver, HostDriver, PagePool
from vattention.memory.sizes import format_size, parse_size

_DEFAULT_MEMORY = "2GiB"
_DEFAULT_UTILIZATION = 0.9
_AHEAD = 64  # pages that a device's pool creates ahead of need, but no more than a sixteenth of its budget


def open_pool(
    layout: KVLayout,
    *,
    device: str | torch.device,
    memory: str | SupportsIndex | None,
    memory_utilization: float | None,
    page_size: SupportsIndex | str | None,
    pool: PagePool | None,
    guard: bool,
) -> tuple[PagePool, Driver | None]:
    """The pool for a cache of this layout, and the driver that is then the cache's own to close.

    Args are those of `KVCache`, and so are the errors. With `pool` that is what comes back, and no driver.
    """
    if not isinstance(layout, KVLayout):
        raise TypeError(f"layout must be a KVLayout, not {type(layout).__name__}")
    place = _device(device)
    if pool is None:
        if memory is not None and memory_utilization is not None:
            raise ConfigError("memory and memory_utilization both say how much: leave one out")
        return _new_pool(layout, place, memory, memory_utilization, page_size, guard)
    if not isinstance(pool, PagePool):
        raise TypeError(f"pool must be a PagePool, not {type(pool).__name__}")
    if memory is not None or memory_utilization is not None or page_size is not None:
        raise ConfigError("memory and page_size belong to the pool: leave them out when giving one")
    if guard and not pool.driver.guard:
        raise ConfigError("guard belongs to the driver: give the pool a HostDriver(guard=True)")
    check_page_size(layout, pool.page_size)
    return pool, None


def _new_pool(
    layout: KVLayout,
    device: torch.device,
    memory: str | SupportsIndex | None,
    memory_utilization: float | None,
    page_size: SupportsIndex | str | None,
    guard: bool,
) -> tuple[PagePool, Driver]:
    budget = None if memory is None else parse_size(memory, "memory")
    wanted = None if page_size is None else parse_size(page_size, "page_size")
    driver = _open_driver(device, guard)
    try:
        if budget is None:
            budget = default_budget(driver, memory_utilization)
        size = wanted or choose_page_size(layout, budget, driver.granularity, driver.mappings.free)
        pool = PagePool(driver, size, budget, ahead=min(_AHEAD, budget // size // 16))
        check_page_size(layout, size)
        return pool, driver
    except (VAttentionError, TypeError):
        driver.close()
        raise


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:  # a string that names no device
        raise ConfigError(f"device {device!r}: {error}") from None


def _open_driver(device: torch.device, guard: bool) -> Driver:
    if device.type == "cpu":
        return HostDriver(guard=guard)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {str(device)!r}: torch finds no CUDA device, use device='cpu'")
        return CudaDriver(torch.cuda.current_device() if device.index is None else device.index)
    raise ConfigError(f"device {str(device)!r} is not supported: use 'cpu' or 'cuda'")


def look(device: torch.device, budget: int | None, memory_utilization: float | None = None) -> Place:
    """What a cache on `device` would find there; `budget` as `memory` of `KVCache`.

    Raises: as opening a cache there.
    """
    driver = _open_driver(device, guard=False)
    try:
        if budget is None:
            budget = default_budget(driver, memory_utilization)
        return Place(device.type, budget, driver.granularity, driver.mappings.free)
    finally:
        driver.close()


def default_budget(driver: Driver, memory_utilization: float | None) -> int:
    """Bytes for a cache of which nobody says how large it is.

    Of a device: what keeps `memory_utilization` of its memory in use, so what is free now less the rest. Weights and
    graphs have to be there already. Of a host, where others live too: 2 GiB.

    Raises:
        ConfigError: not a share, given for a host, or nothing is left.
    """
    if not isinstance(driver, CudaDriver):
        if memory_utilization is not None:
            raise ConfigError("memory_utilization is for devices: on the host give memory")
        return parse_size(_DEFAULT_MEMORY)
    share = _DEFAULT_UTILIZATION if memory_utilization is None else memory_utilization
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"memory_utilization must be a number, not {type(share).__name__}")
    if not 0 < share <= 1:
        raise ConfigError(f"memory_utilization {share} is outside 0..1")
    free, total = driver.memory()
    budget = free - int((1 - share) * total)
    if budget < driver.granularity:
        raise ConfigError(
            f"{format_size(free)} of {format_size(total)} are free on the device, which leaves nothing at"
            f" memory_utilization={share}: free some, or raise it"
        )
    return budget


def integer(value: SupportsIndex, what: str) -> int:
    """`value` as an int; a bool is none. Raises TypeError, naming `what`."""
    if isinstance(value, bool):
        raise TypeError(f"{what} must be an integer, not a bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an integer, not {type(value).__name__}") from None
