"""`vattention bench coldstart`: from starting a process to its first token, `vattention generate` and transformers."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vattention.bench import processes
from vattention.bench.machine import check_writable, settings_of, write_json
from vattention.bench.ratios import spread
from vattention.bench.side import environment_for
from vattention.bench.table import table
from vattention.engine.loading import find, parse_dtype
from vattention.errors import ConfigError, EngineError

_SCRIPT = Path(__file__).parent / "peers" / "coldstart_transformers.py"


@dataclass(frozen=True)
class ColdstartBench:
    """The options of the command.

    Attributes:
        rounds: fresh processes of each side, after one that is not counted and brings the files into memory.
        max_ratio: times that ours may take as long; more fails.
    """

    model: str | None = None
    dtype: str = "bfloat16"
    prompt: str = "The capital of France is"
    rounds: int = 5
    threads: int | None = None
    max_ratio: float | None = None
    timeout: float = 300
    json: str | None = None
    command: str = ""


def run(options: ColdstartBench) -> int:
    """Measure, and print both sides.

    Returns:
        The exit code: 1 if ours takes more than `max_ratio` as long.

    Raises:
        ConfigError: options that cannot work. EngineError: a side that failed.
    """
    check_writable(options.json)
    dtype = parse_dtype(options.dtype)
    if dtype is None or options.rounds < 1:
        raise ConfigError("name a dtype, and at least one round")
    threads = options.threads or len(os.sched_getaffinity(0))
    source, name = find(options.model), str(dtype).removeprefix("torch.")
    sides = {
        "vattention generate": [
            *(sys.executable, "-m", "vattention.cli", "generate", *((options.model,) if options.model else ())),
            *("--dtype", name, "--prompt", options.prompt, "--no-chat", "--max-tokens", "1", "--quiet"),
        ],
        "transformers": [sys.executable, str(_SCRIPT), source.name, source.gguf_file or "", name, options.prompt],
    }
    environment = environment_for(None, threads=threads)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.rounds + 1):
        for side in sides if number % 2 else reversed(sides):
            took = first_output(side, sides[side], environment, options.timeout)
            if number:
                seconds[side].append(took)
    ours, theirs = seconds.values()
    found = spread([a / b for a, b in zip(ours, theirs, strict=True)])
    print(f"seconds from starting a process to its first token, {name}, {threads} threads, {options.rounds} rounds")
    print(table(("", "median (lowest .. highest)"), [(side, spread(each).show(2)) for side, each in seconds.items()]))
    passed = options.max_ratio is None or found.median <= options.max_ratio
    verdict = "" if options.max_ratio is None else f"{'PASS' if passed else 'FAIL'} (at most {options.max_ratio:g}): "
    print(f"{verdict}time of vattention generate over that of transformers: {found.show(3)}")
    result = {"settings": settings_of(options), "seconds": seconds, "ratio": asdict(found)}
    write_json(options.json, options.command, result)
    return 0 if passed else 1


def first_output(name: str, command: Sequence[str], environment: dict[str, str], timeout: float) -> float:
    """Seconds from starting a process to its first output, which both sides write when they have a token. The process
    is then waited for, so that its end does not disturb the next one.

    Raises:
        EngineError: it wrote nothing, failed, or took longer than `timeout`. Nothing of it is left running then.
    """
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            ready = select.select([process.stdout], [], [], timeout)[0]
            took = time.perf_counter() - began
            wrote = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            if ready:
                process.communicate(timeout=timeout)
            if not wrote or process.returncode:
                log.seek(0)
                lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
                why = f"ended with exit code {process.returncode}" if ready else f"had no token within {timeout:g} s"
                raise EngineError(f"{name} {why}; its last words: {' | '.join(lines[-3:]) or 'none'}")
            return took
        except subprocess.TimeoutExpired:
            raise EngineError(f"{name} had its token but did not end within {timeout:g} s") from None
        finally:
            processes.kill(process.pid)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
