"""Small whole numbers of a pass, from lists to where they are used."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def place(
    lists: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype = torch.int64
) -> tuple[torch.Tensor, ...]:
    """Each list as a tensor of one dimension on `device`.

    To a GPU all of them travel in one copy from pinned memory, which nobody waits for; the tensors then share storage.
    """
    if device.type == "cpu":
        return tuple(torch.tensor(numbers, dtype=dtype) for numbers in lists)
    return _split(_joined(lists, dtype, pin=device.type == "cuda").to(device, non_blocking=True), lists)


def _joined(lists: Sequence[Sequence[int]], dtype: torch.dtype, *, pin: bool) -> torch.Tensor:
    return torch.tensor([number for numbers in lists for number in numbers], dtype=dtype, pin_memory=pin)


def _split(joined: torch.Tensor, lists: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
    return joined.split([len(numbers) for numbers in lists])
