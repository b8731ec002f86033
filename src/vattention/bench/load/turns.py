"""Servers at work in turns: while one is measured, the others that we have started are stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

from vattention.bench import processes
from vattention.bench.load.arrivals import Arrivals
from vattention.bench.load.figures import Figures
from vattention.bench.load.requests import Form, asks
from vattention.bench.load.servers import ServerProcess
from vattention.bench.load.target import Target, run_load
from vattention.bench.table import table
from vattention.bench.trace import Lengths

T = TypeVar("T")

_NUDGE = (Lengths(4, 2),)
_NUDGE_TIMEOUT = 120.0


class Turns:
    """Sides that take turns, and what the machine did meanwhile.

    Args:
        targets: by name; the first is ours, or what stands in its place.
        started: those that run as processes of ours. Only they can be stopped, and their CPU time be seen.
        form: of the requests.
    """

    def __init__(self, targets: Mapping[str, Target], started: Mapping[str, ServerProcess], form: Form) -> None:
        self._form = form
        self._targets = dict(targets)
        self._started = dict(started)
        self.names = list(targets)
        self._busy: dict[str, list[float]] = {name: [] for name in targets}
        self._client: dict[str, list[float]] = {name: [] for name in targets}
        self._taken: dict[str, list[float]] = {name: [] for name in targets}
        self._others_seconds = 0.0
        for server in self._started.values():
            server.stop()

    def alone(self, name: str, work: Callable[[Target], T]) -> T:
        """Let one side work, the others being stopped."""
        server = self._started.get(name)
        with nullcontext() if server is None else server.at_work():
            return work(self._targets[name])

    def round(self, number: int, work: Callable[[Target], Figures]) -> dict[str, Figures]:
        """What `work` returns of each side. Even rounds begin with the first, odd ones with the last."""
        found = {}
        for name in self.names if number % 2 == 0 else reversed(self.names):
            found[name] = self.alone(name, lambda target: self._watched(target, work))
        return {name: found[name] for name in self.names}

    def _watched(self, target: Target, work: Callable[[Target], Figures]) -> Figures:
        # A server that was stopped finds its caches cold and its clocks low: two tokens that nobody counts.
        nudge = asks(self._form, target.model, _NUDGE, seed="nudge")
        run_load(target, nudge, Arrivals("nudge"), timeout=_NUDGE_TIMEOUT)
        own = self._started.get(target.name)
        others = [each for name, each in self._started.items() if name != target.name]
        idle, used = sum(each.cpu_seconds() for each in others), 0.0 if own is None else own.cpu_seconds()
        everything = processes.machine_cpu_seconds()
        found = work(target)
        used = (0.0 if own is None else own.cpu_seconds()) - used
        everything = processes.machine_cpu_seconds() - everything
        self._others_seconds += sum(each.cpu_seconds() for each in others) - idle
        self._client[target.name].append(found.client_cpu / found.seconds)
        if own is not None:
            self._busy[target.name].append(used / found.seconds)
            self._taken[target.name].append(max(0.0, everything - used - found.client_cpu) / found.seconds)
        return found

    def report(self) -> str:
        """The conditions, after the last round."""

        def row(what: str, shares: Mapping[str, list[float]]) -> tuple[str, ...]:
            return (what, *(f"{sum(shares[name]) / len(shares[name]):.2f}" for name in self.names))

        rows = [row("cores that this generator took", self._client)]
        if self._started:
            rows += [row("cores busy while at work", self._busy), row("cores that others took", self._taken)]
            libraries = {name: processes.libraries(each.session) for name, each in self._started.items()}
            rows.append(("threading layer", *(", ".join(libraries[name][0]) for name in self.names)))
            rows.append(("allocator", *(", ".join(libraries[name][1]) or "libc's" for name in self.names)))
        lines = [table(("conditions", *self.names), rows, left=1 + len(self.names))]
        if len(self._started) > 1:
            lines.append(
                f"servers not at work are stopped; they used {self._others_seconds:.2f} s of CPU time meanwhile"
            )
        elif len(self.names) > 1:
            lines.append("these servers were not started here: nobody stops the one that is not at work")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The same for a file."""
        return {
            "targets": {name: {"url": each.address.url, "model": each.model} for name, each in self._targets.items()},
            "threads_may_run_on": sorted(os.sched_getaffinity(0)),
            "cores_busy": self._busy,
            "cores_of_the_generator": self._client,
            "cores_taken_by_others": self._taken,
            "stopped_sides_cpu_seconds": self._others_seconds,
        }
