import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from vattention.cli import main

SMALL = [
    "bench", "memory", "--requests", "30", "--prompt-tokens", "60", "--output-tokens", "20", "--max-num-seqs", "4",
    "--page-size", "4KiB",
]  # fmt: skip


def result_of(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "r.json"
    assert main([*SMALL, "--json", str(path), *arguments]) == 0
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_the_bars_of_waste_for_llama_3_8b(tmp_path: Path) -> None:
    # Lengths as long as in conversations; the real trace is no part of the tests.
    lengths = ["--requests", "60", "--prompt-tokens", "1000", "--output-tokens", "200", "--max-num-seqs", "16"]
    for page, bar in (("64KiB", 1.02), ("4KiB", 1.01)):
        result = result_of(tmp_path, *lengths, "--page-size", page, "--max-ratio", str(bar))
        assert 1 < result["summary"]["over_needed"]["mapped"]["all_steps"] <= bar


def test_the_check_fails_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--page-size", "64KiB", "--max-ratio", "1.02"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL: mapped / needed is 1.")


def test_a_result_says_what_it_was_measured_with(tmp_path: Path) -> None:
    result = result_of(tmp_path)
    assert result["command"].startswith("vattention bench memory --requests 30 ")
    assert result["hardware"]["cores"] >= 1
    assert result["hardware"]["memory_bytes"] > 1 << 28
    assert result["versions"]["torch"]
    assert result["date"].startswith("20")
    assert result["settings"]["model"]["kv_heads"] == 8
    assert result["settings"]["layers_replayed"] == 2
    summary, series = result["summary"], result["series"]
    assert summary["steps"] == len(series["step"])  # few enough for all to be in the file
    for column in ("mapped", "paged_16", "paged_256", "static"):
        ratio = sum(series[column]) / sum(series["needed"])
        assert summary["over_needed"][column]["all_steps"] == pytest.approx(ratio)
        assert summary["peak"][column] == max(series[column])
    assert summary["driver_calls"]["map"] > 0
    assert summary["driver_seconds"] > 0


def test_fewer_layers_have_the_same_arithmetic(tmp_path: Path) -> None:
    one = result_of(tmp_path, "--model-geometry", "smollm2-135m", "--layers-replayed", "1")
    all_ = result_of(tmp_path, "--model-geometry", "smollm2-135m", "--layers-replayed", "30")
    assert one["summary"]["over_needed"] == all_["summary"]["over_needed"]
    assert [30 * size for size in one["series"]["mapped"]] == all_["series"]["mapped"]


def test_a_budget_is_for_the_whole_model(tmp_path: Path) -> None:
    # 32 layers of Llama take 128 KiB a token: 64 MiB hold 512, and so must the replayed layers' share.
    result = result_of(tmp_path, "--memory", "64MiB")
    assert result["settings"]["budget"] == 4 << 20
    assert max(result["series"]["created"]) <= 4 << 20
    assert max(result["series"]["tokens"]) <= 512


def test_both_trace_formats_replay_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(40, 5), (7, 30), (100, 1)]
    ours, azure = tmp_path / "ours.csv", tmp_path / "azure.csv"
    ours.write_text("num_prefill_tokens,num_decode_tokens\n" + "".join(f"{p},{o}\n" for p, o in rows))
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"t,{p},{o}\n" for p, o in rows))
    series = [result_of(tmp_path, "--trace", str(path))["series"] for path in (ours, azure)]
    assert series[0] == series[1]
    assert series[0]["tokens"][0] == 147
    assert "3 from" in capsys.readouterr().out
    limited = result_of(tmp_path, "--trace", str(ours), "--limit-requests", "1", "--scale", "2")
    assert limited["series"]["tokens"] == list(range(80, 90))


def test_the_report_is_tables_of_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    for word in (
        "2 of 32 layers", "over time", "reserved", "created", "mapped (live slots)", "needed", "wasted",
        "paged, blocks of 16", "paged, blocks of 256", "static reservation", "worst step", "mappings", "driver calls",
        "driver time", "in the background",
    ):  # fmt: skip
        assert word in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--trace", "missing.csv"], "cannot read missing.csv"),
        (["--model-geometry", "gpt-2"], "known are llama-3-8b"),
        (["--layers-replayed", "33"], "at most 32"),
        (["--layers-per-stream", "4", "--layers-replayed", "6"], "whole streams of 4 layers"),
        (["--max-model-len", "10"], "max_model_len is 10"),
        (["--page-size", "5000"], "page_size"),
        (["--memory", "lots"], "memory 'lots'"),
        (["--scale", "0"], "scale"),
        (["--limit-requests", "-1"], "--limit-requests"),
        (["--json", "/nowhere/r.json"], "no directory /nowhere"),
        (["--plot", "/"], "cannot write /"),
        (["--head-dim", "0"], "head_dim"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert main([*SMALL, *arguments]) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert len(err.splitlines()) == 1


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.png"
    assert main([*SMALL, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert main([*SMALL, "--plot", str(tmp_path / "r.docx")]) == 2


def test_a_plot_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*SMALL, "--plot", str(tmp_path / "r.png")]) == 2
    captured = capsys.readouterr()
    assert "pip install 'vattention[bench]'" in captured.err
    assert not captured.out  # before anything was measured
