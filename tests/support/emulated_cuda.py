"""The emulated CUDA driver library: built with the system's compiler, found by cuda-bindings in place of the real one.

cuda-bindings opens "libcuda.so.1" at its first call. A library with that name that is loaded already is what it gets,
so loading ours first suffices. It must not be loaded where something else wants the real one: only in processes that
run with VATTENTION_TEST_DRIVER=cuda-emulated (tests/memory/test_cuda_emulated.py starts them).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

ACTIVE = os.environ.get("VATTENTION_TEST_DRIVER") == "cuda-emulated"

_SOURCES = Path(__file__).parent / "libcuda"
_FLAGS = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-fvisibility=hidden", "-shared", "-fPIC", "-pthread"]


def missing() -> str | None:
    """Why the emulation cannot run here, None where it can."""
    if _compiler() is None:
        return "no C compiler to build the emulated CUDA driver with"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed: pip install 'vattention[cuda]'"
    return None


def _compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build() -> Path:
    """The library, compiled once for each version of its sources."""
    compiler = _compiler()
    assert compiler is not None
    sources = sorted(_SOURCES.glob("*.c"))
    text = b"".join(path.read_bytes() for path in sorted(_SOURCES.iterdir()))
    version = hashlib.sha256(text + " ".join([compiler, *_FLAGS]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"vattention-emulated-cuda-{os.getuid()}-{version}"
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished = folder / f"{os.getpid()}.tmp"
        command = [compiler, *_FLAGS, "-Wl,-soname,libcuda.so.1", "-o", unfinished, *sources, "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        unfinished.rename(library)
    return library


class Emulation:
    """The control functions of the library.

    Sizes are bytes. `granularity` is that of handles and addresses, `memory` that of one device, `fill` the byte that
    new memory holds.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.emulation_allocated.restype = ctypes.c_size_t
        library.emulation_configure.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int)
        library.emulation_failures.restype = ctypes.c_long
        library.emulation_fail.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int)
        library.emulation_log_length.restype = ctypes.c_size_t
        library.emulation_log_name.argtypes = (ctypes.c_size_t,)
        library.emulation_log_name.restype = ctypes.c_char_p
        library.emulation_mappings.argtypes = (
            ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t
        )  # fmt: skip
        library.emulation_mappings.restype = ctypes.c_size_t
        library.emulation_capture.argtypes = (ctypes.c_void_p, ctypes.c_int)

    def configure(
        self, *, granularity: int = 2 << 20, memory: int = 8 << 30, devices: int = 1, fill: int = 0xFF
    ) -> None:
        """Another machine. Nothing may be allocated."""
        assert self._library.emulation_configure(granularity, memory, devices, fill) == 0, "memory is allocated"

    def allocated(self, device: int = -1) -> int:
        """Bytes of physical memory on one device, or on all."""
        return self._library.emulation_allocated(device)

    def fail(self, name: str, code: int, *, at: int = 1, onwards: bool = False, after: bool = False) -> None:
        """Let the `at`-th call of `name` ("*": of anything) from now on fail; with `after` once it has acted."""
        self._library.emulation_fail(name.encode(), at, code, onwards, after)

    def repair(self) -> None:
        """Everything works again, a lost context too."""
        self._library.emulation_repair()

    def reset(self) -> None:
        """The state of a new process, but for reserved addresses, which stay."""
        self._library.emulation_reset()

    @property
    def failures(self) -> int:
        """How many calls failed because they were told to."""
        return self._library.emulation_failures()

    def clear_log(self) -> None:
        """Forget the calls so far."""
        self._library.emulation_log_clear()

    def log(self, *, everything: bool = False) -> list[str]:
        """The functions called since the log was cleared: those that have an effect, or all that `fail("*")` counts."""
        length = self._library.emulation_log_length()
        names = [self._library.emulation_log_name(index).decode() for index in range(length)]
        left_out = {"cuCtxPopCurrent"} if everything else {"cuCtxPushCurrent", "cuCtxPopCurrent"}
        return [name for name in names if name not in left_out]

    def counts(self) -> Counter[str]:
        """How often each function was called since the log was cleared."""
        return Counter(self.log())

    def mappings(self, address: int, size: int) -> list[tuple[int, int, int, int]]:
        """What is mapped in a range: address, handle, size and access (0, 1 or 3) of each."""
        count = self._library.emulation_mappings(address, size, None, 0)
        out = ((ctypes.c_uint64 * 4) * max(count, 1))()
        self._library.emulation_mappings(address, size, out, count)
        return [tuple(out[index]) for index in range(count)]

    def capture(self, stream: int, capturing: bool) -> None:
        """Begin or end capturing a stream into a graph."""
        assert self._library.emulation_capture(stream, capturing) == 0


@functools.cache
def load() -> Emulation:
    """The library in this process. Before anything calls cuda-bindings."""
    assert ACTIVE, "set VATTENTION_TEST_DRIVER=cuda-emulated, in a process that does nothing else with CUDA"
    return Emulation(ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL))
