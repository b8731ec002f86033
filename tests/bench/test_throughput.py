"""The whole comparison, with a real peer: transformers, in our own environment."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support import processes
from vattention.bench.contest import ContestOptions, readable
from vattention.cli import main
from vattention.engine.loading import load_model

SMALL = [
    *("--dtype", "float32", "--requests", "3", "--prompt-tokens", "30", "--output-tokens", "4", "--rounds", "2"),
    *("--threads", "1", "--kv-cache-memory", "64MiB", "--timeout", "120", "--no-compile"),
]


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.mark(monkeypatch)


def test_side_by_side_with_transformers(
    tiny_directory: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    json_, plot = tmp_path / "r.json", tmp_path / "r.png"
    trace = tmp_path / "t.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n900,100\n300,30\n20,5\n")
    more = ["--peer", "transformers", "--at-least", "decode=0.0001", "--wait-policy", "passive", "--json", str(json_)]
    more += ["--trace", str(trace), "--longest", "100", "--shared-prefix", "8", "--page-size", "4KiB", "--head-major"]
    pytest.importorskip("matplotlib")
    assert main(["bench", "throughput", tiny_directory, *SMALL, *more, "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "3 of the trace, up to 100" in out
    assert "PASS: decode at least 0.0001" in out
    assert "DIFFERENT" not in out
    assert out.count(" same\n") == 8
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = json.loads(json_.read_text())
    sides = result["conditions"]["sides"]
    for name in ("vattention", "transformers"):
        assert sides[name]["weights"] == sides[name]["kv"] == ["float32"]
        assert sides[name]["threads"] == 1
        assert sides[name]["threading"]
    assert result["conditions"]["stopped_sides_cpu_seconds"] < 0.1
    for name in ("vattention", "transformers"):
        assert all(share > 0 for share in result["conditions"]["cores_busy"][name])
        assert all(0 <= share <= (os.cpu_count() or 1) for share in result["conditions"]["cores_taken_by_others"][name])
    (case,) = result["rounds"]
    assert case["requests"] == [[90, 10], [30, 3], [2, 1]]
    assert result["settings"]["contest"]["ours"] == {"page_size": "4KiB", "head_major": True, "compile": False}
    assert [len(case["sides"][name]) for name in ("vattention", "transformers")] == [2, 2]
    for line in result["lines"]:
        if line["metric"] == "prefill":
            rates = [122 / run["prefill"] for run in case["sides"]["vattention"]]
            assert line["values"]["vattention"] == pytest.approx(
                {"median": sum(rates) / 2, "low": min(rates), "high": max(rates)}
            )
            ratios = [
                theirs["prefill"] / ours["prefill"]
                for ours, theirs in zip(case["sides"]["vattention"], case["sides"]["transformers"], strict=True)
            ]
            assert line["ratios"]["transformers"]["median"] == pytest.approx(sum(ratios) / 2)
    assert processes.left_running() == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--peer", "sglang"], "no such peer: 'sglang'; known are vllm"),
        (["--peer", "vllm"], "--peer vllm=FOLDER"),
        (["--peer", "vllm=/nowhere"], "/nowhere is no virtual environment"),
        (["--peer", "openvino=/nowhere"], "/nowhere is no virtual environment"),
        (["--peer-model", "vllm=x"], "add --peer vllm"),
        (["--peer", "transformers", "--peer-model", "transformers=/nowhere"], "no model for transformers at /nowhere"),
        (["--peer-option", "cache=static"], "write NAME.KEY=VALUE"),
        (["--threads", "1000"], "--threads must be 1 to"),
        (["--wait-policy", "patient"], "active or passive"),
        (["--dtype", "auto"], "name it"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--at-least", "decode=2"], "name a --peer"),
        (["--at-least", "speed=2"], "METRIC=X"),
        (["--at-least", "decode=fast"], "a number"),
        (["--requests", "0"], "at least 1"),
        (["--shared-prefix", "30"], "leave a token"),
        (["--trace", "missing.csv"], "cannot read missing.csv"),
        (["--json", "/nowhere/r.json"], "no directory /nowhere"),
        (["--kv-cache-memory", "much"], "kv_cache_memory 'much'"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    tiny_directory: str, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert main(["bench", "throughput", tiny_directory, *SMALL, *arguments]) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert len(err.splitlines()) == 1
    assert processes.left_running() == []


def test_a_peer_whose_environment_lacks_it_is_named(
    tiny_directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'No module named vllm' >&2\nexit 1\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    assert main(["bench", "throughput", tiny_directory, *SMALL, "--peer", f"vllm={tmp_path / 'env'}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "vllm died of exit code 1 when asked to start" in error
    assert "No module named vllm" in error
    assert processes.left_running() == []


def test_our_own_engine_in_blocks_is_a_peer(tiny_directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--peer", "paged-16", "--peer", "paged-256", "--rounds", "1", "--at-least", "paged-256.decode=0.0001"]
    assert main(["bench", "throughput", tiny_directory, *SMALL, *more]) == 0
    out, err = capsys.readouterr()
    assert "ratio to paged-16" in out
    assert "paged-256 has started" in err
    assert processes.left_running() == []


def test_different_conditions_fail(tiny_directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    sharing = ["--peer", "transformers-cb", "--peer-option", "transformers-cb.allow_block_sharing=true"]
    assert main(["bench", "throughput", tiny_directory, *SMALL, *sharing]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "FAIL: different conditions: prefix caching: off and on"
    assert out.count("DIFFERENT\n") == 1
    assert processes.left_running() == []


def test_the_demo_model_is_written_out_for_peers_that_cannot_read_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    options = ContestOptions(None, "bfloat16", {"transformers": None})
    with readable(options) as folder:
        assert folder is not None
        loaded = load_model(folder)
        assert loaded.dtype == torch.bfloat16
        original = load_model(None, dtype="bfloat16")
        for ours, theirs in zip(loaded.model.parameters(), original.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert not Path(folder).exists()
    with readable(replace(options, peers={})) as name:
        assert name is None
