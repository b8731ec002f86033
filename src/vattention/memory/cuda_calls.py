"""The CUDA driver API with every return code looked at. Source: https://docs.nvidia.com/cuda/cuda-driver-api/"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

from vattention.errors import ConfigError, DriverError

SUCCESS = 0
INVALID_VALUE = 1
OUT_OF_MEMORY = 2
_NO_DEVICE = 100
_CAPTURING = 900
_CAPTURE_CODES = range(900, 909)

_STICKY = frozenset(
    {
        4,  # the driver is shutting down
        214,  # uncorrectable memory error
        220,  # the same on NVLink
        226,  # contained memory error
        700,  # a kernel touched an address it had no access to
        702,  # a kernel ran too long
        709,  # the context is destroyed
        710,  # an assertion in a kernel
        714,  # stack error
        715,  # illegal instruction
        716,  # misaligned address
        717,  # invalid address space
        718,  # invalid program counter
        719,  # launch failed
    }
)
"""Codes after which the context answers nothing else: they belong to work submitted earlier, not to the call."""

_ADVICE = {
    INVALID_VALUE: "the driver refuses the arguments, which is a mistake of ours: please report it with this message",
    OUT_OF_MEMORY: "no device memory is left: lower the memory budget, or stop what else uses the device",
    3: "CUDA is not initialised here: do not use it across fork, start processes with the spawn method",
    201: "the device context is gone: do not reset the device while a cache is open",
    800: "the system does not permit it: look at the sandbox or container's device permissions",
    801: "this device or driver does not support it: update the driver, or use another device",
    304: "the operating system refused it: look at the limits of the process and of its container",
}


def bindings() -> ModuleType:
    """The module `cuda.bindings.driver`, with CUDA initialised.

    Raises:
        ConfigError: cuda-bindings, the driver library or a device is missing, or a parent process uses CUDA.
    """
    driver, owner = _initialised()
    if os.getpid() != owner:
        raise ConfigError("the parent process uses CUDA, which does not survive fork: start processes with 'spawn'")
    return driver


@functools.cache
def _initialised() -> tuple[ModuleType, int]:
    """The module, and the process that initialised CUDA."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise ConfigError(
            f'CUDA memory needs the package cuda-bindings ({error}): pip install "vattention[cuda]"'
        ) from error
    try:
        (code,) = driver.cuInit(0)
    except Exception as error:
        raise ConfigError(
            f"the CUDA driver library cannot be loaded ({error}): install NVIDIA's driver, or use device='cpu'"
        ) from error
    if code != SUCCESS:
        what = "there is no CUDA device" if code == _NO_DEVICE else f"CUDA does not start ({_meaning(driver, code)})"
        raise ConfigError(f"{what}: look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use device='cpu'")
    return driver, os.getpid()


def _meaning(driver: ModuleType, code: Any) -> str:
    """What the driver calls a code: "CUDA_ERROR_INVALID_VALUE (1, invalid argument)"."""
    texts = []
    for describe in (driver.cuGetErrorName, driver.cuGetErrorString):
        _, text = describe(code)
        texts.append(text.decode() if text else "unknown")
    return f"{texts[0]} ({int(code)}, {texts[1]})"


class CudaCalls:
    """Functions of the driver API as methods: `calls("cuMemMap", ...)` returns what the function returns, or raises.

    Attributes:
        lost: the error by which the device's context was lost, None while it works. From then on nothing is called.
    """

    def __init__(self) -> None:
        self.api = bindings()
        self.lost: DriverError | None = None

    def __call__(self, name: str, *args: Any) -> Any:
        """Call the function; return its one result, a tuple of several, or None.

        Raises:
            DriverError: any code but success.
        """
        if self.lost is not None:
            raise DriverError(name, self.lost.code, f"not called. {self.lost}", meaning="a lost device context")
        try:
            code, *results = getattr(self.api, name)(*args)
        except OverflowError as error:  # a size that no device has
            raise DriverError(name, INVALID_VALUE, "ask for less", meaning=str(error)) from error
        if code != SUCCESS:
            raise self.failure(name, int(code), _meaning(self.api, code))
        if not results:
            return None
        return results[0] if len(results) == 1 else tuple(results)

    def failure(self, name: str, code: int, meaning: str) -> DriverError:
        """The error for a code, remembered when no other call can succeed any more."""
        if code in _STICKY:
            advice = (
                "the device context is lost and only a new process gets another. The work that caused it was"
                " submitted before this call; compute-sanitizer finds it"
            )
        elif code in _CAPTURE_CODES:
            advice = "a stream is being captured into a graph: step, trim and free before the capture or after it"
        else:
            advice = _ADVICE.get(code, "look the code up in the CUDA driver API's documentation")
        error = DriverError(name, code, advice, out_of_memory=code == OUT_OF_MEMORY, meaning=meaning)
        if code in _STICKY:
            self.lost = error
        return error
