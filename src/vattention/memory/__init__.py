"""Bytes: virtual addresses, physical pages, and the mapping between them."""

from vattention.memory.cuda import CudaDriver
from vattention.memory.driver import Access, Driver, MappingBudget
from vattention.memory.host import HostDriver
from vattention.memory.pool import PagePool, PoolStats, Run
from vattention.memory.reservation import Reservation

__all__ = [
    "Access",
    "CudaDriver",
    "Driver",
    "HostDriver",
    "MappingBudget",
    "PagePool",
    "PoolStats",
    "Reservation",
    "Run",
]
