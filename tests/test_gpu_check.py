"""`make gpu-check` where there is no GPU: one line, and a status that says so. On the emulated device: tests and calls.

What measures attention and the engine runs tiny, on the CPU.
"""

import importlib.util
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from support import drivers, emulated_cuda
from vattention import memory

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"


@pytest.fixture
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(drivers.EMULATED or torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu(gpu_check, capsys):
    assert gpu_check.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("gpu-check: ")
    assert printed.err.count("\n") == 1
    assert "CUDA" in printed.err


@pytest.mark.skipif(not drivers.EMULATED, reason="on the emulated device: see tests/memory/test_cuda_emulated.py")
def test_everything_on_the_emulated_device(gpu_check, capsys, tmp_path, monkeypatch):
    emulated_cuda.load().reset()  # tests in this process before may have left drivers open
    emulated_cuda.load().configure(granularity=64 << 10, memory=2 << 30, fill=-1)
    monkeypatch.setattr(gpu_check, "missing", lambda: None)
    monkeypatch.setattr(gpu_check, "card", lambda: {"card": "Emulated device 0"})
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(memory, "CudaDriver", lambda number: drivers.new_driver())
    asked = ["--only", "tests", "calls", "runs", "bandwidth", "--seconds", "0.05", "--out", str(tmp_path / "results")]
    assert gpu_check.main(asked) == 0
    out = capsys.readouterr().out
    for words in (
        "PASSED tests/gpu",
        "SKIPPED",
        "PROBE cuMemUnmap over a hole",
        "microseconds a call",
        "GB/s",
        "Emulated",
    ):
        assert words in out
    names = {"tests.txt", "vmm-calls.json", "vmm-runs.json", "vmm-bandwidth.json", "vmm.png"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == names
    record = json.loads((tmp_path / "results" / "vmm-runs.json").read_text())
    assert record["card"] == "Emulated device 0"
    assert set(record["samples"]) == {"runs"}
    assert record["command"] == "python scripts/gpu_check.py " + " ".join(asked)
    assert gpu_check.main(["--only", "calls", "--seconds", "0", "--out", str(tmp_path / "alone")]) == 0
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"vmm-calls.json", "vmm.png"}
    emulated_cuda.load().configure(granularity=os.sysconf("SC_PAGESIZE"))


# -- what measures attention and the engine

TINY = ["--device", "cpu", "--tiny", "--seconds", "60"]


def test_a_part_alone_leaves_a_table_a_file_and_a_picture(gpu_check, capsys, tmp_path):
    asked = ["--only", "decode", *TINY, "--out", str(tmp_path)]
    assert gpu_check.main(asked) == 0
    out = capsys.readouterr().out
    assert out.startswith("== decode\n")
    assert f"results in {tmp_path}" in out
    record = json.loads((tmp_path / "decode.json").read_text())
    assert record["card"] == "CPU, tiny"
    assert record["command"] == "python scripts/gpu_check.py " + " ".join(asked)
    assert record["setting"]["tiny"]
    assert len(record["samples"]["cases"]) == 2
    assert {"date", "versions", "hardware"} < set(record)
    assert {path.name for path in tmp_path.iterdir()} == {"decode.json", "decode.png"}


def test_several_parts_are_processes_of_their_own(gpu_check, capsys, tmp_path):
    assert gpu_check.main(["--only", "layouts", "vllm", *TINY, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "== layouts\n" in out
    assert "vllm: SKIPPED: no vLLM here" in out
    assert {path.name for path in tmp_path.iterdir()} == {"layouts.json", "layouts.png"}


def test_a_part_that_fails_or_hangs_leaves_the_others_alone(gpu_check, monkeypatch, tmp_path):
    passed, report = gpu_check.run_alone("layouts", ["--trace", str(tmp_path / "none.csv"), *TINY], 5)
    assert not passed
    assert report.endswith("No such file or directory")
    assert "layouts: FAILED" in report
    monkeypatch.setattr(gpu_check, "EXTRA", -9.9)
    passed, report = gpu_check.run_alone("layouts", TINY, 5)
    assert (passed, report) == (False, "layouts: FAILED: not finished within 0 s")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--device", "cpu"], "add --tiny"),
        (["--device", "cpu", "--tiny", "--only", "calls"], "needs a GPU"),
        (["--device", "gpu"], "a number"),
        (["--only", "everything"], "invalid choice"),
    ],
)
def test_bad_usage(gpu_check, capsys, argv, problem):
    with pytest.raises(SystemExit):
        gpu_check.main(argv)
    assert problem in capsys.readouterr().err


def test_what_belongs_to_only_is_not_handed_on(gpu_check, monkeypatch):
    seen = []

    def run(command, **options):
        seen.append(command)
        return subprocess.CompletedProcess(command, 0, "well\n", "")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    assert gpu_check.run_alone("decode", ["--only", "decode", "engine", "--seconds", "3", "--tiny"], 3) == (
        True,
        "well",
    )
    assert seen[0][2:] == ["--only", "decode", "--seconds", "3", "--tiny"]


def test_the_sanitizer_is_asked_for_a_few_tests(gpu_check, monkeypatch, tmp_path):
    """A stand-in notes how it was called; its status is what is reported."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@"\necho "cache: $PYTORCH_NO_CUDA_MEMORY_CACHING"\nexit $STATUS\n')
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for status, words in (("0", "clean"), ("9", "NOT clean")):
        monkeypatch.setenv("STATUS", status)
        passed, report = gpu_check.run_sanitizer(tmp_path)
        assert passed == (status == "0")
        assert f"compute-sanitizer: {words}" in report
    said = (tmp_path / "sanitizer.txt").read_text()
    assert said.startswith("--error-exitcode 9 --report-api-errors no ")
    assert "-m pytest -m gpu" in said
    assert gpu_check.SANITIZED in said
    assert "cache: 1" in said
    names = "\n".join(path.read_text() for path in (SCRIPT.parents[1] / "tests" / "gpu").glob("test_*.py"))
    assert all(f"_{part}" in names for part in gpu_check.SANITIZED.split(" or "))
