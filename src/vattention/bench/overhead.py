"""`vattention bench serve --overhead`: our engine over HTTP, streaming, against itself offline on the same work.

Two processes take turns: `LLM.generate` with all prompts, and a server that gets all of them at the same moment. Both
turn tokens into text. What is lost between them is what HTTP and streaming cost, the generator of the load included,
which runs on the same machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from vattention.bench.contest import OWN_WORKER, ContestOptions, readable, tell, threads_of
from vattention.bench.load.arrivals import Arrivals
from vattention.bench.load.figures import Figures
from vattention.bench.load.requests import Form, asks
from vattention.bench.load.servers import ServerProcess
from vattention.bench.load.target import Target, run_load, target_of
from vattention.bench.machine import check_writable, settings_of, write_json
from vattention.bench.ratios import ratio, spread
from vattention.bench.serve import check_servers, started
from vattention.bench.side import Side, environment_for
from vattention.bench.table import table
from vattention.bench.workload import Case, fixed
from vattention.errors import ConfigError, EngineError
from vattention.memory.sizes import parse_size

_SHARE = 0.95


@dataclass(frozen=True)
class OverheadBench:
    """The options of the command.

    Attributes:
        num_requests: at once, in every round of both sides.
        vocab_size: token ids of the prompts are below it.
        at_least: the smallest share of the offline engine's tokens a second that passes.
        timeout: seconds for a round.
    """

    num_requests: int = 24
    prompt_tokens: int = 256
    output_tokens: int = 64
    vocab_size: int = 10_000
    rounds: int = 5
    seed: int = 0
    at_least: float = _SHARE
    timeout: float = 600
    contest: ContestOptions = field(default_factory=ContestOptions)
    json: str | None = None
    command: str = ""


def run(options: OverheadBench) -> int:
    """Measure, and print the share that is left.

    Returns:
        The exit code: 1 if it is below `at_least`.

    Raises:
        ConfigError: options that cannot work. EngineError: a side that failed.
    """
    check_writable(options.json)
    check_servers(options.contest)
    if options.contest.peers:
        raise ConfigError("--overhead is about our engine alone: leave --peer out")
    if options.rounds < 1:
        raise ConfigError("rounds must be at least 1")
    case = fixed([options.num_requests], [options.prompt_tokens], options.output_tokens)[0]
    offline: list[float] = []
    online: list[Figures] = []
    shares: dict[str, list[float]] = {"offline": [], "HTTP": []}
    with started(options.contest, case.longest) as servers, _offline(options, case) as side:
        (server,) = servers.values()
        with server.at_work():
            target = target_of("HTTP", server.url)
        for number in range(-1, options.rounds):  # the first is not counted
            for one in ("offline", "HTTP") if number % 2 == 0 else ("HTTP", "offline"):
                prompts = case.prompts(options.vocab_size, f"{options.seed} {number}")
                if one == "offline":
                    rate, busy = _offline_round(side, case, prompts)
                    found = None
                else:
                    found, busy = _online_round(server, target, case, options, number)
                if number >= 0:
                    shares[one].append(busy)
                    if found is None:
                        offline.append(rate)
                    else:
                        online.append(found)
            if number >= 0:
                rate = online[-1].values["output_throughput"]
                tell(f"round {number + 1} of {options.rounds}: offline {offline[-1]:.1f}, HTTP {rate:.1f} tokens/s")
    return _report(options, case, offline, online, shares)


@contextmanager
def _offline(options: OverheadBench, case: Case) -> Iterator[Side]:
    contest = options.contest
    threads = threads_of(contest)
    environment = environment_for(None, threads=threads, preload=contest.preload, wait_policy=contest.wait_policy)
    cores = sorted(os.sched_getaffinity(0))[:threads]
    with (
        readable(contest) as model,
        Side("offline", [sys.executable, OWN_WORKER], environment, cores=cores, timeout=contest.timeout) as side,
    ):
        with side.at_work():
            start = side.ask(
                do="start",
                options={
                    "model": model,
                    "dtype": contest.dtype,
                    "max_model_len": case.longest,
                    "max_num_seqs": contest.max_num_seqs,
                    "max_num_batched_tokens": contest.max_num_batched_tokens,
                    "kv_cache_memory": parse_size(contest.kv_cache_memory, "kv_cache_memory"),
                    "enable_prefix_caching": contest.enable_prefix_caching,
                    "more": dict(contest.ours),
                    "text": True,
                },
            )
        tell(f"offline has started in {start['seconds']:.0f} s")
        yield side


def _offline_round(side: Side, case: Case, prompts: list[list[int]]) -> tuple[float, float]:
    """Tokens a second, and cores busy."""
    with side.at_work():
        side.ask(do="generate", prompts=[[1, 2, 3, 4]], outputs=[2])
        used = side.cpu_seconds()
        outputs = [request.output for request in case.requests]
        answer = side.ask(do="generate", prompts=prompts, outputs=outputs)
        if answer["counts"] != outputs:
            raise EngineError(f"offline made {sum(answer['counts'])} tokens of {sum(outputs)}: no fair comparison")
        return case.output_tokens / answer["seconds"], (side.cpu_seconds() - used) / answer["seconds"]


def _online_round(
    server: ServerProcess, target: Target, case: Case, options: OverheadBench, number: int
) -> tuple[Figures, float]:
    """What the client saw, and cores busy."""
    with server.at_work():
        form = Form(vocab_size=options.vocab_size)
        nudge = asks(form, target.model, fixed([1], [4], 2)[0].requests, seed="nudge")
        run_load(target, nudge, Arrivals("nudge"), timeout=options.timeout)
        asked = asks(form, target.model, case.requests, seed=f"{options.seed} {number}")  # as `Case.prompts` draws
        used = server.cpu_seconds()
        found = run_load(target, asked, Arrivals("all at once"), timeout=options.timeout)
        if found.failures:
            raise EngineError(f"HTTP: {sum(found.failures.values())} requests failed: {found.example}")
        return found, (server.cpu_seconds() - used) / found.seconds


def _report(
    options: OverheadBench, case: Case, offline: list[float], online: list[Figures], shares: dict[str, list[float]]
) -> int:
    rates = [found.values["output_throughput"] for found in online]
    left = ratio(rates, offline)
    generator = [found.client_cpu / found.seconds for found in online]
    # What other processes do to the machine changes this much less than it changes the time.
    cost = {
        "offline": [busy / rate * 1e3 for busy, rate in zip(shares["offline"], offline, strict=True)],
        "HTTP": [busy / rate * 1e3 for busy, rate in zip(shares["HTTP"], rates, strict=True)],
    }
    cheaper = ratio(cost["HTTP"], cost["offline"], faster_is_more=False)
    rows = [
        ("output tokens/s", spread(offline).show(), spread(rates).show(), left.show(3)),
        ("CPU time a token, ms", spread(cost["offline"]).show(3), spread(cost["HTTP"]).show(3), cheaper.show(3)),
        ("cores busy", spread(shares["offline"]).show(2), spread(shares["HTTP"]).show(2), ""),
        ("cores of the generator", "", spread(generator).show(3), ""),
    ]
    head = f"{case.name}, all at once, {options.contest.max_num_seqs} computed at a time"
    print(f"{head}; median of {options.rounds} rounds")
    print(table(("", "offline", "HTTP", "share left"), rows))
    failed = left.median < options.at_least
    print(
        f"{'FAIL' if failed else 'PASS'}: {left.median:.1%} of the offline engine's tokens a second are left over HTTP"
    )
    result: dict[str, Any] = {
        "settings": settings_of(options),
        "offline_tokens_per_second": offline,
        "online": [asdict(found) for found in online],
        "cores_busy": shares,
        "cpu_ms_a_token": cost,
        "cpu_share": asdict(cheaper),
        "share": asdict(left),
        "passed": not failed,
    }
    write_json(options.json, options.command, result)
    return 1 if failed else 0
