"""First things to try on a GPU: what the CUDA driver relies on and no documentation promises, and what it promises.

`make gpu-check` runs these. Lines that begin with PROBE tell what a device does where both answers are fine. On the
emulated device (VATTENTION_TEST_DRIVER=cuda-emulated, pytest -m gpu tests/gpu) the tests without kernels run too.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from support import emulated_cuda
from vattention.cache import KVCache, KVLayout
from vattention.errors import DriverError
from vattention.memory import Access, CudaDriver, PagePool, Reservation

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
needs_kernels = pytest.mark.skipif(emulated_cuda.ACTIVE, reason="needs kernels, which the emulation does not have")

LONG = 1_000_000_000  # cycles: half a second or so


@pytest.fixture
def driver():
    if emulated_cuda.ACTIVE:
        emulated_cuda.load().configure()
    driver = CudaDriver(tensor_device="cpu" if emulated_cuda.ACTIVE else None)
    yield driver
    driver.close()


@pytest.fixture
def reservation(driver):
    page = driver.granularity
    pool = PagePool(driver, page, 32 * page)
    reservation = Reservation(pool, 64 * page)
    yield reservation
    reservation.close()
    pool.trim()


def words(reservation: Reservation, page: int, pages: int = 1) -> torch.Tensor:
    step = reservation.pool.page_size
    return reservation.tensor(page * step, (pages * step // 4,), (1,), torch.int32)


# -- virtual memory


def test_a_tensor_over_addresses_with_nothing_behind_them(reservation):
    memory = words(reservation, 0, 64)
    reservation.map(5, reservation.pool.take(2))
    words(reservation, 5, 2).fill_(7)
    page = reservation.pool.page_size // 4
    assert bool((memory[5 * page : 7 * page] == 7).all())
    assert memory.data_ptr() == reservation.address


def test_unmapping_across_holes(driver, reservation):
    for place in (0, 2, 3):
        reservation.map(place, reservation.pool.take(1))
    page = driver.granularity
    with driver.on_device():
        (code,) = driver.calls.api.cuMemUnmap(reservation.address, 4 * page)
        print(f"PROBE cuMemUnmap over a hole: {code!r}")
        if code == 0:
            pytest.fail("this device unmaps across holes: the driver's books are wrong from here on")
    reservation.unmap(0, 10)
    assert reservation.pool.stats().free == 3


def test_part_of_a_handle_cannot_be_unmapped(driver):
    page = driver.granularity
    address, handle = driver.reserve(4 * page), driver.create(2 * page)
    driver.map(address, handle, 2 * page)
    with driver.on_device():
        (code,) = driver.calls.api.cuMemUnmap(address, page)
    print(f"PROBE cuMemUnmap of half a handle: {code!r}")
    assert code != 0
    driver.unmap(address, 2 * page)
    driver.release(handle, 2 * page)
    driver.free(address, 4 * page)


def test_what_new_memory_holds(reservation):
    reservation.map(0, reservation.pool.take(1))
    print(f"PROBE new memory is all zeros: {not bool(words(reservation, 0).any())}")


def test_the_device_tells_whether_an_address_is_mapped(driver, reservation):
    """What the driver asks after an unmap that failed."""
    reservation.map(1, reservation.pool.take(1))
    with driver.on_device():
        assert driver._is_mapped(reservation.address + driver.granularity)
        assert not driver._is_mapped(reservation.address)


def test_a_shared_page_and_a_replaced_one(reservation):
    reservation.map(0, reservation.pool.take(2))
    words(reservation, 0, 2).fill_(1)
    reservation.alias(0, 10, 2)
    reservation.map(1, reservation.pool.take(1))
    words(reservation, 1).fill_(2)
    assert [words(reservation, place)[0].item() for place in (0, 1, 10, 11)] == [1, 2, 1, 1]


@needs_kernels  # the emulation's mappings are the kernel's, of which there may be 65,530
def test_more_than_65_000_mappings(driver):
    page, count = driver.granularity, 70_000
    address, handle = driver.reserve(count * page), driver.create(page)
    for place in range(count):
        driver.map(address + place * page, handle, page)
    start = time.perf_counter()
    driver.set_access(address, count * page, Access.READ_WRITE)
    print(f"PROBE one set_access over {count} mappings: {time.perf_counter() - start:.3f} s")
    last = driver.tensor(address + (count - 1) * page, (4,), (1,), torch.int32)
    first = driver.tensor(address, (4,), (1,), torch.int32)
    last.fill_(9)
    assert first.tolist() == [9] * 4
    driver.unmap(address, count * page)
    driver.release(handle, page)
    driver.free(address, count * page)


def test_memory_goes_back_to_the_device(driver):
    free = driver.headroom()
    pool = PagePool(driver, driver.granularity, 64 * driver.granularity)
    held = pool.take(64)
    assert driver.headroom() <= free - 64 * driver.granularity
    pool.drop(held)
    pool.trim()
    assert driver.headroom() >= free - 8 * driver.granularity  # others use the device too


# -- beside running work


@needs_kernels
def test_mapping_beside_a_running_kernel(reservation):
    reservation.map(0, reservation.pool.take(1))
    words(reservation, 0).fill_(1)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(LONG)
    words(reservation, 0).add_(1)
    done.record()
    start = time.perf_counter()
    reservation.map(1, reservation.pool.take(1))
    print(f"PROBE mapping waits for running kernels: {done.query()} ({time.perf_counter() - start:.4f} s)")
    words(reservation, 1).fill_(5)
    torch.cuda.synchronize()
    assert (words(reservation, 0)[0].item(), words(reservation, 1)[-1].item()) == (2, 5)


@needs_kernels
@pytest.mark.parametrize("watched", [False, True])
def test_unmapping_waits_for_the_kernels_that_read(driver, reservation, watched):
    reservation.map(0, reservation.pool.take(1))
    words(reservation, 0).fill_(3)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    if watched:
        driver.watch(stream.cuda_stream)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        result = words(reservation, 0).sum()
        done = torch.cuda.Event()
        done.record()
    reservation.unmap(0, 1)
    assert done.query()
    assert result.item() == 3 * driver.granularity // 4
    if watched:
        driver.unwatch(stream.cuda_stream)


@needs_kernels
def test_mapping_while_a_graph_is_captured_and_pages_replaced_under_it(reservation):
    reservation.map(0, reservation.pool.take(2))
    memory = words(reservation, 0, 2)
    memory.fill_(1)
    result = torch.zeros((), dtype=torch.int64, device="cuda")
    memory.sum()  # warm
    torch.cuda.synchronize()
    failure: list[BaseException] = []

    def grow() -> None:
        try:
            reservation.map(2, reservation.pool.take(4))
        except BaseException as error:
            failure.append(error)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        thread = threading.Thread(target=grow)
        thread.start()
        thread.join()
        result.copy_(memory.sum())
    assert not failure, failure
    words(reservation, 2, 4).fill_(1)
    graph.replay()
    assert result.item() == len(memory)
    reservation.unmap(0, 2)
    reservation.map(0, reservation.pool.take(2))
    memory.fill_(4)
    graph.replay()
    assert result.item() == 4 * len(memory), "the graph sees the pages that are there now"


@needs_kernels
def test_touching_what_is_not_mapped_is_reported_as_a_lost_context():
    script = """
        import torch
        from vattention.errors import DriverError
        from vattention.memory import CudaDriver
        driver = CudaDriver()
        page = driver.granularity
        tensor = driver.tensor(driver.reserve(page), (page,), (1,), torch.uint8)
        torch.zeros(1, device="cuda")
        tensor.fill_(1)
        for _ in range(2):
            try:
                driver.fence()
            except DriverError as error:
                print(error.code, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=100, check=False
    )
    print(f"PROBE {done.stdout.strip()}")
    first, second = done.stdout.strip().splitlines()
    assert "the device context is lost" in first
    assert "not called" in second


