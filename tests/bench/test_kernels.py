import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vattention.attention import cpu_decode
from vattention.bench import kernels
from vattention.cli import main

PAGED = {"paged, 16", "paged, 256"}


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BYTES", 1 << 16)


def test_every_combination_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "k.json"
    few = ["--heads", "6/2x16,4/4x24", "--lengths", "20,50", "--requests", "3", "--rounds", "2", "--json", str(path)]
    assert main(["bench", "kernels", *few]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(path.read_text())
    assert len(result["results"]) == len(lines) - 2 == 2 * 2 * 2 * 2
    for case in result["results"]:
        _, kv_heads, width = case["heads"]
        assert case["bytes"] == 2 * 3 * case["length"] * kv_heads * width * (2 if case["dtype"] == "bfloat16" else 4)
        assert {"limit", "cpu_decode", "sdpa, folded", "sdpa, one call", "sdpa, enable_gqa", *PAGED} >= set(
            case["seconds"]
        )
        assert (set(case["seconds"]) >= PAGED) == ("cpu_decode" in case["seconds"])
        assert min(case["seconds"].values()) > 0
    assert lines[2].startswith("6/2x16      20          bfloat16    token-major")


@pytest.mark.skipif(cpu_decode._library(torch.float32, 0, 0) is None, reason="no C++ compiler")
@pytest.mark.parametrize("layout", list(kernels._LAYOUTS))
def test_the_paged_sides_compute_the_same(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = kernels.Case((6, 2, 16), 3, 50, "float32", layout)
    views = [(torch.randn(3, 64, 2, 16), torch.randn(3, 64, 2, 16))]
    query = torch.randn(3, 6, 16).transpose(0, 1)
    computed: list[torch.Tensor] = []
    run = cpu_decode._Prepared.run

    def keeping(self: Any, *tensors: torch.Tensor) -> None:
        run(self, *tensors)
        computed.append(tensors[-1])

    monkeypatch.setattr(cpu_decode._Prepared, "run", keeping)
    kernels._sides(case, query)["cpu_decode"](views[0])
    for side, own in kernels._paged_sides(case, query, views).values():
        side(own[0])
    assert len(computed) == 3
    assert all(torch.equal(each, computed[0]) for each in computed)


def test_without_a_compiler_the_others_are_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_decode, "can", lambda *_, **__: False)
    few = ["--heads", "6/2x16", "--lengths", "20", "--requests", "1", "--rounds", "1", "--dtype", "float32"]
    assert main(["bench", "kernels", *few, "--layout", "head-major"]) == 0
    assert "cpu_decode" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (["--heads", "6/4x16"], "as many query heads"),
        (["--heads", "6x16"], "such as 9/3x64"),
        (["--dtypes", "int8"], "known are float32"),
        (["--layouts", "sliced"], "known are token-major"),
        (["--rounds", "0"], "1 or more"),
    ],
)
def test_what_makes_no_sense(wrong: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *wrong]) == 2
    assert why in capsys.readouterr().err
