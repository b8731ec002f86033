"""Looking at weight files before they are loaded: are they all there, are they whole, and will they fit?

The headers say how long a file has to be and how many numbers it holds, so a download that stopped half way, or a
model too large for this machine, is one message in milliseconds and not an error out of some library in minutes.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import torch

from vattention.engine.devices import device_memory
from vattention.errors import ConfigError
from vattention.memory.limits import memory_headroom
from vattention.memory.sizes import format_size

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LFS = b"version https://git-lfs"


def check_safetensors(directory: Path, packed: int = 1) -> int | None:
    """Numbers in the safetensors files of a model directory, or None where it has no such files.

    Args:
        directory: of the model.
        packed: numbers in a byte that is stored as such.

    Raises:
        ConfigError: a file is missing, cut short, or not what its name says.
    """
    index = directory / _INDEX
    if not index.is_file():
        single = directory / _SINGLE
        return _numbers(single, packed) if single.is_file() else None
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError):
        raise ConfigError(f"{index} cannot be read: download it again") from None
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ConfigError(
            f"{directory} is incomplete: {len(missing)} of {len(names)} weight files are missing ({missing[0]}, ...):"
            " finish the download"
        )
    return sum(_numbers(directory / name, packed) for name in names)


def _numbers(path: Path, packed: int) -> int:
    """Numbers in one safetensors file. Source of the format: https://huggingface.co/docs/safetensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if _LFS.startswith(start) and start:
            raise ConfigError(f"{path} is a git-lfs pointer and not the weights: run `git lfs pull` in its directory")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + length > size:
            raise ConfigError(f"the weights in {path} are damaged: {size} bytes, cut short in or before their header")
        try:
            header = json.loads(file.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            end = max((entry["data_offsets"][1] for entry in tensors), default=0)
            numbers = sum(prod(entry["shape"]) * (packed if entry["dtype"] == "U8" else 1) for entry in tensors)
        except (ValueError, LookupError, AttributeError, TypeError):
            raise ConfigError(f"the weights in {path} are damaged: the header cannot be read") from None
    if size < 8 + length + end:
        raise ConfigError(
            f"the weights in {path} are damaged: {format_size(size)} of {format_size(8 + length + end)} are there;"
            " finish the download"
        )
    return numbers


def stored_bytes(directory: Path) -> int:
    """What the safetensors files of a model directory take."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def check_room(what: str, needed: int, why: str = "", *, device: torch.device | None = None) -> None:
    """Raise ConfigError when `needed` bytes of weights are more than this process can still have.

    With the `device` that they go to, more than that has left; a CPU is nothing new.
    """
    left, machine = (memory_headroom(), "") if device is None else (device_memory(device), f" on {device}")
    if left is not None and needed > left:
        raise ConfigError(
            f"{what} needs {format_size(needed)} for its weights{why}, and {format_size(left)} of memory are left"
            f"{machine}: take a smaller model or dtype, or a larger machine"
        )


def bytes_as(numbers: int, dtype: torch.dtype) -> int:
    """What so many numbers take in memory in this dtype."""
    return numbers * dtype.itemsize
