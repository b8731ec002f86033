"""A driver whose physical memory comes in whole handles, as a device's does, on host memory.

One create makes one page, wherever the driver likes; handles are mapped, unmapped and released whole; every page is a
mapping of its own. What a device driver would refuse or leave undefined fails the test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from vattention.memory import Access, HostDriver, MappingBudget


class DeviceDriver:
    """Implements `Driver`, not linear.

    Attributes:
        mapped: page of memory (its address) -> handle behind it.
        accessible: addresses of pages that `set_access` made usable.
    """

    linear = False
    guard = False

    def __init__(self, page_size: int, mappings: int | None = None) -> None:
        self.granularity = page_size
        self.mappings = MappingBudget(mappings)
        self.host = HostDriver()
        self.handles: set[int] = set()
        self.mapped: dict[int, int] = {}
        self.accessible: set[int] = set()
        self._reserved: dict[int, int] = {}

    @property
    def physical_bytes(self) -> int:
        return self.host.physical_bytes

    def headroom(self) -> int | None:
        return self.host.headroom()

    def reserve(self, size: int) -> int:
        address = self.host.reserve(size)
        self._reserved[address] = size
        return address

    def free(self, address: int, size: int) -> None:
        assert self._reserved.pop(address) == size
        assert not any(address <= page < address + size for page in self.mapped), "freed with pages mapped"
        self.host.free(address, size)

    def create(self, size: int, at: int | None = None, room: int = 0) -> int:
        assert size == self.granularity, "one create makes one page"
        assert at is None, "nobody chooses where a device puts memory"
        handle = self.host.create(size)
        self.handles.add(handle)
        return handle

    def release(self, handle: int, size: int) -> None:
        assert size == self.granularity, "released whole"
        assert handle not in self.mapped.values(), "released while mapped"
        self.handles.remove(handle)
        self.host.release(handle, size)

    def map(self, address: int, handle: int, size: int) -> None:
        pages = self._pages(address, size)
        handles = range(handle, handle + size, self.granularity)
        assert self.handles.issuperset(handles), "mapped what was never created, or was released"
        self.host.map(address, handle, size)
        self.mapped.update(zip(pages, handles, strict=True))
        self.accessible.difference_update(pages)

    def unmap(self, address: int, size: int) -> None:
        pages = self._pages(address, size)
        self.host.unmap(address, size)
        for page in pages:
            self.mapped.pop(page, None)
        self.accessible.difference_update(pages)

    def set_access(self, address: int, size: int, access: Access) -> None:
        pages = self._pages(address, size)
        assert all(page in self.mapped for page in pages), "access to a range that is not fully mapped"
        self.host.set_access(address, size, access)
        self.accessible.update(pages)

    def tensor(self, address: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self.host.tensor(address, shape, strides, dtype)

    def fence(self) -> None: ...

    def close(self) -> None:
        self.host.close()

    @property
    def closed(self) -> bool:
        return self.host.closed

    def places(self) -> Counter[int]:
        """How often each handle is mapped."""
        return Counter(self.mapped.values())

    def _pages(self, address: int, size: int) -> range:
        assert any(start <= address and address + size <= start + all_ for start, all_ in self._reserved.items())
        assert size > 0
        assert size % self.granularity == 0
        return range(address, address + size, self.granularity)