# -- the cache


@needs_kernels
def test_a_cache_on_the_device():
    layout = KVLayout(4, 2, 64, torch.float16, 8, 40_000)
    with KVCache(layout, device="cuda", memory="1GiB") as cache:
        slot = cache.alloc()
        for length in range(1, 40_000, 1_999):
            cache.step({slot: length})
            cache.prefetch({slot: length + 1_999})
            for layer in range(4):
                k, v = cache.layer(layer)
                k[slot, :length], v[slot, :length] = layer + 1, -layer - 1
        twin = cache.fork(slot)
        cache.step({twin: 100})
        cache.step({twin: 20_000})
        for layer in range(4):
            k, v = cache.layer(layer)
            k[twin, 100:20_000] = 99
            assert bool((k[slot, :length] == layer + 1).all())
            assert bool((v[slot, :length] == -layer - 1).all())
            assert bool((k[twin, :100] == layer + 1).all())
        cache.free(slot)
        cache.trim()
        stats = cache.stats()
        assert stats.mapped == stats.created == cache.pool.driver.physical_bytes
        print(f"PROBE {dict(stats.driver_calls)}, {stats.driver_seconds:.4f} s in them")
        del k, v


@needs_kernels
def test_the_default_budget_is_what_is_free():
    with KVCache(KVLayout(1, 8, 128, torch.float16, 2, 1000), device="cuda", memory_utilization=0.5) as cache:
        free, total = cache.pool.driver.memory()
        assert 0 < cache.stats().budget <= free - total // 2 + (64 << 20)
    with pytest.raises(DriverError):
        cache.pool.driver.create(cache.pool.page_size)


