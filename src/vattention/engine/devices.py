"""Which device a model and its cache go to."""

from __future__ import annotations

import torch

from vattention.errors import ConfigError, VAttentionError
from vattention.memory.cuda_calls import bindings


def pick_device(device: str | torch.device) -> torch.device:
    """What `device` names: "auto", "cpu", "cuda" or "cuda:N". Of a GPU the number is part of the answer.

    "auto" is torch's current GPU where there is one on which a cache can be opened, as far as that is known without
    opening one: a CUDA build of torch that finds it, and cuda-bindings. Else the CPU.

    Raises:
        ConfigError: no such device here. TypeError: not a name.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a string or a torch.device, not {type(device).__name__}")
    if device == "auto":
        return torch.device("cpu") if _why_no_cuda() else _numbered(torch.device("cuda"))
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ConfigError(f'device={device!r} names none: use "auto", "cpu", "cuda" or "cuda:N"') from None
    if place.type == "cpu":
        return torch.device("cpu")
    if place.type != "cuda":
        raise ConfigError(f'device={str(device)!r} is not supported: use "cpu" or "cuda"')
    if reason := _why_no_cuda():
        raise ConfigError(f'device={str(device)!r}: {reason}, or use device="cpu"')
    return _numbered(place)


def _numbered(place: torch.device) -> torch.device:
    number = torch.cuda.current_device() if place.index is None else place.index
    if number >= torch.cuda.device_count():
        raise ConfigError(f'device="cuda:{number}": torch sees {torch.cuda.device_count()} GPUs (CUDA_VISIBLE_DEVICES)')
    return torch.device("cuda", number)


def _why_no_cuda() -> str | None:
    """Why nothing can run on a GPU here, and what to do; None where it can."""
    if torch.version.cuda is None:
        return "torch here has no CUDA: install a build for CUDA"
    if not torch.cuda.is_available():
        return "no GPU found: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    try:
        bindings()
    except VAttentionError as error:
        return str(error)
    return None


def device_memory(device: torch.device) -> int | None:
    """Bytes that torch may still take on a GPU, what it holds in reserve counted; None for a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)
