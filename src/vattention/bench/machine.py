"""What a result was measured on, and with: no figure travels without it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vattention.errors import ConfigError

_NO_SETTINGS = ("command", "json", "plot", "api_key")
_PACKAGES = ("vattention", "torch", "transformers", "numpy", "cuda-bindings")


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in bytes, kernel."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) * 1024,
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }


def versions() -> dict[str, str | None]:
    """Python's, and those of the packages that matter; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_writable(path: str | None) -> None:
    """Raises ConfigError now rather than after the measurement, if no file can be written at `path`."""
    if path is None:
        return
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"cannot write {path}: there is no directory {folder}")
    if Path(path).is_dir() or not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise ConfigError(f"cannot write {path}: it is a directory, or not ours to write")


def settings_of(options: Any) -> dict[str, Any]:
    """The options of a command, a dataclass, for its result: all but keys, and what says where to write."""
    return {name: value for name, value in asdict(options).items() if name not in _NO_SETTINGS}


def write_json(path: str | None, command: str, result: Mapping[str, Any]) -> None:
    """Write `result` with the command, the date, the hardware and the versions; nothing for None.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        return
    record = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        **result,
    }
    try:
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _field(path: str, name: str) -> str | None:
    """The first "name: value" of a file of the kernel."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