@needs_kernels
@pytest.mark.parametrize("lengths", [(1, 5, 300), (2_049, 700, 64), (4_000, 4_000, 1)])
@pytest.mark.parametrize("queries", [1, 3])
def test_flash_attention_over_slot_views(lengths, queries):
    """Stock FlashAttention on the slots as they are, true lengths in `seqused_k`, NaN behind them."""
    heads, kv_heads, width = 8, 2, 128
    layout = KVLayout(1, kv_heads, width, torch.float16, 4, 4_096)
    with KVCache(layout, device="cuda", memory="256MiB", poison=True) as cache:
        slots = [cache.alloc() for _ in lengths]
        k, v = cache.layer(0)
        cache.step(dict(zip(slots, lengths, strict=True)))
        generator = torch.Generator("cuda").manual_seed(0)
        for slot, length in zip(slots, lengths, strict=True):
            for view in (k, v):
                shape = (length, kv_heads, width)
                view[slot, :length] = torch.randn(shape, generator=generator, device="cuda").half()
        q = torch.randn((len(slots) * queries, heads, width), generator=generator, device="cuda").half()
        starts = torch.tensor(
            [slot * layout.padded_len for slot in [*slots, slots[-1]]], device="cuda", dtype=torch.int32
        )
        output = torch.ops.aten._flash_attention_forward(
            q, k.view(-1, kv_heads, width), v.view(-1, kv_heads, width),
            torch.arange(0, (len(slots) + 1) * queries, queries, device="cuda", dtype=torch.int32), starts,
            queries, layout.padded_len, 0.0, queries > 1, False,
            seqused_k=torch.tensor(lengths, device="cuda", dtype=torch.int32),
        )[0]  # fmt: skip
        torch.cuda.synchronize()
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            rows = q[row * queries : (row + 1) * queries].float().transpose(0, 1)
            keys, values = (view[slot, :length].float().transpose(0, 1).repeat_interleave(4, 0) for view in (k, v))
            places = torch.arange(length, device="cuda") - (length - queries)
            seen = places[None, :] <= torch.arange(queries, device="cuda")[:, None]
            scores = (rows @ keys.mT / width**0.5).masked_fill(~seen, float("-inf"))
            expected = (torch.nan_to_num(scores.softmax(-1)) @ values).transpose(0, 1)
            torch.testing.assert_close(
                output[row * queries : (row + 1) * queries].float(), expected, atol=4e-3, rtol=4e-3
            )
        del k, v
