"""The benchmark of CUDA's virtual memory calls, on the emulated device: that it runs, ends, and leaves nothing."""

import json
import os

import pytest

from support import emulated_cuda

if not emulated_cuda.ACTIVE:
    pytest.skip("runs in a process of its own: see tests/memory/test_cuda_emulated.py", allow_module_level=True)

from vattention.bench import vmm
from vattention.bench.machine import write_json
from vattention.memory import CudaDriver

emulation = emulated_cuda.load()


@pytest.fixture
def driver():
    emulation.configure(granularity=64 << 10, memory=64 << 20)
    driver = CudaDriver(tensor_device="cpu")
    yield driver
    driver.close()
    assert emulation.allocated() == 0
    emulation.configure(granularity=os.sysconf("SC_PAGESIZE"))


@pytest.mark.parametrize("part", vmm.PARTS)
def test_each_part_runs_alone_and_leaves_nothing(driver, part, tmp_path):
    results = {part: vmm.run(driver, part, seconds=0.02, total=8 << 20)}
    assert driver.physical_bytes == emulation.allocated() == 0
    for samples in results[part].values():
        assert all(len(values) >= 3 and min(values) > 0 for values in samples.values())
    lines = vmm.summary(part, results[part]).splitlines()
    assert lines[0] == vmm.PARTS[part]
    assert len(lines) == 3 + len(next(iter(results[part].values())))
    vmm.plot(tmp_path / "vmm.png", results, title="a card")
    assert (tmp_path / "vmm.png").read_bytes().startswith(b"\x89PNG")
    write_json(str(tmp_path / "vmm.json"), "command", {"samples": vmm.as_json(results)})
    assert set(json.loads((tmp_path / "vmm.json").read_text())["samples"]) == {part}


def test_every_call_is_timed_once_a_round(driver):
    emulation.clear_log()
    found = vmm.calls_by_size(driver, seconds=0, sizes=[64 << 10])
    assert set(found[64 << 10]) == set(vmm.CALLS)
    assert emulation.counts() == dict.fromkeys(
        ("cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemRelease",
         "cuMemAddressFree"), 4,
    )  # fmt: skip


def test_a_run_has_one_access_call_and_one_unmap(driver):
    emulation.clear_log()
    vmm.calls_by_run(driver, seconds=0, runs=[16])
    counts = emulation.counts()
    assert (counts["cuMemMap"], counts["cuMemSetAccess"], counts["cuMemUnmap"]) == (64, 4, 4)
