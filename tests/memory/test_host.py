"""The host driver on real memory: what the kernel counts is what we say, and strays end where they should."""

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from vattention.errors import ConfigError, DriverError, OutOfPages
from vattention.memory import Access, HostDriver, PagePool, Reservation, libc, limits
from vattention.memory.driver import MappingBudget

PAGE = 64 << 10


def kernel_mappings(address: int, size: int) -> int:
    """Mappings the kernel has in an address range."""
    count = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            count += start < address + size and end > address
    return count


def run(code: str) -> subprocess.CompletedProcess:
    """Run a script in a process of its own, which may die."""
    prelude = "import os, torch\nfrom vattention.memory import *\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )


def exit_codes(code: str, **more: list[str]) -> list[int]:
    """How a script ends, with each of these in its place: in a child each of a process that imports once."""
    ((name, each),) = more.items()
    scripts = [textwrap.dedent(code).format(**{name: one}) for one in each]
    result = run(
        f"""
        for script in {scripts!r}:
            child = os.fork()
            if not child:
                try:
                    exec(script)
                except BaseException:
                    os._exit(1)
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        """
    )
    assert result.returncode == 0, result.stderr
    return list(map(int, result.stdout.split()))


@pytest.fixture
def driver():
    driver = HostDriver()
    yield driver
    driver.close()


@pytest.fixture
def reservation(driver):
    reservation = Reservation(PagePool(driver, PAGE, 64 * PAGE), 1 << 30)
    yield reservation
    reservation.close()


