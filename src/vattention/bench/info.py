"""What this machine allows: drivers, limits, memory, versions."""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import torch

from vattention.bench.geometry import GEOMETRIES
from vattention.bench.machine import hardware, versions
from vattention.bench.table import table
from vattention.cache import KVLayout
from vattention.cache.choosing import Place, choose
from vattention.cache.page_size import choose_page_size
from vattention.errors import VAttentionError
from vattention.memory import CudaDriver, HostDriver, limits
from vattention.memory.sizes import format_size

_BUDGETS = tuple(size << 20 for size in (64, 256, 1024, 4096, 16384))
_SLOTS = 16
_EXPECTED = (512, 8192, 131072)
_HOST, _GPU, _GPU_PAGE = 4 << 30, 48 << 30, 2 << 20
_OVERCOMMIT = {0: "heuristic", 1: "always", 2: "never: reservations count against the commit limit"}


def show(as_json: bool) -> int:
    """Print what is known of this machine, as tables or as JSON; returns the exit code."""
    known = collect()
    print(json.dumps(known, indent=1) if as_json else _text(known))
    return 0


def collect() -> dict[str, Any]:
    """Everything `vattention info` shows; bytes and counts, None for what the system does not tell."""
    granularity = os.sysconf("SC_PAGESIZE")
    mappings: int | None = None
    try:
        driver = HostDriver()
    except VAttentionError as error:
        host: dict[str, Any] = {"available": False, "reason": str(error)}
    else:
        granularity, mappings = driver.granularity, driver.mappings.limit
        host = {"available": True, "granularity": granularity, "mapping_budget": mappings}
        driver.close()
    return {
        "versions": versions(),
        "hardware": hardware(),
        "drivers": {"host": host, "cuda": _cuda()},
        "limits": {
            "memfd": hasattr(os, "memfd_create"),
            "kernel_page_size": os.sysconf("SC_PAGESIZE"),
            "max_map_count": limits.max_map_count(),
            "mappings_in_use": limits.mappings_in_use(),
            "address_space": limits.address_space_limit(),
            "overcommit_memory": limits.overcommit_policy(),
        },
        "memory": {"system_available": limits.available_memory(), "cgroup_headroom": limits.cgroup_headroom()},
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "default_page_size": _page_sizes(granularity, mappings),
        "layouts": _layouts(Place("cpu", _HOST, granularity, mappings), Place("cuda", _GPU, _GPU_PAGE)),
    }


def _cuda() -> dict[str, Any]:
    """The first CUDA device, or what is missing."""
    try:
        driver = CudaDriver()
        free, total = driver.memory()
    except VAttentionError as error:
        return {"available": False, "reason": str(error)}
    driver.close()
    return {"available": True, "granularity": driver.granularity, "free_bytes": free, "memory_bytes": total}


def _page_sizes(granularity: int, mappings: int | None) -> dict[str, dict[str, int]]:
    """Model -> budget in bytes -> page size that a cache of it would choose, in bytes."""
    sizes: dict[str, dict[str, int]] = {}
    for name in ("smollm2-135m", "llama-3-8b"):
        model = GEOMETRIES[name]
        layout = model.layout(_SLOTS, layers=model.layers, head_major=False, layers_per_stream=1, kv_together=False)
        sizes[name] = {str(budget): choose_page_size(layout, budget, granularity, mappings) for budget in _BUDGETS}
    return sizes


def _layouts(*places: Place) -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> device -> expected tokens -> the layout that an engine would choose, see `Choice`."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, place in itertools.product(("smollm2-135m", "llama-3-8b"), places):
        model = GEOMETRIES[name]
        for tokens in _EXPECTED:
            layout = KVLayout(model.layers, model.kv_heads, model.head_dim, model.dtype, _SLOTS, max(_EXPECTED))
            choice = choose(layout, place, expected_tokens=tokens)
            found.setdefault(name, {}).setdefault(place.device, {})[str(tokens)] = {
                "layout": choice.layout.name,
                "page_size": choice.page_size,
                "tokens_per_page": choice.tokens_per_page,
                "expected_waste": round(choice.expected_waste, 4),
                "reason": choice.reason,
            }
    return found


def _size(value: int | None, none: str) -> str:
    return none if value is None else format_size(value)


def _text(known: dict[str, Any]) -> str:
    version, machine = known["versions"], known["hardware"]
    host, cuda = known["drivers"]["host"], known["drivers"]["cuda"]
    limit, memory, threads = known["limits"], known["memory"], known["threads"]
    policy, cgroup = limit["overcommit_memory"], memory["cgroup_headroom"]
    if cgroup is not None and cgroup > machine["memory_bytes"]:  # how cgroup v1 says that there is no limit
        cgroup = None
    rows = [
        ("host driver", "ready" if host["available"] else f"not available: {host['reason']}"),
        ("CUDA driver", "ready" if cuda["available"] else f"not available: {cuda['reason']}"),
        ("granularity of pages", _size(host.get("granularity"), "unknown")),
        ("memfd", "yes" if limit["memfd"] else "no"),
        ("kernel page", format_size(limit["kernel_page_size"])),
        ("mappings in use", f"{limit['mappings_in_use']} of {limit['max_map_count']} (vm.max_map_count)"),
        ("mappings a cache may use", host.get("mapping_budget", "none")),
        ("address space (ulimit -v)", _size(limit["address_space"], "unlimited")),
        ("vm.overcommit_memory", "unknown" if policy is None else f"{policy} ({_OVERCOMMIT.get(policy, 'unknown')})"),
        ("memory the system has left", _size(memory["system_available"], "unknown")),
        ("memory the cgroup has left", _size(cgroup, "no limit")),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores usable"),
        ("memory", format_size(machine["memory_bytes"])),
        ("kernel", machine["kernel"]),
        ("torch threads", f"{threads['torch']} (OMP_NUM_THREADS {threads['OMP_NUM_THREADS'] or 'not set'})"),
        ("versions", ", ".join(f"{name} {number or 'not installed'}" for name, number in version.items())),
    ]
    chosen = known["default_page_size"]
    pages = table(
        ("page chosen for a budget of", *(format_size(budget) for budget in _BUDGETS)),
        [(name, *map(format_size, by_budget.values())) for name, by_budget in chosen.items()],
    )
    layouts = table(
        ("layout chosen", "for requests of", "", "page", "tokens", "waste"),
        [
            (f"{name}, {device}", tokens, each["layout"], format_size(each["page_size"]), each["tokens_per_page"],
             f"{each['expected_waste']:.1%}")
            for name, by_device in known["layouts"].items()
            for device, by_tokens in by_device.items()
            for tokens, each in by_tokens.items()
        ],
        left=3,
    )  # fmt: skip
    return (
        f"{table(('', ''), rows, left=2)}\n\n{pages}\n({_SLOTS} slots, token-major)\n\n{layouts}\n({_SLOTS} slots;"
        f" budgets of {format_size(_HOST)} and {format_size(_GPU)}, of a GPU with {format_size(_GPU_PAGE)} pages)"
    )
