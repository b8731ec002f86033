"""What this machine and this process may still take: memory, mappings, addresses.

Every reader takes `root`, so that tests can show it another machine's /proc and /sys.
Sources: proc(5), https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
DEFAULT_MAX_MAP_COUNT = 65530


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _fields(text: str, separator: str | None = None) -> dict[str, int]:
    """Lines of "name value" (or "name: value kB") as numbers, in the unit of the file."""
    fields = {}
    for line in text.splitlines():
        name, _, value = line.partition(separator or " ")
        number = value.split()
        if number and number[0].isdigit():
            fields[name.strip()] = int(number[0])
    return fields


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdigit() else None


def available_memory(root: Path = _ROOT) -> int | None:
    """Bytes the system could give out without swapping (MemAvailable)."""
    kib = _fields(_read(root / "proc/meminfo") or "", ":").get("MemAvailable")
    return None if kib is None else kib * 1024


def _ancestors(base: Path, path: str) -> Iterator[Path]:
    """The cgroup directories from `path` up to the root of the hierarchy mounted at `base`.

    Inside a container the path of /proc/self/cgroup may not exist under the mount: the mount's root then is ours.
    """
    group = base / path.strip("/")
    while not group.is_dir() and group != base:
        group = group.parent
    yield group
    while group != base:
        group = group.parent
        yield group


def _group_headroom(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """Bytes left in one cgroup; file cache that the kernel can drop counts as left."""
    bound, used = _number(group / limit), _number(group / usage)
    if bound is None or used is None:  # "max" is not a number: no bound
        return None
    droppable = _fields(_read(group / "memory.stat") or "").get(cache, 0)
    return max(0, bound - used + droppable)


def cgroup_headroom(root: Path = _ROOT) -> int | None:
    """Bytes left in this process's memory cgroups, v1 or v2, the tightest of all ancestors; None without a limit."""
    rooms: list[int | None] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon:
            continue
        if controllers == "":
            for base in (root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"):
                for group in _ancestors(base, path):
                    rooms.append(_group_headroom(group, "memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            for group in _ancestors(root / "sys/fs/cgroup/memory", path):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                rooms.append(_group_headroom(group, *names))
    return min((room for room in rooms if room is not None), default=None)


def memory_headroom(root: Path = _ROOT) -> int | None:
    """Bytes of physical memory this process can still have: the system's and every cgroup's word, the smallest."""
    rooms = [room for room in (available_memory(root), cgroup_headroom(root)) if room is not None]
    return min(rooms, default=None)


def max_map_count(root: Path = _ROOT) -> int:
    """The kernel's limit of mappings a process (vm.max_map_count), its default where it cannot be read."""
    return _number(root / "proc/sys/vm/max_map_count") or DEFAULT_MAX_MAP_COUNT


def mappings_in_use(root: Path = _ROOT) -> int:
    """Mappings this process has now."""
    return (_read(root / "proc/self/maps") or "").count("\n")


def overcommit_policy(root: Path = _ROOT) -> int | None:
    """vm.overcommit_memory: 0 heuristic, 1 always, 2 never."""
    return _number(root / "proc/sys/vm/overcommit_memory")


def address_space_limit() -> int | None:
    """RLIMIT_AS in bytes, None when unlimited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft
