"""C++ sources of this package, compiled where they run: at first use, by the compiler of the system, for its processor.

A library is kept in the user's cache directory (`$XDG_CACHE_HOME/vattention`, else `~/.cache/vattention`), under a name
that changes with the source, the compiler, the flags and the processor; it takes about two seconds to make. Where that
directory cannot be written, each process makes its own. Several processes may do so at once: each writes a file of its
own, which then takes its name in one step.

Without a compiler there is no library, one warning, and whoever asked computes the same in another way.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_HEADERS = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w", f"-I{_HEADERS}")
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 120

_lock = threading.Lock()
_warned = False


def load(source: Path, **macros: object) -> ctypes.CDLL | None:
    """The library compiled from `source` with these macros defined.

    Returns:
        None where nothing can be compiled, after the one warning, or where the library says (`vattention_works`, see
        pairs.h) that this processor has not what it takes.
    """
    with _lock:
        return _load(source, tuple(f"-D{name}={value}" for name, value in sorted(macros.items())))


def on_demand(source: Path, **returns: Any) -> Callable[[], ctypes.CDLL | None]:
    """A function that gives the library compiled from `source`, as `load` does: at its first call, and then the same.

    Args:
        returns: a function of the library -> the type of what it returns, None for nothing.
    """

    @functools.cache
    def library() -> ctypes.CDLL | None:
        loaded = load(source)
        if loaded is not None:
            for name, kind in returns.items():
                getattr(loaded, name).restype = kind
        return loaded

    return library


def readable(*tensors: torch.Tensor) -> bool:
    """Whether a kernel may read these: on the CPU, of one dtype, their last dimension dense, none to be trained."""
    dtype = tensors[0].dtype
    for x in tensors:  # a loop, as every layer of every pass comes through here
        if not x.is_cpu or x.dtype != dtype or x.stride(-1) != 1:
            return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return not torch.compiler.is_compiling()  # which cannot look into a library; stock operators it can


@functools.cache
def _load(source: Path, macros: tuple[str, ...]) -> ctypes.CDLL | None:
    try:
        compiler = find_compiler()
        command = (*compiler, *_FLAGS, *macros)
        name = f"{source.stem}-{_fingerprint(source, command)}.so"
        kept = _kept(_cache(), name, source, command)
        if kept is not None:
            return _if_it_works(ctypes.CDLL(str(kept)))
        with tempfile.TemporaryDirectory(prefix="vattention-") as own:  # once loaded, a library needs no file
            return _if_it_works(ctypes.CDLL(str(_compile(source, Path(own) / name, command))))
    except (OSError, subprocess.SubprocessError) as error:
        warn(error)
    return None


def _if_it_works(library: ctypes.CDLL) -> ctypes.CDLL | None:
    works = getattr(library, "vattention_works", None)
    return library if works is None or works() else None


def find_compiler() -> tuple[str, ...]:
    """The command that `CXX` names, or the first C++ compiler on the path. Raises FileNotFoundError without one."""
    named = shlex.split(os.environ.get("CXX", ""))
    for name in named[:1] or _COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return (path, *named[1:])
    raise FileNotFoundError(f"no C++ compiler ({' '.join(named[:1]) or ', '.join(_COMPILERS)}) on the path")


def _kept(folder: Path, name: str, source: Path, command: tuple[str, ...]) -> Path | None:
    """The library `name` in `folder`, made if it is not there; None if the folder cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.geteuid():  # what others can replace is not loaded
            return None
        path = folder / name
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as own:
                os.replace(_compile(source, Path(own) / name, command), path)
    except OSError:
        return None  # read-only, full, or no home at all
    return path


def _compile(source: Path, made: Path, command: tuple[str, ...]) -> Path:
    result = subprocess.run(
        [*command, "-o", str(made), str(source)], capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    if result.returncode:
        first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[:200])
        raise subprocess.SubprocessError(f"{' '.join(command[:1])} cannot compile {source.name}: {first.strip()}")
    return made


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vattention"


def _fingerprint(source: Path, command: tuple[str, ...]) -> str:
    """Of everything that decides what the library holds, and whether it runs here."""
    headers = (header.read_bytes() for folder in (_HEADERS, source.parent) for header in sorted(folder.glob("*.h")))
    parts = (
        source.read_bytes(),
        *headers,
        *(part.encode() for part in command),
        _version(command[0]),
        _processor().encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


@functools.cache
def _version(compiler: str) -> bytes:
    """What the compiler says of itself."""
    return subprocess.run([compiler, "--version"], capture_output=True, timeout=_SECONDS, check=False).stdout


@functools.cache
def _processor() -> str:
    """The architecture and what the processor can do: home directories are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    model = next((line for line in lines if line.startswith("model name")), "")
    return f"{platform.machine()} {model} {flags}"


def warn(error: Exception) -> None:
    """Say once in a process that nothing can be compiled here, and that all of it works the slower way."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"{error}: what would be compiled here is left to torch's own operators, which are slower;"
            " install g++, or set CXX",
            RuntimeWarning,
            stacklevel=2,
        )
