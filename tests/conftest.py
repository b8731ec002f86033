"""What every test may rely on.

No test reaches a model hub. Tests marked `gpu` are skipped where there is no CUDA device, tests marked `slow` unless
VATTENTION_TEST_ALL=1, which also loads the larger hypothesis profile. A state machine under the profile "ci" runs
100 x 200 = 20,000 steps, the same ones every time; under "all" 5,000 x 200 = 1,000,000 fresh ones.
"""

import os
import signal
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch
from hypothesis import HealthCheck, settings

from support import drivers, emulated_cuda

# Whoever is started in the background ignores it, and so would the children that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # tiny operations on two busy cores are several times slower with two threads

TEST_ALL = os.environ.get("VATTENTION_TEST_ALL") == "1"

settings.register_profile("ci", max_examples=100, stateful_step_count=200, derandomize=True, deadline=None)
settings.register_profile(
    "all", max_examples=5_000, stateful_step_count=200, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("all" if TEST_ALL else "ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_slow = pytest.mark.skip(reason="slow: make test-all")
    skip_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "slow" in item.keywords and not TEST_ALL:
            item.add_marker(skip_slow)
        if "gpu" in item.keywords and not drivers.EMULATED and not _cuda_available():
            item.add_marker(skip_gpu)


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _a_device_that_works() -> Iterator[None]:
    """On the emulated device, no failure that one test planned reaches the next."""
    yield
    if drivers.EMULATED:
        emulated_cuda.load().repair()


@pytest.fixture(scope="session")
def full_size() -> bool:
    """True under VATTENTION_TEST_ALL=1: a test may then grow to its full size."""
    return TEST_ALL
