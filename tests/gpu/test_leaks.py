"""What is left behind: nothing, after 10,000 operations of a cache and after a process that was killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from support import emulated_cuda
from vattention.cache import KVCache, KVLayout
from vattention.errors import OutOfPages
from vattention.memory import CudaDriver, PagePool

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
needs_device = pytest.mark.skipif(emulated_cuda.ACTIVE, reason="needs a device, which outlives a process")

OPERATIONS = 2_000 if emulated_cuda.ACTIVE and os.environ.get("VATTENTION_TEST_ALL") != "1" else 10_000
SLOTS = 6


@pytest.fixture
def driver():
    if emulated_cuda.ACTIVE:
        emulated_cuda.load().configure(granularity=64 << 10, memory=1 << 30)
    driver = CudaDriver(tensor_device="cpu" if emulated_cuda.ACTIVE else None)
    yield driver
    driver.close()
    if emulated_cuda.ACTIVE:
        emulated_cuda.load().configure(granularity=os.sysconf("SC_PAGESIZE"))


def test_ten_thousand_random_operations_leave_no_page_behind(driver):
    page = driver.granularity
    free = driver.headroom()
    layout = KVLayout(2, 2, 64, torch.float16, SLOTS, 20 * page // 256)  # 20 pages a stream, 4 streams
    pool = PagePool(driver, page, 200 * page)  # less than all slots at their longest: 480
    numbers = random.Random(0)
    refused = 0
    with KVCache(layout, pool=pool) as cache:
        lengths: dict[int, int] = {}
        for _ in range(OPERATIONS):
            what = numbers.choice(("alloc", "step", "step", "step", "prefetch", "fork", "free", "trim", "rollback"))
            slot = numbers.choice(list(lengths)) if lengths else None
            try:
                if what == "alloc" and (new := cache.alloc(numbers.randrange(layout.max_model_len))) is not None:
                    lengths[new] = 0
                elif what == "trim":
                    cache.trim()
                elif slot is None:
                    continue
                elif what in ("step", "prefetch", "rollback"):
                    last = lengths[slot] if what == "rollback" else layout.max_model_len
                    length = numbers.randint(0, last)
                    (cache.prefetch if what == "prefetch" else cache.step)({slot: length})
                    if what != "prefetch":
                        lengths[slot] = length
                elif what == "fork" and (twin := cache.fork(slot)) is not None:
                    lengths[twin] = lengths[slot]
                elif what == "free":
                    cache.free(slot)
                    del lengths[slot]
            except OutOfPages:
                refused += 1
        cache.wait()
        stats = cache.stats()
        assert stats.pages_quarantined == 0
        assert stats.created == driver.physical_bytes <= pool.budget * page
        assert {slot: cache.length(slot) for slot in lengths} == lengths
        for slot in lengths:
            cache.free(slot)
        cache.trim()
        assert cache.stats().created == driver.physical_bytes == 0
    assert refused > OPERATIONS // 100, "the budget was never reached"
    pool.trim()
    assert driver.physical_bytes == 0
    if emulated_cuda.ACTIVE:
        assert emulated_cuda.load().allocated() == 0
    else:
        assert driver.headroom() >= free - (8 << 20)  # others use the device too


@needs_device
def test_a_killed_process_leaves_nothing(driver):
    script = """
        import time, torch
        from vattention.cache import KVCache, KVLayout
        cache = KVCache(KVLayout(4, 2, 64, torch.float16, 4, 100_000), device="cuda", memory="1GiB")
        cache.step({cache.alloc(): 100_000 for _ in range(4)})
        print(cache.stats().created, flush=True)
        time.sleep(100)
    """
    torch.cuda.synchronize()
    before = driver.headroom()
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    created = int(process.stdout.readline())
    assert created > 700 << 20
    assert driver.headroom() <= before - created
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 30
    while driver.headroom() < before - (64 << 20) and time.monotonic() < end:
        time.sleep(0.2)
    assert driver.headroom() >= before - (64 << 20)
