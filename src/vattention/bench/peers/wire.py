"""What a worker is: one engine in a process of its own, JSON lines in, JSON lines out. Runs in any Python from 3.9 on.

A command is an object with `do`; the answer to it is one object, with `error` if it failed:

| do | takes | gives |
| --- | --- | --- |
| start | `options` | `conditions` (what the engine says of itself), `seconds` |
| generate | `prompts` (lists of token ids), `outputs` (tokens wanted of each) | `seconds`, `counts` (of tokens) |
| stream | `prompt`, `output` | `times`, seconds from the call to each token |
| quit | | nothing: the process ends |

The end of the input ends the process too, and so does the end of the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, Callable, Protocol  # noqa: UP035

_PR_SET_PDEATHSIG = 1


class Engine(Protocol):
    """What a worker has to bring; and `close()`, where an engine would not let the process end."""

    def conditions(self) -> dict[str, Any]:
        """What the engine says of itself: see `conditions.Conditions` in the folder above for the names."""

    def generate(self, prompts: Sequence[list[int]], outputs: Sequence[int]) -> list[int]:
        """Exactly so many tokens for each prompt, greedy, past the end of the text; returns how many came."""

    def stream(self, prompt: list[int], output: int) -> list[float]:
        """The same for one prompt alone; returns `time.perf_counter()` at each token."""


def serve(start: Callable[[dict[str, Any]], Engine]) -> None:
    """Answer commands until there are no more. `start` makes the engine from the options."""
    commands, answers = _take_over()
    engine: Any = None
    for line in commands:
        command = json.loads(line)
        if command["do"] == "quit":
            break
        try:
            if command["do"] == "start":
                began = time.perf_counter()
                engine = start(command["options"])
                conditions = {"environment": environment(), **engine.conditions()}
                answer = {"conditions": conditions, "seconds": time.perf_counter() - began}
            elif command["do"] == "generate":
                began = time.perf_counter()
                counts = engine.generate(command["prompts"], command["outputs"])
                answer = {"seconds": time.perf_counter() - began, "counts": list(counts)}
            elif command["do"] == "stream":
                began = time.perf_counter()
                answer = {"times": [at - began for at in engine.stream(command["prompt"], command["output"])]}
            else:
                answer = {"error": f"no such command: {command['do']}"}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    answers.close()
    if hasattr(engine, "close"):
        engine.close()


def environment() -> dict[str, str]:
    """What decides about threads and memory before a process begins; of the process that computes, where it is another
    one the engine has to say so."""
    return {name: os.environ.get(name, "") for name in ("OMP_WAIT_POLICY", "LD_PRELOAD")}


def _take_over() -> tuple[Any, Any]:
    """Keep both pipes for ourselves: what libraries print goes to stderr, and processes they start read nothing."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    commands, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return commands, answers
