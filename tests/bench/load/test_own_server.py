"""`vattention bench serve` where it starts the servers: ours for real, and one that cannot start."""

import json
from pathlib import Path

import pytest

from support import processes
from support.chat_models import save
from vattention.bench.load.requests import Form, asks
from vattention.bench.workload import fixed
from vattention.cli import main

SMALL = [
    *("--dtype", "float32", "--threads", "1", "--kv-cache-memory", "16MiB", "--no-compile", "--timeout", "120"),
    *("--num-requests", "4", "--prompt-tokens", "6", "--output-tokens", "5", "--vocab-size", "200", "--rounds", "2"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.mark(monkeypatch)


def test_ours_beside_a_peer(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    command = ["bench", "serve", model, *SMALL, "--peer", "paged-16", "--concurrency", "2", "--load", "0.7"]
    assert main([*command, "--json", str(path)]) == 0, capsys.readouterr()
    out, err = capsys.readouterr()
    assert "2 at a time; median (lowest .. highest) of 2 rounds" in out
    assert "70% of paged-16's" in out
    assert "--cache paged --block-size 16" in err
    result = json.loads(path.read_text())
    for phase in result["phases"]:
        for rounds in phase["rounds"].values():
            assert [each["output_tokens"] for each in rounds] == [20, 20]
    assert result["conditions"]["stopped_sides_cpu_seconds"] < 0.1
    assert all(share > 0 for shares in result["conditions"]["cores_busy"].values() for share in shares)
    assert processes.left_running() == []


@pytest.mark.slow
def test_what_http_costs(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    command = ["bench", "serve", model, *SMALL, "--overhead", "--json", str(path)]
    assert main([*command, "--at-least", "0.0001"]) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    assert "4 x 6/5, all at once" in out
    assert "PASS: " in out
    result = json.loads(path.read_text())
    assert len(result["offline_tokens_per_second"]) == len(result["online"]) == 2
    shares = sorted(
        found["values"]["output_throughput"] / offline
        for found, offline in zip(result["online"], result["offline_tokens_per_second"], strict=True)
    )
    assert result["share"]["low"] == pytest.approx(shares[0])
    assert processes.left_running() == []


def test_both_sides_of_that_get_the_same_prompts() -> None:
    case = fixed([3], [5], 2)[0]
    asked = asks(Form(vocab_size=50), "m", case.requests, seed="1 2")
    assert [json.loads(each.body)["prompt"] for each in asked] == case.prompts(50, "1 2")


def test_a_server_that_does_not_start(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", model, *SMALL, "--page-size", "7KiB"]) == 2
    err = capsys.readouterr().err
    assert "vattention ended with exit code 2; its last words:" in err
    assert "page_size" in err
    assert processes.left_running() == []
