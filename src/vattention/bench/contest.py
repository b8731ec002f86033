"""Engines side by side: each in its own process, warmed up, at work in turns."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vattention.bench import processes
from vattention.bench.conditions import Conditions, conditions_of, differences, rows
from vattention.bench.side import Side, environment_for, python_in
from vattention.bench.table import table
from vattention.bench.workload import Case
from vattention.engine.loading import find, load_model, parse_dtype
from vattention.errors import ConfigError, EngineError
from vattention.memory.sizes import parse_size

OURS = "vattention"
_WORKERS = Path(__file__).parent / "peers"
_OWN = "ours_worker.py"
OWN_WORKER = str(_WORKERS / _OWN)


@dataclass(frozen=True)
class Peer:
    """An engine that ours can be compared with.

    Attributes:
        worker: its script.
        here: it runs in our own environment, if none is given.
        reads: what its model must be, for people.
        own_model: it cannot read what the others do.
        options: of its own, which `peer_options` come on top of.
    """

    worker: str
    here: bool
    reads: str
    own_model: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


PEERS = {
    "vllm": Peer("vllm_worker.py", False, "a directory of safetensors"),
    "openvino": Peer("openvino_worker.py", False, "a directory that optimum-cli has exported", own_model=True),
    "transformers": Peer("transformers_worker.py", True, "a directory of safetensors"),
    "transformers-cb": Peer("transformers_cb_worker.py", True, "a directory of safetensors"),
    "llama.cpp": Peer("llama_cpp_worker.py", False, "a .gguf file", own_model=True),
    # Our own engine with K and V in blocks: what the layout in memory does, and nothing else.
    "paged-16": Peer(_OWN, True, "what ours reads", options={"cache": "paged", "block_size": 16}),
    "paged-256": Peer(_OWN, True, "what ours reads", options={"cache": "paged", "block_size": 256}),
}


@dataclass(frozen=True)
class ContestOptions:
    """What the sides are, and what all of them get.

    Attributes:
        peers: name -> its environment, None for ours.
        peer_models: name -> what it reads in place of `model`.
        peer_options: name -> its own options by name.
        threads: of each side; None: a core each.
        max_num_seqs: requests in a pass.
        max_num_batched_tokens: tokens in a pass; None: as each engine likes it.
        preload: libraries to preload into every side, as LD_PRELOAD takes them.
        wait_policy: OMP_WAIT_POLICY of every side; None: as it is here.
        timeout: seconds for any single answer; a start is one, with all its compilation.
        ours: more options of `LLM`.
    """

    model: str | None = None
    dtype: str = "bfloat16"
    peers: Mapping[str, str | None] = field(default_factory=dict)
    peer_models: Mapping[str, str] = field(default_factory=dict)
    peer_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    threads: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    kv_cache_memory: str = "4GiB"
    enable_prefix_caching: bool = False
    preload: str | None = None
    wait_policy: str | None = None
    timeout: float = 900
    ours: Mapping[str, Any] = field(default_factory=dict)


class Contest:
    """Sides that have started and are stopped, ours first.

    Attributes:
        names: of the sides.
        conditions: of each, once warm.
    """

    def __init__(self, sides: Mapping[str, Side], said: Mapping[str, Mapping[str, Any]]) -> None:
        self._sides = dict(sides)
        self._said = said
        self.names = list(sides)
        self.conditions: list[Conditions] = []
        self.vocab_size = min(int(each["vocab_size"]) for each in said.values() if each.get("vocab_size"))
        self._others_seconds = 0.0
        self._busy: dict[str, list[float]] = {name: [] for name in sides}
        self._taken: dict[str, list[float]] = {name: [] for name in sides}

    def warm_up(self, work: Callable[[Side], Any]) -> None:
        """Let every side do `work` once, uncounted, and look at the conditions."""
        for name, side in self._sides.items():
            began = time.perf_counter()
            with side.at_work():
                work(side)
                self.conditions.append(conditions_of(side, self._said[name], warm=1))
            tell(f"{name} is warm after {time.perf_counter() - began:.0f} s")

    def round(self, number: int, work: Callable[[Side], Any]) -> dict[str, Any]:
        """What `work` returns of each side. Even rounds begin with ours, odd ones with the last peer."""
        results = {}
        for name in self.names if number % 2 == 0 else reversed(self.names):
            side = self._sides[name]
            others = [other for other in self._sides.values() if other is not side]
            with side.at_work():
                # A stopped engine finds its caches cold and its clocks low: two tokens that nobody counts.
                side.ask(do="generate", prompts=[[1, 2, 3, 4]], outputs=[2])
                idle = sum(other.cpu_seconds() for other in others)
                # The clock is read first and last: however long this process waits in between, all is within it.
                began = time.perf_counter()
                all_used, used = processes.machine_cpu_seconds(), side.cpu_seconds()
                results[name] = work(side)
                used, all_used = side.cpu_seconds() - used, processes.machine_cpu_seconds() - all_used
                seconds = time.perf_counter() - began
                self._busy[name].append(used / seconds)
                self._taken[name].append(max(0.0, all_used - used) / seconds)
                self._others_seconds += sum(other.cpu_seconds() for other in others) - idle
        return {name: results[name] for name in self.names}

    def report(self) -> str:
        """The conditions, as a table; after the last round."""
        body = rows(self.conditions)
        for what, shares in (("cores busy while at work", self._busy), ("cores that others took", self._taken)):
            body.append((what, *(f"{sum(each) / max(1, len(each)):.2f}" for each in shares.values()), ""))
        text = table(("conditions", *self.names, ""), body, left=len(self.names) + 2)
        return f"{text}\nsides not at work are stopped; they used {self._others_seconds:.2f} s of CPU time meanwhile"

    def record(self) -> dict[str, Any]:
        """The same for a file."""
        return {
            "sides": {name: vars(found) for name, found in zip(self.names, self.conditions, strict=True)},
            "differences": differences(self.conditions),
            "cores_busy": self._busy,
            "cores_taken_by_others": self._taken,
            "stopped_sides_cpu_seconds": self._others_seconds,
        }


@contextmanager
def contest(options: ContestOptions, longest: int) -> Iterator[Contest]:
    """Start every side for requests of up to `longest` tokens. All of them end with the block.

    Raises:
        ConfigError: no such peer, environment or model. EngineError: a side that does not start.
    """
    check(options)
    threads = threads_of(options)
    cores = sorted(os.sched_getaffinity(0))[:threads]
    with ExitStack() as stack:
        model = stack.enter_context(readable(options))
        sides: dict[str, Side] = {}
        said: dict[str, Any] = {}
        for name in (OURS, *options.peers):
            folder = options.peers.get(name)
            python = None if folder is None else python_in(folder)
            worker = _OWN if name == OURS else PEERS[name].worker
            environment = environment_for(
                python, threads=threads, preload=options.preload, wait_policy=options.wait_policy
            )
            command = [python or sys.executable, str(_WORKERS / worker)]
            side = Side(name, command, environment, cores=cores, timeout=options.timeout)
            sides[name] = stack.enter_context(side)
            more = options.ours if name == OURS else _options_of(name, options)
            with side.at_work():
                answer = side.ask(
                    do="start",
                    options={
                        "model": options.peer_models.get(name, model),
                        "dtype": options.dtype,
                        "threads": threads,
                        "max_model_len": longest,
                        "max_num_seqs": options.max_num_seqs,
                        "max_num_batched_tokens": options.max_num_batched_tokens,
                        "kv_cache_memory": parse_size(options.kv_cache_memory, "kv_cache_memory"),
                        "enable_prefix_caching": options.enable_prefix_caching,
                        "more": dict(more),
                    },
                )
            said[name] = answer["conditions"]
            tell(f"{name} has started in {answer['seconds']:.0f} s")
        yield Contest(sides, said)


def _options_of(name: str, options: ContestOptions) -> Mapping[str, Any]:
    peer = PEERS[name]
    # The same engine has to be compiled where ours is. Options about pages mean nothing to blocks.
    same = {"compile": options.ours["compile"]} if peer.worker == _OWN and "compile" in options.ours else {}
    return {**same, **peer.options, **options.peer_options.get(name, {})}


def check(options: ContestOptions) -> None:
    """Raises ConfigError for whatever cannot work, before anything is started."""
    for name in {*options.peers, *options.peer_models, *options.peer_options}:
        if name not in PEERS:
            raise ConfigError(f"no such peer: {name!r}; known are {', '.join(PEERS)}")
        if name not in options.peers:
            raise ConfigError(f"{name} has options but is no peer here: add --peer {name}")
    for name, folder in options.peers.items():
        peer = PEERS[name]
        if folder is None and not peer.here:
            raise ConfigError(f"{name} needs an environment of its own: --peer {name}=FOLDER")
        if folder is not None:
            python_in(folder)
        if peer.own_model and name not in options.peer_models:
            raise ConfigError(f"{name} reads {peer.reads}: name it with --peer-model {name}=PATH")
        if name in options.peer_models and not os.path.exists(options.peer_models[name]):
            raise ConfigError(f"there is no model for {name} at {options.peer_models[name]}")
    if parse_dtype(options.dtype) is None:
        raise ConfigError("dtype auto may be another one on each side: name it")
    cores = len(os.sched_getaffinity(0))
    if not 1 <= threads_of(options) <= cores:
        raise ConfigError(f"--threads must be 1 to {cores}, the cores that this process may use")
    if options.wait_policy not in (None, "active", "passive"):
        raise ConfigError("--wait-policy is active or passive")
    if options.max_num_seqs < 1 or options.timeout <= 0:
        raise ConfigError("max_num_seqs and timeout must be positive")


def threads_of(options: ContestOptions) -> int:
    """Threads of each side."""
    return len(os.sched_getaffinity(0)) if options.threads is None else options.threads


@contextmanager
def readable(options: ContestOptions) -> Iterator[str | None]:
    """A name of the model that every side can read which has no own one: GGUF is written out as safetensors."""
    needed = set(options.peers) - set(options.peer_models)
    source = find(options.model)
    if not needed or source.gguf_file is None:
        yield options.model
        return
    folder = tempfile.mkdtemp(prefix="vattention-bench-")
    try:
        tell(f"writing {source.gguf_file} as safetensors in {options.dtype}, for every side to read the same weights")
        network: Any = load_model(options.model, dtype=options.dtype).model
        # What transformers remembers of the file it dequantised would keep it from saving.
        network.hf_quantizer, network.is_quantized = None, False
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
        network.save_pretrained(folder)
        del network
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_case(side: Side, case: Case, prompts: Sequence[list[int]], outputs: Sequence[int] | None = None) -> float:
    """Seconds for all requests of a case, or for so many tokens of each.

    Raises EngineError if not exactly as many tokens came as asked for.
    """
    wanted = [request.output for request in case.requests] if outputs is None else list(outputs)
    answer = side.ask(do="generate", prompts=prompts, outputs=wanted)
    if answer["counts"] != wanted:
        raise EngineError(f"{side.name} made {sum(answer['counts'])} tokens of {sum(wanted)}: no fair comparison")
    return float(answer["seconds"])


def tell(text: str) -> None:
    """Progress, on stderr."""
    print(f"vattention: {text}", file=sys.stderr, flush=True)
