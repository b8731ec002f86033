"""What the kernel tells of the processes of a session: who is in it, what they have used, what they have loaded."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_LIBRARIES = re.compile(r"/lib(gomp|iomp5|omp|tbb|tcmalloc\w*|jemalloc|mimalloc)[-.\w]*\.so")
_ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")


def members(session: int) -> list[int]:
    """The processes of a session that are not zombies."""
    return [pid for pid, fields in _stats() if int(fields[3]) == session and fields[0] not in "ZX"]


def cpu_seconds(session: int) -> float:
    """CPU time that the living processes of a session have used so far, those of them that they waited for included."""
    return sum(sum(map(int, fields[11:15])) / _TICKS for _, fields in _stats() if int(fields[3]) == session)


def machine_cpu_seconds() -> float:
    """CPU time that everything on this machine has used since it started; stolen time counts as used."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS


def send(session: int, number: signal.Signals) -> None:
    """A signal to every process of a session."""
    for pid in members(session):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def kill(session: int, seconds: float = 10) -> None:
    """End every process of a session, those that are started meanwhile too."""
    deadline = time.monotonic() + seconds
    while members(session) and time.monotonic() < deadline:
        send(session, signal.SIGKILL)
        time.sleep(0.02)


def libraries(session: int) -> tuple[list[str], list[str]]:
    """The threading layers, and the allocators other than libc's, that processes of a session have loaded."""
    found: set[str] = set()
    for pid in members(session):
        try:
            found |= {match[1] for match in _LIBRARIES.finditer(Path(f"/proc/{pid}/maps").read_text())}
        except OSError:  # it has ended
            continue
    allocators = {name for name in found if name.startswith(_ALLOCATORS)}
    return sorted(found - allocators), sorted(allocators)


def _stats() -> list[tuple[int, list[str]]]:
    """Each process with the fields of its stat file from the state on: state, parent, group, session, ..."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                text = Path(entry.path, "stat").read_text()
            except OSError:
                continue
            found.append((int(entry.name), text[text.rindex(")") + 2 :].split()))
    return found
