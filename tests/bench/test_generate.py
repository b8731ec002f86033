import json
from pathlib import Path

import pytest
import torch

from support.models import tiny_model
from vattention.bench.generate_memory import count, written
from vattention.cli import main

SHORT = ["--contexts", "40,90", "--batch", "2", "--tokens", "2", "--rounds", "2", "--dtype", "float32"]


def test_four_sides_take_turns(tiny_directory: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    easy = ["--min-cache", "0", "--min-both", "0", "--json", str(path)]
    assert main(["bench", "generate", tiny_directory, *SHORT, *easy]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "PASS"
    assert sum("VirtualCache + vattention" in line for line in lines) == 2
    result = json.loads(path.read_text())["result"]
    assert set(result) == {"40", "90"}
    for sides in result.values():
        assert len(sides) == 4
        for times in sides.values():
            assert all(len(times[clock]) == 2 and min(times[clock]) > 0 for clock in ("wall", "processor"))


def test_a_missed_bar_fails(tiny_directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    hard = ["--min-cache", "1000", "--min-both", "1000"]
    assert main(["bench", "generate", tiny_directory, *SHORT, *hard]) == 1
    assert "not 1000" in capsys.readouterr().out.splitlines()[-1]


def test_nothing_to_do(tiny_directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generate", tiny_directory, "--rounds", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_the_bars_of_memory() -> None:
    """What is counted: bytes held against other caches, bytes copied for beams, bytes written for a token."""
    config = tiny_model(num_hidden_layers=2, num_key_value_heads=3, head_dim=64).config
    bars = count(config, torch.bfloat16)
    assert [bar.name for bar in bars if not bar.passed] == []
    assert min(bar.held for bar in bars) > 0


def test_counting_sees_copies_and_no_views() -> None:
    tensor = torch.zeros(10, 10)
    assert written(lambda: tensor[2:4].copy_(tensor[:2])) == 80
    assert written(lambda: torch.cat([tensor, tensor])) == 800
    assert written(lambda: tensor.narrow(0, 0, 3).transpose(0, 1)) == 0
