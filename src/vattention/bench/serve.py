"""`vattention bench serve`: load on servers that speak OpenAI's protocol, ours or not, one or several in turns."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from vattention.bench.contest import OURS, ContestOptions, check, readable, tell, threads_of
from vattention.bench.load import servers
from vattention.bench.load.arrivals import Arrivals, closed, poisson, traced
from vattention.bench.load.figures import Figures
from vattention.bench.load.report import bars_of, print_phases, record_of
from vattention.bench.load.requests import Form, asks
from vattention.bench.load.target import Target, overhead_of, run_load, target_of
from vattention.bench.load.turns import Turns
from vattention.bench.machine import check_writable, settings_of, write_json
from vattention.bench.side import environment_for, python_in
from vattention.bench.trace import Lengths, load_trace
from vattention.bench.workload import fitted
from vattention.errors import ConfigError, EngineError
from vattention.memory.sizes import parse_size

SERVERS = ("vllm", "paged-16", "paged-256")
"""Peers that serve."""


@dataclass(frozen=True)
class ServeBench:
    """The options of the command.

    Attributes:
        url: a server that runs already; with `side`, several by name. None and none: ours is started, and the peers
            of `contest`.
        model_name: what requests ask for; None: the first model that the server lists.
        form: how requests are written.
        trace: lengths from this file, fitted to `longest`, in place of `prompt_tokens` and `output_tokens`.
        concurrency: requests under way at most; None: no limit where there are times, else `_AT_ONCE`.
        rate: Poisson arrivals, requests a second.
        trace_arrivals: the times of the trace, `speed` times as fast.
        load: after the rest, Poisson arrivals at this share of the requests a second that the first peer ends when all
            of them come at once.
        must_win: fail unless ours has the better output throughput, p50 and p99.
        timeout: seconds for a request.
        contest: servers to start.
    """

    url: str | None = None
    side: Sequence[tuple[str, str]] = ()
    api_key: str | None = None
    model_name: str | None = None
    form: Form = field(default_factory=Form)
    num_requests: int = 24
    prompt_tokens: int = 256
    output_tokens: int = 64
    trace: str | None = None
    longest: int = 2048
    concurrency: int | None = None
    rate: float | None = None
    trace_arrivals: bool = False
    speed: float = 1.0
    load: float | None = None
    must_win: bool = False
    rounds: int = 3
    seed: int = 0
    timeout: float = 600
    contest: ContestOptions = field(default_factory=ContestOptions)
    json: str | None = None
    plot: str | None = None
    command: str = ""


_AT_ONCE = 8


@dataclass(frozen=True)
class Phase:
    """Rounds with one kind of arrivals.

    Attributes:
        name: for the tables.
        rounds: for each side its rounds.
    """

    name: str
    rounds: dict[str, list[Figures]]


def run(options: ServeBench) -> int:
    """Measure, and print tables with the ratios last.

    Returns:
        The exit code: 1 if a request failed, or `must_win` and ours did not.

    Raises:
        ConfigError: options that cannot work. EngineError: a server that does not start.
    """
    _check(options)
    lengths = lengths_of(options)
    with sides_of(options, max(each.prompt + each.output for each in lengths)) as turns:
        phases = _measure(options, lengths, turns)
        print(turns.report())
        print_phases(phases, options.rounds)
        failures = [
            f"{phase.name}: {name}: {count} x {kind} ({found.example})"
            for phase in phases
            for name, rounds in phase.rounds.items()
            for found in rounds
            for kind, count in found.failures.items()
        ]
        if options.must_win:
            failures += bars_of(phases)
        for failure in failures:
            print(f"FAIL: {failure}")
        if not failures:
            print("PASS: no request failed" + (", and ours is ahead in every bar" if options.must_win else ""))
        _write(options, turns, phases, lengths, failures)
    return 1 if failures else 0


def _check(options: ServeBench) -> None:
    check_writable(options.json)
    if options.plot is not None:
        from vattention.bench.plot import check_plotting

        check_plotting()
        check_writable(options.plot)
    running = options.url is not None or options.side
    if running and options.contest.peers:
        raise ConfigError("--peer starts servers, --url and --side take those that run: not both in one command")
    if options.url is not None and options.side:
        raise ConfigError("--url is for one server: name every one with --side NAME=URL")
    if len({name for name, _ in options.side}) < len(options.side):
        raise ConfigError("two sides have the same name")
    if options.rounds < 1 or options.num_requests < 1 or options.timeout <= 0:
        raise ConfigError("rounds, requests and timeout must be positive")
    if options.trace_arrivals and options.trace is None:
        raise ConfigError("--trace-arrivals needs a --trace")
    if options.trace_arrivals and options.rate is not None:
        raise ConfigError("--rate and --trace-arrivals: requests can only come in one way")
    count = max(1, len(options.side)) if running else 1 + len(options.contest.peers)
    if (options.load is not None or options.must_win) and count < 2:
        raise ConfigError("--load and --must-win are about another side: name a --peer, or two of --side")
    if options.load is not None and options.load <= 0:
        raise ConfigError("--load must be positive: 0.7 for 70% of what the peer can do")
    if not running:
        check_servers(options.contest)


def check_servers(contest: ContestOptions) -> None:
    """Raises ConfigError where a peer does not serve, or what cannot work is asked for."""
    for name in contest.peers:
        if name not in SERVERS:
            raise ConfigError(f"{name} is no server that this command can start: {', '.join(SERVERS)}; or use --side")
    check(contest)


def lengths_of(options: ServeBench) -> list[Lengths]:
    """Of every request. Raises ConfigError for a number below 1, or as `load_trace`."""
    if options.trace is None:
        if min(options.prompt_tokens, options.output_tokens) < 1:
            raise ConfigError("prompt tokens and output tokens must be at least 1")
        return [Lengths(options.prompt_tokens, options.output_tokens)] * options.num_requests
    found = load_trace(options.trace, options.num_requests)
    if len(found) < options.num_requests:
        raise ConfigError(f"{options.trace} has {len(found)} requests, not {options.num_requests}")
    return fitted(found, options.longest)


@contextmanager
def sides_of(options: ServeBench, longest: int) -> Iterator[Turns]:
    """The servers, in turns; those that are started here end with the block."""
    if options.url is not None or options.side:
        named = options.side or [("server", options.url or "")]
        targets = [target_of(name, url, api_key=options.api_key, model=options.model_name) for name, url in named]
        yield Turns({target.name: target for target in targets}, {}, options.form)
        return
    with started(options.contest, longest) as processes_:
        targets = []
        for name, each in processes_.items():
            with each.at_work():
                targets.append(target_of(name, each.url, api_key=options.api_key, model=options.model_name))
        yield Turns({target.name: target for target in targets}, processes_, options.form)


@contextmanager
def started(contest: ContestOptions, longest: int) -> Iterator[dict[str, servers.ServerProcess]]:
    """Our server and those of the peers, ready and stopped, ours first. They end with the block.

    Raises EngineError for one that does not become ready.
    """
    threads = threads_of(contest)
    cores = sorted(os.sched_getaffinity(0))[:threads]
    with _ended_in_order(), ExitStack() as stack:
        model = stack.enter_context(readable(contest))
        found: dict[str, servers.ServerProcess] = {}
        for name in (OURS, *contest.peers):
            folder = contest.peers.get(name)
            python = sys.executable if folder is None else python_in(folder)
            port = servers.free_port()
            environment = environment_for(
                None if folder is None else python,
                threads=threads,
                preload=contest.preload,
                wait_policy=contest.wait_policy,
            )
            if name == "vllm":
                environment |= servers.vllm_environment(threads)
                arguments = servers.vllm(str(model), port, _options(name, contest, longest))
            else:
                arguments = servers.ours(model, port, _options(name, contest, longest))
            server = servers.ServerProcess(
                name, python, arguments, environment, port=port, cores=cores, timeout=contest.timeout
            )
            found[name] = stack.enter_context(server)
            with server.at_work():
                tell(f"{name} is ready after {server.wait_ready():.0f} s: {' '.join(arguments)}")
        yield found


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM leaves the block as Ctrl-C does: processes of a server that is stopped would outlive us otherwise."""

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _options(name: str, contest: ContestOptions, longest: int) -> dict[str, Any]:
    """Of one server: the same for all of them, then its own."""
    memory = parse_size(contest.kv_cache_memory, "kv_cache_memory")
    common: dict[str, Any] = {
        "dtype": contest.dtype,
        "max_model_len": longest,
        "max_num_seqs": contest.max_num_seqs,
    }
    if contest.max_num_batched_tokens is not None:
        common["max_num_batched_tokens"] = contest.max_num_batched_tokens
    own = dict(contest.peer_options.get(name, {}))
    if name == "vllm":
        prefix = {"enable_prefix_caching": contest.enable_prefix_caching}
        return {**common, "kv_cache_memory_bytes": memory, **prefix, **own}
    if contest.enable_prefix_caching:
        common["enable_prefix_caching"] = True
    ours: dict[str, Any] = {**common, "kv_cache_memory": memory}
    if name == OURS:
        return {**ours, **contest.ours}
    compiled = {"compile": contest.ours["compile"]} if "compile" in contest.ours else {}
    return {**ours, **compiled, "cache": "paged", "block_size": int(name.removeprefix("paged-")), **own}


