"""Device memory as a driver: the virtual memory calls of the CUDA driver API, through cuda-bindings.

Written against https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html and run on an emulation of it; see
docs/gpu.md for what has run on a device. The rules that shape it: handles are mapped, unmapped and released whole;
nothing maps over a mapping; one unmap or set_access may cover many whole mappings but no hole; none of it waits for
work on the device.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, SupportsIndex

import torch

from vattention.errors import ConfigError, DriverError, InvalidRequest
from vattention.memory.cuda_calls import INVALID_VALUE, CudaCalls
from vattention.memory.cuda_mapped import MappedPieces, Piece, stretches
from vattention.memory.driver import Access, MappingBudget

_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING: the cheapest event
_STREAM_CAPTURE = 900  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED


class _Handle(NamedTuple):
    """What cuMemCreate gave, and its size in bytes."""

    value: int
    size: int


class _Range:
    """One reservation, and the storage that every tensor over it shares."""

    def __init__(self, address: int, size: int, device: torch.device) -> None:
        self.address, self.size = address, size
        # Looks at no address and asks nothing about the pointer, so it may lie over addresses with nothing behind them.
        self.storage = torch._C._construct_storage_from_data_pointer(address, device, size)

    @property
    def in_use(self) -> bool:
        """Whether a tensor lies over it."""
        return bool(torch._C._storage_Use_Count(self.storage._cdata) > 1)


_lingering: list[tuple[CudaDriver, _Range]] = []
"""Ranges that were freed while tensors still lay over them, by driver, which may be closed since."""
_lingering_lock = threading.RLock()  # addresses that are freed twice may be somebody else's the second time


def _let_go() -> None:
    """Free the addresses of ranges whose last tensor is gone. What fails stays, to be tried again the next time."""
    with _lingering_lock:
        for driver, range_ in list(_lingering):
            if not range_.in_use and driver.usable:
                with suppress(DriverError), driver.on_device():
                    driver.calls("cuMemAddressFree", range_.address, range_.size)
                    _lingering.remove((driver, range_))


class CudaDriver:
    """Implements `Driver` on one CUDA device.

    Args:
        device: the device's number, as CUDA counts them.
        peers: further devices that may read and write what is mapped.
        tensor_device: where torch is told that the addresses are; the device itself by default.
        mappings: mappings allowed at once, where the device has a limit; None where none is known.

    Raises:
        ConfigError: no cuda-bindings, no CUDA driver, no such device, or one without virtual memory management.
        DriverError: the device does not work.
    """

    linear = False
    guard = True  # an unmapped address faults, always

    def __init__(
        self,
        device: SupportsIndex = 0,
        *,
        peers: Sequence[int] = (),
        tensor_device: torch.device | str | None = None,
        mappings: int | None = None,
    ) -> None:
        self.calls = CudaCalls()
        self._owner = os.getpid()
        self._device = self._checked_device(device)
        self._tensor_device = torch.device(tensor_device or f"cuda:{self._device}")
        if self._tensor_device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("this torch finds no CUDA device: install a build for CUDA, or use device='cpu'")
        self.mappings = MappingBudget(mappings)
        # Shared with torch and never released: what is unmapped after `close` still needs it.
        self._context = self.calls("cuDevicePrimaryCtxRetain", self._device)
        self._properties = self._describe()
        self._access = {
            access: [self._descriptor(number, access) for number in (self._device, *map(self._checked_device, peers))]
            for access in Access
        }
        minimum = self.calls.api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(self.calls("cuMemGetAllocationGranularity", self._properties, minimum))
        self._lock = threading.RLock()  # of the books below, not of calls that may take long
        self._ranges: dict[int, _Range] = {}
        self._handles: dict[int, _Handle] = {}
        self._next = 0  # the number of the next handle
        self._mapped = MappedPieces()
        self._doubtful: set[int] = set()  # addresses of pieces whose unmapping failed: perhaps it has happened
        self._watched: set[int] = set()  # streams
        self._events: dict[int, Any] = {}  # one for each stream that was ever waited for
        self.closed = False

    # -- the device -----------------------------------------------------------------------------------------------

    def _checked_device(self, device: SupportsIndex) -> int:
        number, count = int(device), int(self.calls("cuDeviceGetCount"))
        if not 0 <= number < count:
            raise ConfigError(f"there is no CUDA device {number}: this process sees {count} (CUDA_VISIBLE_DEVICES)")
        attribute = self.calls.api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not self.calls("cuDeviceGetAttribute", attribute, self.calls("cuDeviceGet", number)):
            raise ConfigError(f"CUDA device {number} has no virtual memory management: use another, or device='cpu'")
        return number

    def _location(self, device: int) -> Any:
        location = self.calls.api.CUmemLocation()
        location.type = self.calls.api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = device
        return location

    def _describe(self) -> Any:
        """Pinned memory on the device, not shared with other processes."""
        properties = self.calls.api.CUmemAllocationProp()
        properties.type = self.calls.api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location = self._location(self._device)
        return properties

    def _descriptor(self, device: int, access: Access) -> Any:
        flags = self.calls.api.CUmemAccess_flags
        descriptor = self.calls.api.CUmemAccessDesc()
        descriptor.location = self._location(device)
        descriptor.flags = {
            Access.NONE: flags.CU_MEM_ACCESS_FLAGS_PROT_NONE,
            Access.READ: flags.CU_MEM_ACCESS_FLAGS_PROT_READ,
            Access.READ_WRITE: flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        }[access]
        return descriptor

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Our context is the calling thread's meanwhile, whichever it works with."""
        if os.getpid() != self._owner:
            raise InvalidRequest("this memory belongs to the parent process: CUDA does not survive fork, use spawn")
        self.calls("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.calls.api.cuCtxPopCurrent()  # fails only with a lost context, of which the call above has told

    @property
    def usable(self) -> bool:
        """Whether the device can be called from this process."""
        return self.calls.lost is None and os.getpid() == self._owner

    def _check_open(self, call: str) -> None:
        if self.closed:
            raise DriverError(call, errno.EBADF, "this driver is closed")

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device (cuMemGetInfo)."""
        with self.on_device():
            free, total = self.calls("cuMemGetInfo")
        return int(free), int(total)

    def headroom(self) -> int | None:
        """Bytes free on the device."""
        return self.memory()[0]

    @property
    def physical_bytes(self) -> int:
        """What is created and not released."""
        with self._lock:
            return sum(handle.size for handle in self._handles.values())

    # -- addresses ------------------------------------------------------------------------------------------------

    def reserve(self, size: int) -> int:
        """cuMemAddressReserve."""
        self._check_open("reserve")
        with self.on_device(), self._lock:
            _let_go()
            address = int(self.calls("cuMemAddressReserve", size, 0, 0, 0))
            self._ranges[address] = _Range(address, size, self._tensor_device)
        return address

    def free(self, address: int, size: int) -> None:
        """cuMemAddressFree; where a tensor still lies over the range, as soon as a later call finds it gone."""
        with self.on_device(), self._lock:
            _let_go()
            range_ = self._ranges.get(address)
            if range_ is None or range_.size != size:
                raise DriverError("free", errno.EINVAL, "free exactly what reserve gave")
            if self._mapped_in(address, size):
                raise DriverError("free", errno.EBUSY, "unmap everything in the range first")
            if range_.in_use:
                _lingering.append((self, range_))
            else:
                self.calls("cuMemAddressFree", address, size)
            del self._ranges[address]

    def tensor(self, address: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over the addresses. A captured graph does not count as one: keep the tensor as long as the graph."""
        with self._lock:
            range_ = self._range(address)
        offset, rest = divmod(address - range_.address, dtype.itemsize)
        if rest:
            raise DriverError("tensor", errno.EINVAL, f"address {address:#x} is not aligned for {dtype}")
        empty = torch.empty(0, dtype=dtype, device=self._tensor_device)
        return empty.set_(range_.storage, offset, tuple(shape), tuple(strides))

    def _range(self, address: int) -> _Range:
        for range_ in self._ranges.values():
            if range_.address <= address < range_.address + range_.size:
                return range_
        raise DriverError("tensor", errno.EFAULT, f"address {address:#x} is not reserved here")

    # -- physical memory ------------------------------------------------------------------------------------------

    def create(self, size: int, at: int | None = None, room: int = 0) -> int:
        """cuMemCreate: one handle. When the device is full, what torch keeps for itself is asked for once."""
        self._check_open("create")
        if at is not None:
            raise DriverError("create", errno.EINVAL, "nobody chooses where a device puts memory")
        with self.on_device():
            try:
                value = self.calls("cuMemCreate", size, self._properties, 0)
            except DriverError as error:
                if not error.out_of_memory:
                    raise
                _empty_torchs_cache()
                value = self.calls("cuMemCreate", size, self._properties, 0)
        with self._lock:
            number = self._next
            self._next += size
            self._handles[number] = _Handle(int(value), size)
        return number

    def release(self, handle: int, size: int) -> None:
        """cuMemRelease of the handles in [handle, handle + size)."""
        with self.on_device(), self._lock:
            for number, created in self._created("release", handle, size):
                self.calls("cuMemRelease", created.value)
                del self._handles[number]

    def _created(self, call: str, handle: int, size: int) -> list[tuple[int, _Handle]]:
        """The handles that make up exactly [handle, handle + size), each with its number."""
        found, end = [], handle + size
        while handle < end and handle in self._handles:
            found.append((handle, self._handles[handle]))
            handle += self._handles[handle].size
        if handle != end:
            raise DriverError(call, errno.EINVAL, "handles are used whole: give a range of what create gave")
        return found

    # -- mapping --------------------------------------------------------------------------------------------------

    def map(self, address: int, handle: int, size: int) -> None:
        """cuMemMap of each handle, where something is mapped after cuMemUnmap.

        When that fails, what was mapped before is put back, with full access. When that fails too, the range is in
        either state.
        """
        self._check_open("map")
        with self.on_device(), self._lock:
            created = self._created("map", handle, size)
            old = self._mapped_in(address, size)
            try:
                self._unmap_whole("map", address, size, old)
                place = address
                for number, (value, length) in created:
                    self.calls("cuMemMap", place, length, 0, value, 0)
                    self._mapped.add([Piece(place, length, number)])
                    place += length
            except BaseException:
                with suppress(DriverError):  # the first error counts, and what this leaves the contract allows
                    self._put_back(address, size, old)
                raise

    def _put_back(self, address: int, size: int, old: list[Piece]) -> None:
        there = self._mapped_in(address, size)
        for stretch in stretches(piece for piece in there if piece not in old):
            self._unmap_stretch(stretch)
        missing = [piece for piece in old if piece not in there]
        for piece in missing:
            self.calls("cuMemMap", piece.address, piece.size, 0, self._handles[piece.handle].value, 0)
            self._mapped.add([piece])
        for stretch in stretches(missing):
            self.set_access(stretch[0].address, sum(piece.size for piece in stretch), Access.READ_WRITE)

    def unmap(self, address: int, size: int) -> None:
        """One cuMemUnmap for each stretch of mapped addresses, since none may reach over a hole."""
        with self.on_device(), self._lock:
            self._unmap_whole("unmap", address, size, self._mapped_in(address, size))

    def _mapped_in(self, address: int, size: int) -> list[Piece]:
        """What is mapped in a range, after asking the device where that is not certain."""
        pieces = self._mapped.inside(address, size)
        if self._doubtful:
            for piece in pieces:
                if piece.address in self._doubtful and not self._is_mapped(piece.address):
                    self._mapped.remove([piece])
                self._doubtful.discard(piece.address)
            pieces = self._mapped.inside(address, size)
        return pieces

    def _is_mapped(self, address: int) -> bool:
        try:
            value = self.calls("cuMemRetainAllocationHandle", address)
        except DriverError as error:
            if error.code == INVALID_VALUE:
                return False
            raise
        self.calls("cuMemRelease", value)
        return True

    def _unmap_whole(self, call: str, address: int, size: int, pieces: list[Piece]) -> None:
        if pieces and (pieces[0].address < address or pieces[-1].address + pieces[-1].size > address + size):
            raise DriverError(call, errno.EINVAL, "handles are mapped and unmapped whole")
        for stretch in stretches(pieces):
            self._unmap_stretch(stretch)

    def _unmap_stretch(self, stretch: list[Piece]) -> None:
        start, end = stretch[0].address, stretch[-1].address + stretch[-1].size
        try:
            self.calls("cuMemUnmap", start, end - start)
        except DriverError:
            self._doubtful.update(piece.address for piece in stretch)
            raise
        self._mapped.remove(stretch)

    def set_access(self, address: int, size: int, access: Access) -> None:
        """One cuMemSetAccess for the range, for this device and its peers."""
        with self.on_device():
            descriptors = self._access[access]
            self.calls("cuMemSetAccess", address, size, descriptors, len(descriptors))

    # -- work in flight -------------------------------------------------------------------------------------------

    def watch(self, stream: int) -> None:
        """From now on `fence` waits for the streams that were named, and no longer for the whole device.

        Args:
            stream: the handle, `torch.cuda.Stream.cuda_stream` for instance. Every stream whose work touches mapped
                memory has to be named; the caller's current torch stream is waited for in any case.
        """
        with self.on_device(), self._lock:
            self._watched.add(stream)

    def unwatch(self, stream: int) -> None:
        """Wait for what was submitted to `stream`, and no more for the stream. A stream not watched is fine."""
        with self.on_device(), self._lock:
            if stream in self._watched:
                self._wait([stream])
                self._watched.remove(stream)

    def fence(self) -> None:
        """Wait for everything submitted so far to the watched streams, or, where none is watched, to the device.

        Raises:
            DriverError: a watched stream is being captured, so that nobody can wait for it; or earlier work failed.
        """
        with self.on_device():
            with self._lock:
                streams = set(self._watched)
            if not streams:
                self.calls("cuCtxSynchronize")
                return
            if self._tensor_device.type == "cuda":
                streams.add(torch.cuda.current_stream(self._tensor_device).cuda_stream)
            self._wait(sorted(streams))

    def _wait(self, streams: list[int]) -> None:
        idle = self.calls.api.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        for stream in streams:
            if self.calls("cuStreamIsCapturing", stream) != idle:  # recording an event would make it part of the graph
                raise self.calls.failure("fence", _STREAM_CAPTURE, "a stream that is being captured")
            with self._lock:
                if stream not in self._events:
                    self._events[stream] = self.calls("cuEventCreate", _DISABLE_TIMING)
            self.calls("cuEventRecord", self._events[stream], stream)
        for stream in streams:
            self.calls("cuEventSynchronize", self._events[stream])

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release every handle: memory that is still mapped goes when it is unmapped, which still works. Idempotent.

        Raises:
            DriverError: not everything could be released; closing again tries again. Where the context is lost there
                is nothing left to release, and no error.
        """
        self.closed = True
        if not self.usable:
            return
        with self.on_device(), self._lock:
            for number, handle in list(self._handles.items()):
                self.calls("cuMemRelease", handle.value)
                del self._handles[number]
            for stream, event in list(self._events.items()):
                self.calls("cuEventDestroy", event)
                del self._events[stream]
            _let_go()


def _empty_torchs_cache() -> None:
    """Have torch give back device memory it keeps for later, so that a create may find some."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
