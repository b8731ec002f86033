"""The CUDA driver on an emulated device: which calls it makes, what it refuses, and how it fails.

The emulation enforces CUDA's rules, does submitted work as late as it may, and makes any touch of memory without access
fatal. Sizes here are those of real devices: handles of 2 MiB.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from support import emulated_cuda

if not emulated_cuda.ACTIVE:
    pytest.skip("runs in a process of its own: see test_cuda_emulated.py", allow_module_level=True)

from vattention.cache import KVCache, KVLayout, opening
from vattention.engine.budget import settle_budget
from vattention.errors import ConfigError, DriverError, OutOfPages
from vattention.memory import Access, CudaDriver, PagePool, Reservation

emulation = emulated_cuda.load()
PAGE = 2 << 20
OUT_OF_MEMORY, INVALID_VALUE, ILLEGAL_ADDRESS, UNKNOWN = 2, 1, 700, 999


@pytest.fixture(autouse=True)
def _machine():
    """A device of 256 MiB, which is empty again afterwards."""
    emulation.configure(granularity=PAGE, memory=256 << 20, devices=2)
    emulation.clear_log()
    yield
    if emulation.allocated():
        gc.collect()
    left = emulation.allocated()
    emulation.reset()
    emulation.configure(granularity=os.sysconf("SC_PAGESIZE"))
    assert left == 0


@pytest.fixture
def driver():
    driver = CudaDriver(tensor_device="cpu")
    emulation.clear_log()
    yield driver
    driver.close()


@pytest.fixture
def reservation(driver):
    reservation = Reservation(PagePool(driver, PAGE, 64 * PAGE), 64 * PAGE)
    emulation.clear_log()
    yield reservation
    emulation.repair()
    if driver.usable:
        reservation.close()


def bytes_of(reservation: Reservation, page: int, pages: int = 1) -> torch.Tensor:
    return reservation.tensor(page * PAGE, (pages * PAGE,), (1,), torch.uint8)


def bytes_of_host(reservation: Reservation, page: int) -> torch.Tensor:
    """The same, for a driver that believes its tensors to be elsewhere."""
    storage = reservation.pool.driver._range(reservation.address).storage
    return torch.empty(0, dtype=torch.uint8).set_(storage, page * PAGE, (PAGE,), (1,))


def api():
    from cuda.bindings import driver

    return driver


def submit(stream: int, tensor: torch.Tensor, value: int) -> None:
    """Work that writes memory some time later: when somebody waits for it, and no sooner."""
    driver = api()
    driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
    assert driver.cuMemsetD8Async(tensor.data_ptr(), value, tensor.nbytes, stream) == (0,)
    driver.cuCtxPopCurrent()


def new_stream() -> int:
    driver = api()
    driver.cuCtxPushCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
    code, stream = driver.cuStreamCreate(1)
    assert code == 0
    driver.cuCtxPopCurrent()
    return int(stream)


# -- opening


def test_granularity_and_memory_are_asked_from_the_device(driver):
    assert driver.granularity == PAGE
    assert driver.memory() == (256 << 20, 256 << 20)
    driver.create(4 * PAGE)
    assert driver.headroom() == (256 << 20) - 4 * PAGE
    emulation_granularity = 64 << 10
    driver.close()
    emulation.configure(granularity=emulation_granularity)
    assert CudaDriver(tensor_device="cpu").granularity == emulation_granularity


def test_a_device_that_is_not_there():
    with pytest.raises(ConfigError, match="no CUDA device 2: this process sees 2"):
        CudaDriver(2, tensor_device="cpu")
    with pytest.raises(ConfigError, match="no CUDA device 7"):
        CudaDriver(0, peers=[7], tensor_device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch has a CUDA device")
def test_a_torch_without_cuda():
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        CudaDriver()


def test_two_devices_have_memory_of_their_own():
    one, two = CudaDriver(0, tensor_device="cpu"), CudaDriver(1, tensor_device="cpu")
    one.create(3 * PAGE)
    two.create(PAGE)
    assert (emulation.allocated(0), emulation.allocated(1)) == (3 * PAGE, PAGE)
    assert two.headroom() == (256 << 20) - PAGE
    one.close()
    two.close()
    assert emulation.allocated() == 0


def test_peers_get_access_in_the_same_call():
    driver = CudaDriver(0, peers=[1], tensor_device="cpu")
    reservation = Reservation(PagePool(driver, PAGE, 4 * PAGE), 4 * PAGE)
    emulation.clear_log()
    reservation.map(0, reservation.pool.take(2))
    assert emulation.counts()["cuMemSetAccess"] == 1
    assert len(driver._access[Access.READ_WRITE]) == 2
    reservation.close()
    driver.close()


# -- which calls


def test_a_range_is_one_set_access_and_each_handle_one_map(reservation):
    reservation.map(3, reservation.pool.take(5))
    assert emulation.log() == ["cuMemCreate"] * 5 + ["cuMemMap"] * 5 + ["cuMemSetAccess"]
    bytes_of(reservation, 3, 5).fill_(7)


def test_pages_are_unmapped_in_one_call_a_stretch_and_never_across_a_hole(reservation):
    pool = reservation.pool
    for place, pages in ((0, 3), (5, 2), (7, 1), (20, 4)):
        reservation.map(place, pool.take(pages))
    emulation.clear_log()
    reservation.unmap(1, 30)
    assert emulation.counts() == {"cuCtxSynchronize": 1, "cuMemUnmap": 3}
    assert [
        (start - reservation.address) // PAGE for start, *_ in emulation.mappings(reservation.address, 64 * PAGE)
    ] == [0]
    assert pool.stats().free == 9


def test_handles_are_reused_and_not_created_again(reservation):
    reservation.map(0, reservation.pool.take(4))
    reservation.unmap(0, 4)
    emulation.clear_log()
    reservation.map(10, reservation.pool.take(4))
    assert emulation.counts() == {"cuMemMap": 4, "cuMemSetAccess": 1}
    assert reservation.pool.trim() == 0
    reservation.unmap(10, 4)
    assert reservation.pool.trim() == 4 * PAGE
    assert emulation.allocated() == 0


def test_a_page_of_several_granules_is_one_handle(driver):
    pool = PagePool(driver, 4 * PAGE, 64 * PAGE)
    reservation = Reservation(pool, 16 * PAGE)
    reservation.map(0, pool.take(2))
    assert emulation.counts() == {"cuMemAddressReserve": 1, "cuMemCreate": 2, "cuMemMap": 2, "cuMemSetAccess": 1}
    assert emulation.allocated() == 8 * PAGE
    reservation.close()
    pool.trim()
    assert emulation.allocated() == 0


def test_page_sizes_are_whole_granules(driver):
    with pytest.raises(ConfigError, match="multiple of 2097152"):
        PagePool(driver, PAGE // 2, 64 * PAGE)


def test_the_same_page_at_two_addresses(reservation):
    reservation.map(0, reservation.pool.take(2))
    bytes_of(reservation, 0, 2).fill_(5)
    reservation.alias(0, 10, 2)
    bytes_of(reservation, 11)[3] = 9
    assert bytes_of(reservation, 1)[3] == 9
    assert emulation.allocated() == 2 * PAGE
    reservation.unmap(0, 2)
    assert bytes_of(reservation, 11)[3] == 9


def test_map_replaces_by_unmapping_first(reservation):
    reservation.map(0, reservation.pool.take(3))
    bytes_of(reservation, 0, 3).fill_(1)
    emulation.clear_log()
    reservation.map(1, reservation.pool.take(1))
    assert emulation.log() == ["cuMemCreate", "cuCtxSynchronize", "cuMemUnmap", "cuMemMap", "cuMemSetAccess"]
    bytes_of(reservation, 1).fill_(2)
    assert [bytes_of(reservation, page)[0].item() for page in range(3)] == [1, 2, 1]


@pytest.mark.parametrize("call", ["cuMemUnmap", "cuMemMap", "cuMemSetAccess"])
def test_a_replacement_that_fails_puts_the_old_page_back(reservation, call):
    reservation.map(0, reservation.pool.take(3))
    bytes_of(reservation, 0, 3).fill_(1)
    runs = reservation.pool.take(2)
    emulation.fail(call, UNKNOWN)
    with pytest.raises(DriverError, match=call):
        reservation.map(1, runs)
    emulation.repair()
    assert bool((bytes_of(reservation, 0, 3) == 1).all())
    assert reservation.pool.stats()[2:] == (2, 3, 0)


def test_the_driver_itself_puts_back_what_it_could_not_replace(driver):
    address = driver.reserve(4 * PAGE)
    old, new = [driver.create(PAGE) for _ in range(3)], [driver.create(PAGE) for _ in range(3)]
    driver.map(address, old[0], 3 * PAGE)
    driver.set_access(address, 3 * PAGE, Access.READ_WRITE)
    memory = driver.tensor(address, (3, PAGE), (PAGE, 1), torch.uint8)
    memory.fill_(1)
    before = emulation.mappings(address, 4 * PAGE)
    for at in (1, 2, 3):
        emulation.fail("cuMemMap", UNKNOWN, at=at)
        with pytest.raises(DriverError, match="cuMemMap"):
            driver.map(address, new[0], 3 * PAGE)
        assert emulation.mappings(address, 4 * PAGE) == before
        assert bool((memory == 1).all())
    driver.unmap(address, 4 * PAGE)
    del memory
    driver.free(address, 4 * PAGE)


@pytest.mark.parametrize("after", [False, True])
def test_after_an_unmap_that_failed_the_device_is_asked_what_is_mapped(reservation, after):
    reservation.map(0, reservation.pool.take(2))
    emulation.fail("cuMemUnmap", UNKNOWN, after=after)
    with pytest.raises(DriverError, match="cuMemUnmap failed with CUDA_ERROR_UNKNOWN"):
        reservation.unmap(0, 2)
    assert reservation.pool.stats().quarantined == 2
    emulation.repair()
    emulation.clear_log()
    reservation.settle()
    assert emulation.counts()["cuMemRetainAllocationHandle"] == 2
    assert emulation.counts()["cuMemUnmap"] == (0 if after else 2)
    assert reservation.pool.stats()[2:] == (2, 0, 0)
    assert reservation.pool.trim() == 2 * PAGE
    assert emulation.allocated() == 0


# -- memory that runs out, and errors


def test_out_of_memory_is_tried_again_once_without_what_torch_keeps(driver, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    emulation.fail("cuMemCreate", OUT_OF_MEMORY)
    driver.create(PAGE)
    assert emptied == [1]
    emulation.fail("cuMemCreate", OUT_OF_MEMORY, onwards=True)
    with pytest.raises(DriverError) as caught:
        driver.create(PAGE)
    assert caught.value.out_of_memory
    assert caught.value.code == OUT_OF_MEMORY
    assert str(caught.value).startswith("cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY (2, out of memory): ")
    assert emulation.counts()["cuMemCreate"] == 4


def test_a_full_device_is_out_of_pages(driver):
    pool = PagePool(driver, PAGE, 1 << 30)  # more than the device has
    held = pool.take(100)
    with pytest.raises(OutOfPages, match="no device memory is left"):
        pool.take(100)
    assert pool.stats().in_use == 100
    pool.drop(held)
    assert len(pool.take(128)) <= 2
    assert emulation.allocated() == 256 << 20


def test_other_errors_are_not_retried(driver):
    emulation.fail("cuMemCreate", UNKNOWN)
    with pytest.raises(
        DriverError, match=r"cuMemCreate failed with CUDA_ERROR_UNKNOWN \(999, unknown error\)"
    ) as caught:
        driver.create(PAGE)
    assert not caught.value.out_of_memory
    assert emulation.counts()["cuMemCreate"] == 1


def test_after_a_sticky_error_every_call_says_so_plainly(driver, reservation):
    reservation.map(0, reservation.pool.take(1))
    stream = new_stream()
    submit(stream, bytes_of(reservation, 0), 3)
    driver.calls("cuCtxPushCurrent", driver._context)
    driver.calls("cuMemUnmap", reservation.address, PAGE)  # behind our back, with work in flight
    driver.calls.api.cuCtxPopCurrent()
    with pytest.raises(DriverError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS .*only a new process") as caught:
        driver.fence()
    assert caught.value.code == ILLEGAL_ADDRESS
    emulation.clear_log()
    for call in (
        lambda: driver.create(PAGE), lambda: driver.reserve(PAGE), lambda: reservation.unmap(0, 1), driver.fence,
        lambda: reservation.map(1, reservation.pool.take(1)), driver.memory, lambda: driver.release(0, PAGE),
    ):  # fmt: skip
        with pytest.raises(DriverError, match=r"a lost device context: not called\. cuCtxSynchronize failed") as caught:
            call()
        assert caught.value.code == ILLEGAL_ADDRESS
    assert emulation.log() == []
    driver.close()  # nothing is left to give back, and that is no error
    emulation.reset()


def test_a_cache_on_a_lost_device_says_so_and_ends():
    pool = PagePool(CudaDriver(tensor_device="cpu"), PAGE, 8 * PAGE)
    cache = KVCache(KVLayout(1, 1, 64, torch.float32, 2, 100), pool=pool)
    slot = cache.alloc()
    cache.step({slot: 50})
    emulation.fail("cuMemCreate", ILLEGAL_ADDRESS)
    other = cache.alloc()
    with pytest.raises(DriverError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        cache.step({other: 50})
    cache.free(slot)
    for call in (lambda: cache.step({other: 50}), cache.trim, cache.close):
        with pytest.raises(DriverError, match="lost device context"):
            call()
    emulation.reset()


def test_what_is_not_a_whole_handle_is_refused_before_cuda_is_asked(driver):
    address = driver.reserve(8 * PAGE)
    handle = driver.create(2 * PAGE)
    driver.map(address, handle, 2 * PAGE)
    emulation.clear_log()
    for call, match in (
        (lambda: driver.map(address + 4 * PAGE, handle, PAGE), "whole"),
        (lambda: driver.map(address + 4 * PAGE, handle + PAGE, PAGE), "whole"),
        (lambda: driver.release(handle, PAGE), "whole"),
        (lambda: driver.unmap(address, PAGE), "whole"),
        (lambda: driver.unmap(address + PAGE, 4 * PAGE), "whole"),
        (lambda: driver.free(address, 8 * PAGE), "unmap everything"),
        (lambda: driver.free(address, 4 * PAGE), "exactly"),
        (lambda: driver.free(address + PAGE, PAGE), "exactly"),
        (lambda: driver.create(PAGE, at=0), "nobody chooses"),
        (lambda: driver.tensor(address - PAGE, (1,), (1,), torch.uint8), "not reserved"),
        (lambda: driver.tensor(address + 1, (1,), (1,), torch.float32), "not aligned"),
    ):
        with pytest.raises(DriverError, match=match):
            call()
    assert emulation.log() == []
    driver.unmap(address, 8 * PAGE)  # holes are fine
    driver.free(address, 8 * PAGE)


@pytest.mark.parametrize("size", [0, 1, PAGE + 4096, 1 << 64, 10**30])
def test_sizes_that_cannot_be(driver, size):
    for call in (driver.reserve, driver.create):
        with pytest.raises(DriverError):
            call(size)


# -- addresses and tensors


def test_a_tensor_may_lie_over_addresses_with_nothing_behind_them(reservation):
    view = reservation.tensor(0, (8, PAGE // 4), (PAGE // 4, 1), torch.float32)
    assert view.data_ptr() == reservation.address
    assert emulation.log() == []
    reservation.map(2, reservation.pool.take(1))
    view[2] = 3.5
    assert view[2].sum() == 3.5 * PAGE // 4


def test_a_tensor_ends_where_its_reservation_ends(reservation):
    with pytest.raises(RuntimeError, match="storage"):
        reservation.tensor(0, (64 * PAGE + 1,), (1,), torch.uint8)


def test_addresses_are_freed_when_the_last_tensor_is_gone(driver):
    address = driver.reserve(4 * PAGE)
    tensor = driver.tensor(address, (PAGE,), (1,), torch.uint8)
    part = tensor[10:20].view(2, 5)
    driver.free(address, 4 * PAGE)
    with pytest.raises(DriverError, match="not reserved"):
        driver.tensor(address, (1,), (1,), torch.uint8)
    del tensor
    other = driver.reserve(4 * PAGE)
    assert other != address
    assert emulation.counts()["cuMemAddressFree"] == 0
    del part
    driver.free(other, 4 * PAGE)
    assert emulation.counts()["cuMemAddressFree"] == 2


def test_addresses_outlive_their_driver():
    driver = CudaDriver(tensor_device="cpu")
    address = driver.reserve(4 * PAGE)
    tensor = driver.tensor(address, (PAGE,), (1,), torch.uint8)
    driver.free(address, 4 * PAGE)
    driver.close()
    del driver
    emulation.clear_log()
    other = CudaDriver(tensor_device="cpu")
    other.reserve(PAGE)
    assert emulation.counts()["cuMemAddressFree"] == 0
    del tensor
    other.reserve(PAGE)
    assert emulation.counts()["cuMemAddressFree"] == 1
    other.close()


def run(code: str) -> subprocess.CompletedProcess:
    """Run a script in a process of its own, which may die."""
    prelude = f"""
