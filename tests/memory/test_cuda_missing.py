"""Where CUDA is not there: a ConfigError that says what is missing, and nothing else is lost."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from support import emulated_cuda
from vattention.errors import ConfigError
from vattention.memory import CudaDriver, cuda_calls

pytestmark = pytest.mark.skipif(emulated_cuda.ACTIVE, reason="there is a device in this process")


@pytest.fixture
def bindings(monkeypatch):
    """Put something else in the place of cuda-bindings."""

    def install(module: Any) -> None:
        monkeypatch.setattr(cuda_calls.importlib, "import_module", lambda name: module)

    cuda_calls._initialised.cache_clear()
    yield install
    cuda_calls._initialised.cache_clear()


def api(code: int) -> SimpleNamespace:
    def described(code: int) -> tuple[int, bytes]:
        return 0, f"code {code}".encode()

    return SimpleNamespace(cuInit=lambda flags: (code,), cuGetErrorName=described, cuGetErrorString=described)


def test_without_cuda_bindings(bindings, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.delitem(sys.modules, "cuda.bindings", raising=False)
    monkeypatch.delitem(sys.modules, "cuda.bindings.driver", raising=False)
    with pytest.raises(ConfigError, match=r'pip install "vattention\[cuda\]"'):
        CudaDriver(tensor_device="cpu")


def test_without_the_drivers_library(bindings):
    def missing(flags: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    bindings(SimpleNamespace(cuInit=missing))
    with pytest.raises(ConfigError, match=r"driver library cannot be loaded \(Failed to dlopen libcuda"):
        CudaDriver(tensor_device="cpu")


@pytest.mark.parametrize(
    ("code", "message"), [(100, "there is no CUDA device: look at nvidia-smi"), (803, r"does not start \(code 803 ")]
)
def test_a_driver_that_does_not_start(bindings, code, message):
    bindings(api(code))
    for _ in range(2):
        with pytest.raises(ConfigError, match=message):
            CudaDriver(tensor_device="cpu")


def test_a_child_of_a_process_that_uses_cuda(bindings, monkeypatch):
    bindings(api(0))
    assert cuda_calls.bindings() is not None
    monkeypatch.setattr(cuda_calls.os, "getpid", lambda: 1)
    with pytest.raises(ConfigError, match="spawn"):
        CudaDriver(tensor_device="cpu")