# -- the rounds -----------------------------------------------------------------------------------------------------


def _measure(options: ServeBench, lengths: Sequence[Lengths], turns: Turns) -> list[Phase]:
    def added(target: Target) -> int:
        return overhead_of(target, options.form, timeout=options.timeout)

    overheads = {name: turns.alone(name, added) for name in turns.names}

    def load(target: Target, label: str, arrivals: Arrivals) -> Figures:
        seed = f"{options.seed} {label}"
        asked = asks(options.form, target.model, lengths, seed=seed, overhead=overheads[target.name])
        return run_load(target, asked, arrivals, timeout=options.timeout)

    first = _first_arrivals(options)
    for name in turns.names:
        found = turns.alone(name, lambda target: load(target, "warm-up", closed(first.at_once or _AT_ONCE)))
        if not found.completed:
            raise EngineError(f"{name} answered none of {len(lengths)} requests: {found.example}")
        tell(f"{name} is warm after {found.seconds:.1f} s")

    def rounds(name: str, arrivals: Arrivals) -> Phase:
        """All rounds of a phase: the same requests at the same times for every side of a round."""
        phase = Phase(name, {side: [] for side in turns.names})
        for number in range(options.rounds):
            label = f"{name} {number}"
            for side, found in turns.round(number, lambda target, label=label: load(target, label, arrivals)).items():  # type: ignore[misc]
                phase.rounds[side].append(found)
            rates = ", ".join(
                f"{side} {each[-1].values['output_throughput']:.1f} tokens/s" for side, each in phase.rounds.items()
            )
            tell(f"round {number + 1} of {options.rounds}, {name}: {rates}")
        return phase

    phases = [rounds(first.name, first)]
    if options.load is not None:
        peer = turns.names[1]
        flood = Arrivals("all at once")
        ends = [turns.alone(peer, lambda target, n=n: load(target, f"capacity {n}", flood)) for n in range(2)]  # type: ignore[misc]
        capacity = max(found.values["request_throughput"] for found in ends)
        rate = options.load * capacity
        name = f"{rate:.3g} a second, {options.load:.0%} of {peer}'s {capacity:.3g}"
        tell(f"{peer} ends {capacity:.3g} requests a second when all come at once")
        arrivals = poisson(len(lengths), rate, seed=f"{options.seed} arrivals")
        phases.append(rounds(name, arrivals))
    return phases


