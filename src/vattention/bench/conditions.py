"""Whether the sides of a comparison work under the same conditions: said by each of itself, seen from outside."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vattention.bench import processes
from vattention.bench.side import Side


@dataclass(frozen=True)
class Conditions:
    """What one side works under.

    Attributes:
        engine, version: what it is.
        weights, kv: element types of the weights and of the KV cache that it found in itself, like "bfloat16".
        threads: of the process that computes, as it says.
        prefix_caching: whether it keeps beginnings that requests share.
        max_num_seqs, max_num_batched_tokens: requests and tokens in one pass; None where it has no such limit.
        compiled: in its own words.
        threading: the threading layers that its processes have loaded.
        allocators: of those, the allocators other than libc's.
        preloaded: libraries that LD_PRELOAD names in the process that computes.
        wait_policy: OMP_WAIT_POLICY there; "" where it is not set.
        warm: whole rounds that were not counted.
        vocab_size: None where it does not say.
    """

    engine: str
    version: str | None
    weights: tuple[str, ...]
    kv: tuple[str, ...]
    threads: int
    prefix_caching: bool
    max_num_seqs: int
    max_num_batched_tokens: int | None
    compiled: str
    threading: tuple[str, ...]
    allocators: tuple[str, ...]
    preloaded: tuple[str, ...]
    wait_policy: str
    warm: int
    vocab_size: int | None = None


def conditions_of(side: Side, said: Mapping[str, Any], *, warm: int) -> Conditions:
    """Conditions from what the side has said at its start, and what the kernel says of it. To be called while it is
    alive and warm, as libraries load late."""
    threading, allocators = processes.libraries(side.session)
    preloaded = {os.path.basename(path) for path in re.split("[: ]", said["environment"]["LD_PRELOAD"]) if path}
    return Conditions(
        engine=said["engine"],
        version=said["version"],
        weights=_plain(said["weights"]),
        kv=_plain(said["kv"]),
        threads=said["threads"],
        prefix_caching=said["prefix_caching"],
        max_num_seqs=said["max_num_seqs"],
        max_num_batched_tokens=said["max_num_batched_tokens"],
        compiled=said["compiled"],
        threading=tuple(threading),
        allocators=tuple(allocators),
        preloaded=tuple(sorted(preloaded)),
        wait_policy=said["environment"]["OMP_WAIT_POLICY"],
        warm=warm,
        vocab_size=said.get("vocab_size"),
    )


def rows(sides: Sequence[Conditions]) -> list[tuple[str, ...]]:
    """A row for each condition: its name, what it is on each side, and "same", "DIFFERENT", or "" where it is each
    engine's own matter."""
    own = (
        ("engine", [f"{side.engine} {side.version or ''}".strip() for side in sides]),
        ("threading layer", [_list(side.threading) for side in sides]),
        ("preloaded", [_list(side.preloaded) or "nothing" for side in sides]),
        ("compiled", [side.compiled for side in sides]),
        ("tokens in a pass", [str(side.max_num_batched_tokens or "no limit") for side in sides]),
    )
    return [
        *((name, *values, "") for name, values in own),
        *((name, *shown, "same" if same else "DIFFERENT") for name, shown, same in _compared(sides)),
    ]


def differences(sides: Sequence[Conditions]) -> list[str]:
    """In words, whatever must be equal and is not."""
    return [f"{name}: {' and '.join(shown)}" for name, shown, same in _compared(sides) if not same]


def _compared(sides: Sequence[Conditions]) -> list[tuple[str, list[str], bool]]:
    """Name, what to show, whether all are the same. Bytes are moved, so two types of 16 bits are the same work."""
    found = []
    for name, shown, compared in (
        ("weights", [_list(s.weights) for s in sides], [_bits(s.weights) for s in sides]),
        ("K and V", [_list(s.kv) for s in sides], [_bits(s.kv) for s in sides]),
        ("threads", [str(s.threads) for s in sides], [s.threads for s in sides]),
        ("requests in a pass", [str(s.max_num_seqs) for s in sides], [s.max_num_seqs for s in sides]),
        ("prefix caching", ["on" if s.prefix_caching else "off" for s in sides], [s.prefix_caching for s in sides]),
        ("allocator", [_list(s.allocators) or "libc's" for s in sides], [s.allocators for s in sides]),
        ("OpenMP threads wait", [s.wait_policy or "by default" for s in sides], [s.wait_policy for s in sides]),
        ("warm-up rounds", [str(s.warm) for s in sides], [s.warm for s in sides]),
    ):
        found.append((name, shown, all(value == compared[0] for value in compared)))
    return found


def _bits(types: Sequence[str]) -> list[str]:
    """Bits of the widest of these types, or the types as they are where their names do not tell."""
    numbers = [re.findall(r"\d+", name) for name in types]
    if not numbers or not all(numbers):
        return list(types)
    return [max((found[0] for found in numbers), key=int)]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _plain(types: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.removeprefix("torch.") for name in types)
