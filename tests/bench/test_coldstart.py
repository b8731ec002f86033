import json
import os
import sys
from pathlib import Path

import pytest

from support.chat_models import save
from vattention.bench.coldstart import first_output
from vattention.cli import main
from vattention.errors import EngineError


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("chatty"))


@pytest.mark.slow
def test_fresh_processes_of_both(with_tokenizer: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["bench", "coldstart", with_tokenizer, "--rounds", "1", "--threads", "1", "--dtype", "float32"]
    assert main([*command, "--max-ratio", "0.000001", "--json", str(tmp_path / "r.json")]) == 1
    assert "FAIL (at most 1e-06)" in capsys.readouterr().out
    seconds = json.loads((tmp_path / "r.json").read_text())["seconds"]
    assert set(seconds) == {"vattention generate", "transformers"}
    assert all(len(each) == 1 and each[0] > 0.1 for each in seconds.values())


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import sys; sys.exit('no such model')", "it ended with exit code 1; its last words: no such model"),
        ("print(1, flush=True); import sys; sys.exit(3)", "exit code 3"),
        ("", "exit code 0; its last words: none"),
        ("import time; time.sleep(1000)", "no token within 2 s"),
        ("print(1, flush=True); import time; time.sleep(1000)", "did not end within 2 s"),
    ],
)
def test_a_process_that_fails_says_so(code: str, problem: str) -> None:
    with pytest.raises(EngineError, match=problem):
        first_output("it", [sys.executable, "-c", code], dict(os.environ), 2)


def test_the_time_is_that_of_the_first_output() -> None:
    code = "import time; print(1, flush=True); time.sleep(1.5)"
    assert 0 < first_output("it", [sys.executable, "-c", code], dict(os.environ), 60) < 60
