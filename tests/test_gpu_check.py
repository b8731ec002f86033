"""`make gpu-check` where there is no GPU: one line, and a status that says so. On the emulated device: all of it."""

import importlib.util
import json
import os
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
    emulated_cuda.load().configure(granularity=64 << 10, memory=2 << 30, fill=-1)
    monkeypatch.setattr(gpu_check, "missing", lambda: None)
    monkeypatch.setattr(gpu_check, "card", lambda: {"card": "Emulated device 0"})
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(memory, "CudaDriver", lambda number: drivers.new_driver())
    assert gpu_check.main(["--seconds", "0.05", "--out", str(tmp_path / "results")]) == 0
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
    assert record["command"] == f"python scripts/gpu_check.py --seconds 0.05 --out {tmp_path / 'results'}"
    assert gpu_check.main(["--only", "calls", "--seconds", "0", "--out", str(tmp_path / "alone")]) == 0
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"vmm-calls.json", "vmm.png"}
    emulated_cuda.load().configure(granularity=os.sysconf("SC_PAGESIZE"))