def words(reservation: Reservation, page: int, pages: int = 1) -> torch.Tensor:
    return reservation.tensor(page * PAGE, (pages * PAGE // 8,), (1,), torch.int64)


def test_memory_is_created_by_create_and_by_nothing_else(driver, reservation):
    assert driver.physical_bytes == 0
    runs = reservation.pool.take(3)
    assert driver.physical_bytes == 3 * PAGE
    reservation.map(5, runs)
    words(reservation, 5, 3).fill_(7)
    words(reservation, 0, 5).sum()
    assert driver.physical_bytes == 3 * PAGE
    reservation.unmap(5, 3)
    assert driver.physical_bytes == 3 * PAGE
    assert reservation.pool.trim() == 3 * PAGE
    assert driver.physical_bytes == 0


def test_a_stray_read_gives_zeros_and_creates_nothing(driver, reservation):
    assert not words(reservation, 100, 4).any()
    assert driver.physical_bytes == 0


def test_the_same_page_at_two_addresses(driver, reservation):
    reservation.map(0, reservation.pool.take(2))
    words(reservation, 0, 2).copy_(torch.arange(2 * PAGE // 8))
    reservation.alias(0, 10, 2)
    assert torch.equal(words(reservation, 10, 2), words(reservation, 0, 2))
    words(reservation, 11)[3] = -1
    assert words(reservation, 1)[3] == -1
    assert driver.physical_bytes == 2 * PAGE
    reservation.unmap(0, 2)
    assert words(reservation, 11)[3] == -1
    assert reservation.pool.stats().in_use == 2


def test_mapped_pages_take_no_fault(driver, reservation):
    import resource

    reservation.map(0, reservation.pool.take(32))
    view = words(reservation, 0, 32)
    view[:1].fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    view.fill_(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 32


def test_neighbours_are_one_mapping_and_our_count_is_not_below_the_kernels(reservation):
    pool = reservation.pool
    last = None
    for page in range(20):
        reservation.map(page, pool.take(1, after=last, room=64))
        last = reservation.page(page)
    assert kernel_mappings(reservation.address, reservation.size) == 2
    reservation.unmap(7, 2)
    kernel = kernel_mappings(reservation.address, reservation.size)
    assert kernel == 4
    assert kernel <= reservation.mappings <= kernel + 1


def test_streams_growing_in_turns_stay_one_mapping_each(reservation):
    pool = reservation.pool
    last = dict.fromkeys(range(4))
    for page in range(10):
        for stream in last:
            place = stream * 100 + page
            reservation.map(place, pool.take(1, after=last[stream], room=100))
            last[stream] = reservation.page(place)
    assert kernel_mappings(reservation.address, reservation.size) == 8


def test_addresses_outlive_close_as_long_as_a_tensor_does(driver):
    reservation = Reservation(PagePool(driver, PAGE, 4 * PAGE), 8 * PAGE)
    reservation.map(0, reservation.pool.take(2))
    view = words(reservation, 0, 8)
    part = view[10:20]
    address, size = reservation.address, reservation.size
    reservation.close()
    reservation.close()
    assert reservation.pool.stats().in_use == 0
    del view
    gc.collect()
    assert kernel_mappings(address, size) >= 1
    assert not part.any(), "closed memory reads as zeros"
    del part
    gc.collect()
    assert kernel_mappings(address, size) == 0


SEGFAULT = -signal.SIGSEGV


@pytest.mark.parametrize(("guard", "read", "write"), [(False, 0, SEGFAULT), (True, SEGFAULT, SEGFAULT)])
def test_stray_touches(guard, read, write):
    code = f"""
        r = Reservation(PagePool(HostDriver(guard={guard}), 65536, 1 << 20), 1 << 20)
        r.map(0, r.pool.take(1))
        t = r.tensor(0, (1 << 20,), (1,), torch.uint8)
        t[:65536].fill_(1)
        {{touch}}
    """
    assert exit_codes(code, touch=["assert t[65536].item() == 0", "t[65536] = 1"]) == [read, write]


def test_access_none_and_read_are_enforced():
    code = """
        d = HostDriver(); a = d.reserve(65536); h = d.create(65536); d.map(a, h, 65536)
        t = d.tensor(a, (8,), (1,), torch.uint8)
        {more}
    """
    access = "d.set_access(a, 65536, Access.{}); "
    touches = ["t[0].item()", access.format("READ") + "t[0].item()"]
    touches += [access.format(which) + "t[0] = 1" for which in ("READ", "READ_WRITE")]
    assert exit_codes(code, more=touches) == [SEGFAULT, 0, SEGFAULT, 0]


def test_running_out_of_machine_is_an_error_before_it_is_a_kill(monkeypatch, driver):
    pool = PagePool(driver, PAGE, 1 << 30)
    kept = pool.take(4)
    monkeypatch.setattr(limits, "memory_headroom", lambda: 2 * PAGE)
    monkeypatch.setattr(driver, "_trusted", 0)
    with pytest.raises(DriverError) as caught:
        driver.create(3 * PAGE)
    assert caught.value.out_of_memory
    assert caught.value.code == errno.ENOMEM
    with pytest.raises(OutOfPages, match="no physical memory is left"):
        pool.take(3)
    assert pool.stats().created == 4
    assert driver.physical_bytes == 4 * PAGE
    pool.drop(kept)
    assert sum(run.pages for run in pool.take(4)) == 4, "free pages serve when the machine has no more"


def test_too_little_address_space_says_which_limit():
    result = run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        try:
            HostDriver().reserve(1 << 40)
        except Exception as error:
            print(type(error).__name__, error)
        """
    )
    assert result.returncode == 0, result.stderr
    assert "DriverError reserve failed with ENOMEM" in result.stdout
    assert "ulimit -v" in result.stdout


def test_a_file_size_limit_says_what_to_raise():
    result = run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        try:
            HostDriver()
        except Exception as error:
            print(type(error).__name__, error)
        """
    )
    assert "ConfigError" in result.stdout, result.stderr
    assert "ulimit -f" in result.stdout


def test_no_memfd(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ConfigError, match="memfd_create"):
        HostDriver()


def test_memfd_refused(monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(ConfigError, match="refused"):
        HostDriver()


@pytest.mark.parametrize("kernel_page", [4 << 10, 16 << 10, 64 << 10])
def test_page_sizes_follow_the_kernels(monkeypatch, kernel_page):
    monkeypatch.setattr(os, "sysconf", lambda name: kernel_page)
    driver = HostDriver()
    assert driver.granularity == kernel_page
    PagePool(driver, 2 * kernel_page, 1 << 20)
    for wrong in (kernel_page // 2, kernel_page + 512, 0, -kernel_page):
        with pytest.raises(ConfigError, match="multiple"):
            PagePool(driver, wrong, 1 << 20)
    driver.close()


def test_mapping_budget_is_shared_by_the_process_and_leaves_a_fifth():
    one, two = HostDriver(), HostDriver()
    assert one.mappings is two.mappings
    assert one.mappings.limit + limits.mappings_in_use() - one.mappings.used <= limits.max_map_count() * 0.8 + 10
    one.close()
    two.close()


def test_mappings_past_the_budget_are_refused_before_the_kernel_does(driver, monkeypatch):
    pool = PagePool(driver, PAGE, 64 * PAGE)
    monkeypatch.setattr(driver, "mappings", MappingBudget(9))
    reservation = Reservation(pool, 1 << 30)
    for place in range(0, 8, 2):
        reservation.map(place, pool.take(1))
    with pytest.raises(OutOfPages) as caught:
        reservation.map(8, pool.take(1))
    assert caught.value.what == "mappings"
    assert pool.stats().in_use == 4
    assert kernel_mappings(reservation.address, reservation.size) <= 9
    worker = threading.Thread(target=lambda: None)
    worker.start()
    worker.join()
    reservation.close()
    assert driver.mappings.used == 0


def test_verbs_on_a_closed_driver_name_the_call(driver):
    driver.close()
    with pytest.raises(DriverError, match="create failed with EBADF"):
        driver.create(PAGE)
    address = driver.reserve(PAGE)
    with pytest.raises(DriverError, match="map failed"):
        driver.map(address, 0, PAGE)
    driver.free(address, PAGE)


def test_free_wants_exactly_what_reserve_gave(driver):
    address = driver.reserve(4 * PAGE)
    with pytest.raises(DriverError, match="exactly"):
        driver.free(address, PAGE)
    with pytest.raises(DriverError, match="not reserved"):
        driver.tensor(address - PAGE, (1,), (1,), torch.uint8)
    with pytest.raises(DriverError, match="aligned"):
        driver.tensor(address + 1, (1,), (1,), torch.float32)
    driver.free(address, 4 * PAGE)


def test_map_replaces_in_one_call_and_a_failing_map_leaves_the_old_page(driver):
    address = driver.reserve(PAGE)
    first, second = driver.create(PAGE), driver.create(PAGE)
    view = driver.tensor(address, (PAGE,), (1,), torch.uint8)
    for handle, value in ((first, 1), (second, 2)):
        driver.map(address, handle, PAGE)
        driver.set_access(address, PAGE, Access.READ_WRITE)
        view.fill_(value)
    driver.map(address, first, PAGE)
    driver.set_access(address, PAGE, Access.READ_WRITE)
    assert view[0] == 1
    with pytest.raises(DriverError):
        driver.map(address, second + 1, PAGE)
    assert view[0] == 1
    driver.unmap(address, PAGE)
    driver.free(address, PAGE)


def test_an_old_kernel_without_populate_still_maps(driver, monkeypatch):
    def unknown_advice(address, size, advice):
        libc.ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(libc, "_madvise", unknown_advice)
    address = driver.reserve(PAGE)
    driver.map(address, driver.create(PAGE), PAGE)
    driver.set_access(address, PAGE, Access.READ_WRITE)
    driver.tensor(address, (PAGE,), (1,), torch.uint8).fill_(3)


def test_a_forked_child_cannot_reach_the_pages():
    result = run(
        """
        d = HostDriver(); r = Reservation(PagePool(d, 65536, 1 << 20), 1 << 20)
        r.map(0, r.pool.take(2)); t = r.tensor(0, (131072,), (1,), torch.uint8); t.fill_(9)
        ways = []
        for touch in ("read", "write", "create"):
            child = os.fork()
            if child == 0:
                try:
                    if touch == "create": d.create(65536)
                    elif touch == "write": t[0] = 1
                    else: t[0].item()
                except Exception as error:
                    os._exit(7)
                os._exit(0)
            ways.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(ways, bool((t == 9).all()), d.physical_bytes)
        """
    )
    assert result.stdout.strip() == f"[{-signal.SIGSEGV}, {-signal.SIGSEGV}, 7] True 131072", result.stderr


def test_a_child_that_exits_normally_gives_nothing_of_its_parent_back():
    result = run(
        """
        import gc, sys
        from vattention.cache import KVCache, KVLayout
        c = KVCache(KVLayout(2, 1, 64, torch.float32, 4, 1000), memory="8MiB")
        s = c.alloc(); c.step({s: 900}); k, v = c.layer(1); k[s, :900] = 5
        child = os.fork()
        if child == 0:
            del c, k, v; gc.collect(); sys.exit(0)
        code = os.waitpid(child, 0)[1]
        print(code, bool((k[s, :900] == 5).all()), c.pool.driver.physical_bytes == c.stats().created)
        """
    )
    assert result.stdout.strip() == "0 True True", result.stderr