import os, sys
sys.path[:0] = {sys.path!r}
import torch
from support import emulated_cuda
emulation = emulated_cuda.load()
from vattention.memory import *
PAGE = 2 << 20
driver = CudaDriver(tensor_device="cpu")
r = Reservation(PagePool(driver, PAGE, 8 * PAGE), 8 * PAGE)
r.map(1, r.pool.take(1))
t = r.tensor(0, (8 * PAGE,), (1,), torch.uint8)
t[PAGE:2 * PAGE].fill_(9)
"""
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def reachable(tensor: torch.Tensor) -> tuple[bool, bool]:
    """Whether the system may read and write a tensor's first byte, which it tells without a fault."""
    source, ends = os.open("/dev/zero", os.O_RDONLY), os.pipe()
    libc = ctypes.CDLL(None)
    arguments = (ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(1))
    result = libc.write(ends[1], *arguments) == 1, libc.read(source, *arguments) == 1
    for descriptor in (source, *ends):
        os.close(descriptor)
    return result


def test_only_pages_with_access_can_be_touched(driver, reservation):
    nothing, readable, everything = (False, False), (True, False), (True, True)
    memory = [bytes_of(reservation, page) for page in range(4)]
    reservation.map(1, reservation.pool.take(2))
    assert [reachable(page) for page in memory] == [nothing, everything, everything, nothing]
    driver.set_access(reservation.address + PAGE, PAGE, Access.READ)
    assert [reachable(page) for page in memory] == [nothing, readable, everything, nothing]
    driver.set_access(reservation.address + PAGE, 2 * PAGE, Access.NONE)
    assert [reachable(page) for page in memory] == [nothing] * 4
    driver.set_access(reservation.address + PAGE, 2 * PAGE, Access.READ_WRITE)
    reservation.unmap(2, 1)
    assert [reachable(page) for page in memory] == [nothing, everything, nothing, nothing]
    reservation.close()
    assert [reachable(page) for page in memory] == [nothing] * 4


