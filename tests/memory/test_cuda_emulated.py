"""The CUDA driver, and the suite of pool, reservation and cache on it, on an emulated device.

In a process of its own, because cuda-bindings takes the first library called libcuda.so.1 for the real one, and nothing
else that uses CUDA may find ours. To run a file by hand:

    VATTENTION_TEST_DRIVER=cuda-emulated python -m pytest tests/memory/test_cuda.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import emulated_cuda

TEST_ALL = os.environ.get("VATTENTION_TEST_ALL") == "1"
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(emulated_cuda.ACTIVE, reason="this is that process"),
    pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing())),
]

DRIVER = [
    "tests/memory/test_cuda.py",
    "tests/memory/test_cuda_in_flight.py",
    "tests/memory/test_reservation.py",
    "tests/cache/test_kv_cache.py",
    "tests/bench/test_vmm.py",
    "tests/gpu",
    *("-m", "gpu or not gpu"),
]
FAULTS = ["tests/cache/test_faults.py", "-k", "own and calls"]
EVERYTHING = [
    "tests/cache",
    "tests/memory/test_pool_property.py",
    "tests/memory/test_reservation.py",
    "tests/test_gpu_check.py",
]


def run(arguments: list[str], *, at_least: int, **environment: str) -> None:
    """Run pytest on an emulated device. Everything must pass, and not too little must have run."""
    emulated_cuda.build()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    variables = {"VATTENTION_TEST_DRIVER": "cuda-emulated", "OMP_NUM_THREADS": "1", **environment}
    if TEST_ALL:
        command.append("--timeout=0")
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=None if TEST_ALL else 280
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    summary = done.stdout.strip().splitlines()[-1]
    print(summary)
    assert int(re.search(r"(\d+) passed", summary)[1]) >= at_least


@pytest.mark.timeout(0 if TEST_ALL else 300)
def test_driver_and_cache():
    run(DRIVER, at_least=100)


@pytest.mark.timeout(0 if TEST_ALL else 300)
def test_any_call_may_fail():
    run(FAULTS, at_least=3)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_the_whole_suite():
    """At the size of `make test`; the full size is for the host's driver."""
    run(EVERYTHING, at_least=150, VATTENTION_TEST_ALL="0")
