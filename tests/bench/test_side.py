"""Workers that do as they should, and workers that do not: real processes, without a model."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vattention.bench import processes
from vattention.bench.side import Side, environment_for, python_in
from vattention.errors import ConfigError, EngineError

PEERS = Path(processes.__file__).parent / "peers"
WORKER = """
import os, signal, subprocess, sys, threading, time
sys.path.insert(0, {peers!r})
import wire

class Worker:
    def __init__(self, options):
        print("noise of a library")
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        self.options = options
    def conditions(self):
        return dict(self.options, said="hello")
    def generate(self, prompts, outputs):
        {generate}
        return outputs
    def stream(self, prompt, output):
        return [time.perf_counter() for _ in range(output)]

wire.serve(Worker)
"""
Make = Callable[..., Side]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A worker whose `generate` runs a statement first. It has a child that never rests."""

    def worker(generate: str = "pass", timeout: float = 30) -> Side:
        script = tmp_path / "worker.py"
        script.write_text(WORKER.format(peers=str(PEERS), generate=generate))
        environment = environment_for(None, threads=1)
        return Side("it", [sys.executable, str(script)], environment, timeout=timeout)

    return worker


def test_commands_are_answered_whatever_libraries_print(make: Make) -> None:
    with make() as side:
        assert side.ask(do="start", options={"x": 1})["conditions"] == {
            "x": 1,
            "said": "hello",
            "environment": {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""), "LD_PRELOAD": ""},
        }
        assert side.ask(do="generate", prompts=[[1]], outputs=[3])["counts"] == [3]
        times = side.ask(do="stream", prompt=[1], output=4)["times"]
        assert len(times) == 4
        assert times == sorted(times)
        assert len(processes.members(side.session)) == 2
    assert processes.members(side.session) == []
    side.close()


def test_a_side_that_is_not_at_work_uses_no_cpu(make: Make) -> None:
    with make() as side:
        with side.at_work():
            side.ask(do="start", options={})
            deadline = time.monotonic() + 20
            before = side.cpu_seconds()
            while side.cpu_seconds() < before + 0.05 and time.monotonic() < deadline:
                time.sleep(0.01)  # its child is busy
            assert side.cpu_seconds() >= before + 0.05
        time.sleep(0.05)
        stopped = side.cpu_seconds()
        time.sleep(0.2)
        assert side.cpu_seconds() == stopped
        with side.at_work():
            assert side.ask(do="generate", prompts=[], outputs=[])["counts"] == []
    assert processes.members(side.session) == []  # although it was stopped


@pytest.mark.parametrize(
    ("generate", "problem"),
    [
        ("raise ValueError('too much')", "it failed to generate: ValueError: too much"),
        ("os._exit(7)", "it died of exit code 7 when asked to generate"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"SIGKILL \(out of memory, most likely"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("print('I saw it coming'); os._exit(1)", "its last words: .*I saw it coming"),
    ],
)
def test_a_worker_that_fails_is_an_error_that_says_how(make: Make, generate: str, problem: str) -> None:
    side = make(generate)
    side.ask(do="start", options={})
    with pytest.raises(EngineError, match=problem):
        side.ask(do="generate", prompts=[[1]], outputs=[1])
    assert processes.members(side.session) == []  # its child neither


def test_a_worker_that_hangs_is_killed_after_the_time_limit(make: Make) -> None:
    side = make("time.sleep(1000)", timeout=2)
    side.ask(do="start", options={})
    with pytest.raises(EngineError, match="did not generate within 2 s and was killed: raise --timeout"):
        side.ask(do="generate", prompts=[[1]], outputs=[1])
    assert processes.members(side.session) == []


def test_a_worker_ends_when_its_input_does(make: Make) -> None:
    side = make()
    side.ask(do="start", options={})
    assert side._process.stdin is not None
    side._process.stdin.close()
    assert side._process.wait(20) == 0
    processes.kill(side.session)
    side._process.stdin = open(os.devnull, "wb")  # noqa: SIM115 - closed by close()
    side.close(at_once=True)


def test_a_worker_ends_with_whoever_started_it(make: Make, tmp_path: Path) -> None:
    make().close(at_once=True)  # for its script
    code = f"""
import os, signal, sys
from vattention.bench.side import Side, environment_for
command = [sys.executable, {str(tmp_path / "worker.py")!r}]
side = Side("it", command, environment_for(None, threads=1), timeout=30)
with side.at_work():
    side.ask(do="start", options={{}})
print(side.session, flush=True)  # it is stopped: it will not see the end of its input
os.kill(os.getpid(), signal.SIGKILL)
"""
    session = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False).stdout)
    deadline = time.monotonic() + 20
    while session in processes.members(session) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert session not in processes.members(session)
    processes.kill(session)  # its child, which knows nothing of the contract
    assert processes.members(session) == []


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot run /nowhere/python for it: No such file"):
        Side("it", ["/nowhere/python"], {}, timeout=1)
    with pytest.raises(ConfigError, match="no virtual environment"):
        python_in(str(tmp_path))


def test_another_environment_does_not_get_our_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    ours = environment_for(None, threads=3)
    theirs = environment_for("/env/bin/python", threads=3, preload="/lib/libx.so", wait_policy="passive")
    assert ours["PYTHONPATH"] == "/somewhere"
    assert "PYTHONPATH" not in theirs
    assert theirs["OMP_NUM_THREADS"] == ours["OMP_NUM_THREADS"] == "3"
    assert theirs["LD_PRELOAD"] == "/lib/libx.so"
    assert theirs["OMP_WAIT_POLICY"] == "passive"


def test_cores_are_those_allowed(make: Make) -> None:
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    sleep = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with Side("it", sleep, dict(os.environ), cores=[core], timeout=5) as side:
        assert os.sched_getaffinity(side.session) == {core}
        assert os.sched_getaffinity(0) == before
        os.kill(side.session, signal.SIGKILL)


def test_loaded_libraries_are_seen(make: Make) -> None:
    with make("import ctypes, glob, torch; torch.ones(2)") as side:
        side.ask(do="start", options={})
        assert processes.libraries(side.session) == ([], [])
        side.ask(do="generate", prompts=[[1]], outputs=[1])
        threading, allocators = processes.libraries(side.session)
        assert threading  # torch brings one
        assert allocators == []