def _first_arrivals(options: ServeBench) -> Arrivals:
    if options.trace_arrivals:
        assert options.trace is not None
        return traced(options.trace, options.num_requests, speed=options.speed, at_once=options.concurrency)
    if options.rate is not None:
        seed = f"{options.seed} arrivals"
        return poisson(options.num_requests, options.rate, seed=seed, at_once=options.concurrency)
    return closed(_AT_ONCE if options.concurrency is None else options.concurrency)


def _write(
    options: ServeBench, turns: Turns, phases: Sequence[Phase], lengths: Sequence[Lengths], failures: Sequence[str]
) -> None:
    result: Mapping[str, Any] = {
        "settings": settings_of(options),
        "conditions": turns.record(),
        "requests": [tuple(each) for each in lengths],
        "failures": list(failures),
        "phases": [record_of(phase) for phase in phases],
    }
    write_json(options.json, _without_key(options), result)
    if options.plot is not None:
        from vattention.bench.load.report import lines_of
        from vattention.bench.plot_sides import plot_sides

        lines = [line for phase in phases for line in lines_of(phase)]
        plot_sides(options.plot, lines, turns.names, title="servers under load")


def _without_key(options: ServeBench) -> str:
    """The command, without the key that may stand in it."""
    return options.command if options.api_key is None else options.command.replace(options.api_key, "...")