def test_a_stray_touch_is_fatal():
    assert run("t[2 * PAGE].item()").returncode == -signal.SIGSEGV


def test_a_forked_child_is_refused_and_gives_nothing_back():
    result = run(
        """
        from vattention.errors import ConfigError, InvalidRequest
        def child():
            refused = 0
            for call in (lambda: driver.create(PAGE), lambda: driver.reserve(PAGE), driver.fence, driver.memory,
                         lambda: driver.unmap(r.address, PAGE), lambda: driver.release(0, PAGE)):
                try: call()
                except InvalidRequest: refused += 1
            try: CudaDriver(tensor_device="cpu")
            except ConfigError as error: refused += "spawn" in str(error)
            driver.close()
            os._exit(refused)
        pid = os.fork()
        if not pid: child()
        refused = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(refused, int(t[PAGE]), emulation.allocated() == PAGE)
        """
    )
    assert result.stdout.strip() == "7 9 True", result.stderr


# -- work in flight


def test_nothing_is_unmapped_while_work_may_touch_it(reservation):
    """Without a stream being named, everything on the device is waited for."""
    reservation.map(0, reservation.pool.take(4))
    for page, stream in enumerate((0, new_stream(), new_stream())):
        submit(stream, bytes_of(reservation, page), page + 1)
    assert bytes_of(reservation, 0)[0] == 0xFF, "work is done only when somebody waits"
    reservation.unmap(3, 1)
    assert [bytes_of(reservation, page)[-1].item() for page in range(3)] == [1, 2, 3]
    reservation.unmap(0, 3)
    reservation.pool.driver.fence()


