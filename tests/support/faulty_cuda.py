"""A CUDA driver of which any single call of the library underneath fails when it is told to."""

from __future__ import annotations

from typing import Any

from support import emulated_cuda
from support.faults import Fault
from vattention.memory import CudaDriver

_OUT_OF_MEMORY, _UNKNOWN = 2, 999  # of the second nobody knows what it means, and nothing is lost


class FaultyCuda:
    """What `FaultyDriver` is for the verbs of a driver, for the functions of the CUDA driver API.

    Attributes: those of `FaultyDriver`; `history` has the functions called, up to the driver's closing.
    """

    def __init__(self, fault: Fault | None) -> None:
        self.emulation = emulated_cuda.load()
        self.driver = CudaDriver(tensor_device="cpu")
        self.fault = fault
        self.at_close: int | None = None
        self._before_close: list[str] | None = None
        self._allocated = self.emulation.allocated()
        self._failures = self.emulation.failures
        self.emulation.clear_log()
        if fault is not None:
            code = _OUT_OF_MEMORY if fault.no_memory else _UNKNOWN
            self.emulation.fail("*", code, at=fault.at, onwards=fault.onwards, after=fault.after)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    @property
    def physical_bytes(self) -> int:
        """What the device has given out, in its own count."""
        return self.emulation.allocated() - self._allocated

    @property
    def history(self) -> list[str]:
        return self.emulation.log(everything=True) if self._before_close is None else self._before_close

    @property
    def failures(self) -> int:
        return self.emulation.failures - self._failures

    @property
    def broken(self) -> bool:
        return self.fault is not None and self.fault.onwards

    def repair(self) -> None:
        self.fault = None
        self.emulation.repair()

    def close(self) -> None:
        if not self.driver.closed:
            self.at_close = self.physical_bytes
            self._before_close = self.history
        self.driver.close()
