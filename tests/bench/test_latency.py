import json
from pathlib import Path

import pytest

from vattention.cli import main


def test_one_request_at_a_time(tiny_directory: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = [
        *("bench", "latency", tiny_directory, "--dtype", "float32", "--requests", "2", "--prompt-tokens", "20"),
        *("--output-tokens", "5", "--rounds", "2", "--threads", "1", "--kv-cache-memory", "64MiB", "--no-compile"),
        *("--peer", "transformers", "--peer-option", "transformers.cache=static", "--json", str(tmp_path / "r.json")),
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "time to first token, median" in out
    assert "times as fast as transformers" in out
    result = json.loads((tmp_path / "r.json").read_text())
    for rounds in result["rounds"].values():
        assert [len(timings) for timings in rounds] == [2, 2]
        assert all(timing["first"] > 0 and len(timing["gaps"]) == 4 for timings in rounds for timing in timings)
    assert set(result["ratios"]["transformers"]) == {"first", "each"}


@pytest.mark.parametrize(
    ("option", "problem"), [(["--output-tokens", "1"], "at least 2"), (["--rounds", "0"], "rounds")]
)
def test_bad_options(tiny_directory: str, capsys: pytest.CaptureFixture[str], option: list[str], problem: str) -> None:
    assert main(["bench", "latency", tiny_directory, *option]) == 2
    assert problem in capsys.readouterr().err
