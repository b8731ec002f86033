"""The limits of a machine, read from pictures of other machines' /proc and /sys."""

from pathlib import Path

import pytest

from vattention.memory import limits


def machine(root: Path, **files: str) -> Path:
    """A fake root directory; `__` in a name stands for a slash, and DOT for a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       1000 kB\nMemAvailable:    800 kB\n"


def test_a_machine_without_limits_has_what_is_available(tmp_path):
    root = machine(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n")
    assert limits.memory_headroom(root) == 800 * 1024


def test_cgroup_v2_counts_every_ancestor_and_forgives_file_cache(tmp_path):
    root = machine(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="0::/outer/inner\n",
        sys__fs__cgroup__outer__memoryDOTmax="100000\n",
        sys__fs__cgroup__outer__memoryDOTcurrent="90000\n",
        sys__fs__cgroup__outer__memoryDOTstat="anon 1\ninactive_file 5000\n",
        sys__fs__cgroup__outer__inner__memoryDOTmax="max\n",
        sys__fs__cgroup__outer__inner__memoryDOTcurrent="70000\n",
    )
    assert limits.cgroup_headroom(root) == 15000
    assert limits.memory_headroom(root) == 15000


def test_cgroup_v2_inside_a_container_whose_path_is_not_mounted(tmp_path):
    root = machine(
        tmp_path,
        proc__self__cgroup="0::/docker/abc\n",
        sys__fs__cgroup__memoryDOTmax="1000\n",
        sys__fs__cgroup__memoryDOTcurrent="400\n",
    )
    assert limits.cgroup_headroom(root) == 600


def test_cgroup_v1(tmp_path):
    root = machine(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="5:cpu,cpuacct:/x\n4:memory:/job\n",
        sys__fs__cgroup__memory__memoryDOTlimit_in_bytes="9223372036854771712\n",
        sys__fs__cgroup__memory__memoryDOTusage_in_bytes="500000\n",
        sys__fs__cgroup__memory__job__memoryDOTlimit_in_bytes="200000\n",
        sys__fs__cgroup__memory__job__memoryDOTusage_in_bytes="150000\n",
        sys__fs__cgroup__memory__job__memoryDOTstat="total_inactive_file 1000\n",
    )
    assert limits.memory_headroom(root) == 51000


def test_a_full_cgroup_has_nothing_left(tmp_path):
    root = machine(
        tmp_path,
        proc__self__cgroup="0::/a\n",
        sys__fs__cgroup__a__memoryDOTmax="1000\n",
        sys__fs__cgroup__a__memoryDOTcurrent="1200\n",
    )
    assert limits.memory_headroom(root) == 0


def test_nothing_readable_means_nothing_known(tmp_path):
    assert limits.memory_headroom(tmp_path) is None
    assert limits.max_map_count(tmp_path) == limits.DEFAULT_MAX_MAP_COUNT
    assert limits.mappings_in_use(tmp_path) == 0
    assert limits.overcommit_policy(tmp_path) is None


def test_this_machine_answers():
    assert limits.available_memory() > 1 << 20
    assert limits.mappings_in_use() > 10
    assert limits.max_map_count() == int(Path("/proc/sys/vm/max_map_count").read_text())
    assert limits.overcommit_policy() in (0, 1, 2)


def test_address_space_limit_is_rlimit_as(monkeypatch):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (123 << 20, limits.resource.RLIM_INFINITY))
    assert limits.address_space_limit() == 123 << 20
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (limits.resource.RLIM_INFINITY,) * 2)
    assert limits.address_space_limit() is None


@pytest.mark.parametrize("text", ["", "not a cgroup file"])
def test_odd_cgroup_files_are_no_limit(tmp_path, text):
    root = machine(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=text)
    assert limits.memory_headroom(root) == 800 * 1024