def test_only_named_streams_are_waited_for(driver, reservation):
    reservation.map(0, reservation.pool.take(4))
    ours, theirs = new_stream(), new_stream()
    driver.watch(ours)
    driver.watch(ours)
    submit(ours, bytes_of(reservation, 0), 1)
    submit(theirs, bytes_of(reservation, 1), 2)
    emulation.clear_log()
    reservation.unmap(3, 1)
    waiting = ["cuStreamIsCapturing", "cuEventCreate", "cuEventRecord", "cuEventSynchronize"]
    assert emulation.log() == [*waiting, "cuMemUnmap"]
    assert bytes_of(reservation, 0)[0] == 1
    assert bytes_of(reservation, 1)[0] == 0xFF
    driver.unwatch(ours)
    driver.unwatch(ours)
    driver.fence()
    assert bytes_of(reservation, 1)[0] == 2


def test_the_callers_own_stream_is_waited_for_too(driver, reservation, monkeypatch):
    """It is where copies inside the cache run. Once no stream is named any more, everything is waited for again."""
    reservation.map(0, reservation.pool.take(4))
    named, own, other = new_stream(), new_stream(), new_stream()
    monkeypatch.setattr(driver, "_tensor_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=own))
    driver.watch(named)
    for page, stream in enumerate((named, own, other)):
        submit(stream, bytes_of_host(reservation, page), page + 1)
    driver.fence()
    assert [bytes_of_host(reservation, page)[0].item() for page in range(3)] == [1, 2, 0xFF]
    driver.unwatch(named)
    driver.fence()
    assert bytes_of_host(reservation, 2)[0] == 3


def test_the_emulation_sees_an_unmap_without_a_fence(driver, reservation, monkeypatch):
    """The control of the two tests above."""
    monkeypatch.setattr(CudaDriver, "fence", lambda self: None)
    reservation.map(0, reservation.pool.take(1))
    submit(0, bytes_of(reservation, 0), 1)
    reservation.unmap(0, 1)
    monkeypatch.undo()
    with pytest.raises(DriverError, match="ILLEGAL_ADDRESS"):
        driver.fence()
    emulation.reset()


def test_nobody_waits_for_a_stream_that_is_being_captured(driver, reservation):
    reservation.map(0, reservation.pool.take(2))
    stream = new_stream()
    driver.watch(stream)
    emulation.capture(stream, True)
    emulation.clear_log()
    with pytest.raises(DriverError, match="before the capture or after it"):
        driver.fence()
    assert emulation.counts()["cuEventRecord"] == 0, "it would become part of the graph"
    reservation.map(2, reservation.pool.take(1))  # growing onto fresh addresses waits for nothing
    emulation.capture(stream, False)
    reservation.unmap(0, 3)
    driver.unwatch(stream)


# -- the cache on a device


@pytest.fixture
def on_device(monkeypatch):
    """What `device="cuda"` opens, with tensors that torch takes for host memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(opening, "CudaDriver", _Emulated)
    monkeypatch.setattr(opening, "_AHEAD", 64)


class _Emulated(CudaDriver):
    def __init__(self, device: int) -> None:
        super().__init__(device, tensor_device="cpu")


LAYOUT = KVLayout(2, 2, 64, torch.float32, 4, 20_000)  # 4 streams of 512 bytes a token: 4,096 tokens a page


@pytest.mark.parametrize(("device", "number"), [("cuda", 1), ("cuda:0", 0), (torch.device("cuda", 1), 1)])
def test_a_cache_on_a_device(on_device, device, number):
    with KVCache(LAYOUT, device=device, memory=64 * PAGE) as cache:
        assert cache.pool.page_size == PAGE, "the granularity of the device"
        slot = cache.alloc()
        cache.step({slot: 5_000})
        k, v = cache.layer(1)
        k[slot, :5_000], v[slot, :5_000] = 1, 2
        twin = cache.fork(slot)
        cache.step({slot: 9_000, twin: 5_001})
        assert bool((k[twin, :5_000] == 1).all())
        assert bool((v[slot, :5_000] == 2).all())
        assert emulation.allocated(number) >= 16 * PAGE
        assert emulation.allocated(1 - number) == 0
        del k, v
    assert emulation.allocated() == 0


def test_the_budget_follows_free_memory_and_utilization(on_device):
    weights = CudaDriver(0, tensor_device="cpu")
    weights.create(100 << 20)
    for share, budget in ((None, 0.9 * 256 - 100), (1, 256 - 100), (0.5, 0.5 * 256 - 100)):
        with KVCache(LAYOUT, device="cuda:0", memory_utilization=share) as cache:
            assert cache.stats().budget == int(budget * (1 << 20)) // PAGE * PAGE
    with pytest.raises(ConfigError, match=r"leaves nothing at memory_utilization=0\.3"):
        KVCache(LAYOUT, device="cuda:0", memory_utilization=0.3)
    for wrong in (0, 1.5, -1, float("nan")):
        with pytest.raises(ConfigError, match="outside"):
            KVCache(LAYOUT, device="cuda:0", memory_utilization=wrong)
    for wrong in ("much", True, [1]):
        with pytest.raises(TypeError, match="number"):
            KVCache(LAYOUT, device="cuda:0", memory_utilization=wrong)
    weights.close()


def test_a_provisional_budget_is_settled_when_everything_else_has_its_memory(on_device):
    """The pages of the cache itself do not count against it, nor those that are created ahead meanwhile."""
    with KVCache(LAYOUT, device="cuda:0", memory_utilization=0.9) as cache:
        assert cache.stats().budget == int(0.9 * 256) // 2 * PAGE
        slot = cache.alloc()
        cache.step({slot: 1})
        graphs = CudaDriver(0, tensor_device="cpu")
        graphs.create(50 << 20)
        settle_budget(cache, 0.9, 20 << 20)
        assert cache.stats().budget == int(0.9 * 256 - 50 - 20) // 2 * PAGE
        assert cache.fits({slot: 1})
        with pytest.raises(ConfigError, match="100 MiB for the largest pass leave no memory"):
            settle_budget(cache, 0.5, 100 << 20)
        settle_budget(cache, 1, 0)
        assert cache.stats().budget == int(0.9 * 256 - 50 - 20) // 2 * PAGE, "never more than it was opened with"
        graphs.close()


def test_a_cache_tells_its_own_driver_of_streams(on_device):
    ours, theirs = new_stream(), new_stream()
    with KVCache(LAYOUT, device="cuda:0", memory=64 * PAGE) as cache:
        slot, other = cache.alloc(), cache.alloc()
        cache.step({slot: 100, other: 100})
        cache.watch(ours)
        k, _ = cache.layer(0)
        submit(ours, k[slot, :100].view(torch.uint8), 1)
        submit(theirs, k[other, :100].view(torch.uint8), 2)
        cache.step({slot: 0})
        cache.free(slot)
        emulation.clear_log()
        cache.trim()
        assert "cuCtxSynchronize" not in emulation.log()
        assert emulation.counts()["cuEventSynchronize"] > 0
        assert int(k[other, :1].view(torch.uint8).flatten()[0]) == 0xFF
        with KVCache(LAYOUT, pool=cache.pool) as guest:
            guest.watch(theirs)  # not its driver
            assert cache.pool.driver._watched == {ours}
        cache.pool.driver.watch(theirs)
        del k


def test_forgetting_a_cache_gives_everything_back(on_device):
    cache = KVCache(LAYOUT, device="cuda:0", memory=64 * PAGE)
    cache.step({cache.alloc(): 5_000})
    assert emulation.allocated() > 0
    del cache
    gc.collect()
    assert emulation.allocated() == 0


# -- handles created ahead


def settled(pool: PagePool, free: int) -> bool:
    """Whether the thread that creates ahead comes to `free` free pages."""
    for _ in range(500):
        if pool.stats().free == free:
            return True
        time.sleep(0.01)
    return False


def test_pages_are_created_ahead_in_the_background_and_within_the_budget(driver):
    pool = PagePool(driver, PAGE, 16 * PAGE, ahead=6)
    assert emulation.allocated() == 0, "nothing before the first page is taken"
    held = pool.take(2)
    assert settled(pool, 6)
    mine = pool.meter.calls_by_thread[threading.get_ident()]
    held += pool.take(4)
    assert pool.meter.calls_by_thread[threading.get_ident()] == mine, "they were there already"
    assert settled(pool, 6)
    held += pool.take(6)
    assert settled(pool, 4), "16 in all"
    assert emulation.allocated() == 16 * PAGE
    assert len(pool.take(4)) == 1
    assert settled(pool, 0)
    assert pool.trim() == 0
    del pool


def test_what_is_trimmed_is_not_created_again(driver):
    pool = PagePool(driver, PAGE, 64 * PAGE, ahead=6)
    held = pool.take(1)
    assert settled(pool, 6)
    assert pool.trim() == 6 * PAGE
    assert not pool.create_ahead(6), "not even by a thread that was about to"
    time.sleep(0.05)
    assert pool.stats().created == 1
    pool.drop(held)
    pool.take(1)
    assert settled(pool, 6)


def test_a_device_that_fails_in_the_background_is_met_by_who_needs_it(driver):
    pool = PagePool(driver, PAGE, 64 * PAGE, ahead=4)
    emulation.fail("cuMemCreate", UNKNOWN, at=2, onwards=True)
    pool.take(1)
    for _ in range(500):
        if pool._ahead.failure is not None:
            break
        time.sleep(0.01)
    assert pool._ahead.failure.code == UNKNOWN
    with pytest.raises(DriverError, match="cuMemCreate"):
        pool.take(1)
    emulation.repair()
    pool.take(1)
    assert settled(pool, 4)


def test_the_thread_ends_with_its_pool(driver):
    pool = PagePool(driver, PAGE, 64 * PAGE, ahead=4)
    pool.take(1)
    thread = pool._ahead._thread
    assert settled(pool, 4)
    del pool
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_closing_again_goes_on_where_it_failed(driver):
    driver.create(PAGE)
    driver.create(PAGE)
    driver.watch(new_stream())
    driver.fence()
    for call in ("cuMemRelease", "cuEventDestroy"):
        emulation.fail(call, UNKNOWN)
        with pytest.raises(DriverError, match=call):
            driver.close()
        emulation.repair()
    driver.close()
    assert emulation.allocated() == 0


def test_use_after_close(driver):
    address, handle = driver.reserve(PAGE), driver.create(PAGE)
    driver.map(address, handle, PAGE)
    driver.close()
    driver.close()
    assert driver.closed
    assert emulation.allocated() == PAGE, "until it is unmapped"
    for call in (lambda: driver.create(PAGE), lambda: driver.reserve(PAGE), lambda: driver.map(address, handle, PAGE)):
        with pytest.raises(DriverError, match="closed"):
            call()
    driver.unmap(address, PAGE)
    assert emulation.allocated() == 0
    driver.free(address, PAGE)
