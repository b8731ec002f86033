import json
from pathlib import Path

import pytest

from vattention.bench.growth import Round, typical_steps
from vattention.cache import KVCache
from vattention.cli import main

# A page of 4 KiB holds 64 tokens of a stream. How long steps take is not a test's business, hence the overhead.
SHORT = [
    "--requests", "3", "--prompt-tokens", "30", "--output-tokens", "80", "--rounds", "2", "--page-size", "4KiB",
    "--kv-cache-memory", "16MiB", "--max-overhead", "1000",
]  # fmt: skip


def test_pages_arrive_and_the_engines_thread_makes_no_driver_call(
    tiny_directory: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "g.json"
    assert main(["bench", "growth", tiny_directory, *SHORT, "--json", str(path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("PASS: no driver call on the engine's thread; decode time on demand over pre-mapped: ")
    result = json.loads(path.read_text())
    assert result["passed"]
    assert result["ratio"] > 0
    for round_ in result["rounds"]["on demand"]:
        # Three slots come past 64 tokens, in six streams each.
        assert round_["grown"] == 3 * 6 * 4096
        assert round_["driver_seconds"] > 0
        assert (round_["calls_here"], len(round_["seconds"])) == (0, 77)
        assert round_["calls_elsewhere"] == 3 * 3 * 6  # create, map, set_access
    for round_ in result["rounds"]["pre-mapped"]:
        assert (round_["grown"], round_["calls_here"], round_["calls_elsewhere"]) == (0, 0, 0)


def test_growth_on_the_engines_thread_fails(
    tiny_directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "prefetch", lambda self, lengths: None)
    assert main(["bench", "growth", tiny_directory, *SHORT]) == 1
    assert "FAIL: the engine's thread made 108 driver calls between tokens" in capsys.readouterr().out


def test_an_overhead_above_the_limit_fails(tiny_directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "growth", tiny_directory, *SHORT, "--max-overhead", "-1"]) == 1
    assert "growth costs more than -100.0% of decode time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--output-tokens", "20"], "no page was needed while decoding"),
        (["--output-tokens", "3"], "more than 3"),
        (["--rounds", "0"], "at least 1"),
        (["--requests", "0"], "at least 1"),
        (["--output-tokens", "300"], "max_model_len"),
        (["--requests", "2000", "--kv-cache-memory", "1MiB"], "do not fit"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    tiny_directory: str, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert main(["bench", "growth", tiny_directory, *SHORT, *arguments]) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert len(err.splitlines()) == 1


def test_a_typical_step_keeps_what_recurs_and_loses_what_does_not() -> None:
    rounds = [
        Round((1.0, 5.0, 1.0), 0, 0, 0, 0.0),
        Round((9.0, 5.0, 1.0), 0, 0, 0, 0.0),
        Round((1.0, 5.0, 1.5), 0, 0, 0, 0.0),
    ]
    assert typical_steps(rounds) == [1.0, 5.0, 1.0]
