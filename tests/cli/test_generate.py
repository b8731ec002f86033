"""`vattention generate` for people."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.models import demo_model
from vattention.cli import main
from vattention.engine.loading import LoadedModel
from vattention.memory.sizes import parse_size

CLOSING = re.compile(r"KV cache at its fullest: (.+) reserved, (.+) created, (.+) mapped, (.+) needed")
DEMO_TOKEN = 2 * 30 * 3 * 64 * 4  # bytes of K and V of a token, float32


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model, which is read once a session."""

    def load(model: object, **options: object) -> LoadedModel:
        assert model is None
        return demo_model()

    monkeypatch.setattr("vattention.engine.opening.load_model", load)


@pytest.mark.usefixtures("demo")
def test_the_demo_answers_and_says_what_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--kv-cache-memory", "256MiB", "--page-size", "4KiB"]) == 0
    out = capsys.readouterr().out
    assert "Prompt: What is the capital of France?" in out
    assert "Answer: The capital of France is Paris." in out
    counted = re.search(r"\((\d+) tokens in, (\d+) out: stop\)", out)
    closing = CLOSING.fullmatch(out.splitlines()[-1])
    assert counted is not None
    assert closing is not None
    reserved, created, mapped, needed = (parse_size(size) for size in closing.groups())
    # The last token is never fed back.
    assert needed == pytest.approx((int(counted[1]) + int(counted[2]) - 1) * DEMO_TOKEN, rel=1e-3)
    assert needed < mapped <= created < reserved


@pytest.mark.usefixtures("demo")
def test_prompts_come_from_options_and_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("Once upon\na time")
    some = ["--prompt", "The first", "--prompt-file", str(path), "--prompt", "The second"]
    assert main(["generate", *some, "--no-chat", "--max-tokens", "1", "--kv-cache-memory", "64MiB"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^Prompt: (.*)$", out, re.MULTILINE) == ["The first", "The second", "Once upon"]
    assert len(re.findall(r"tokens in, 1 out: length", out)) == 3
    closing = CLOSING.fullmatch(out.splitlines()[-1])
    assert closing is not None
    assert parse_size(closing[4]) > 0  # a request of one token ends in the pass that it starts in


@pytest.mark.usefixtures("demo")
def test_options_of_sampling_reach_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    some = ["--prompt", "The capital of France is", "--no-chat", "--kv-cache-memory", "64MiB", "--max-tokens", "12"]
    assert main(["generate", *some, "--stop", "ris", "--logprobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "Answer: Pa\n(5 tokens in, 1 out: stop at 'ris', log-probability -" in out
    assert re.search(r"^  ' Paris' -0\.\d+ \(rank 1\), '.+' -\d+\.\d+ \(rank 2\)$", out, re.MULTILINE)
    assert main(["generate", *some, "--n", "3", "--temperature", "1", "--top-k", "1", "--ignore-eos"]) == 0
    out = capsys.readouterr().out
    answers = re.findall(r"^Answer \d: (.*)$", out, re.MULTILINE)
    assert len(answers) == 3
    assert len(set(answers)) == 1, "top-k 1 leaves no choice"
    assert len(re.findall(r"12 out: length", out)) == 3


@pytest.mark.usefixtures("demo")
def test_answers_of_a_form(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    some = ["--prompt", "Is Paris in France?", "--kv-cache-memory", "64MiB", "--max-tokens", "12"]
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["Paris", "Rome"]}')
    for form, answers in (
        (["--choice", "yes it is", "--choice", "no"], ("yes it is", "no")),
        (["--json-schema", str(schema)], ('"Paris"', '"Rome"')),
    ):
        assert main(["generate", *some, *form]) == 0
        said = re.search(r"^Answer: (.*)$", capsys.readouterr().out, re.MULTILINE)
        assert said is not None
        assert said[1] in answers


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--n", "2"], "n=2 samples at temperature 0"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--presence-penalty", "3"], "presence_penalty must be at most 2"),
        (["--stop", ""], "empty stop string"),
        (["What is this?"], "a prompt goes behind --prompt"),
        (["./missing"], "there is no model at './missing'"),
        (["--prompt-file", "missing.txt"], "cannot read missing.txt"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--temperature", "nan"], "temperature"),
        (["--regex", "(a{999}){999}"], "regex is too large"),
        (["--json-schema", "[1]"], "cannot read [1]"),
        (["--regex", "a", "--choice", "b"], "not allowed with argument"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    assert main(["generate", *options]) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "without a tokenizer"),
        (["--chat"], "no chat template"),
        (["--kv-cache-memory", "lots"], "kv_cache_memory 'lots'"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
        (["--max-model-len", "100000"], "max_model_len=100000"),
        (["--page-size", "3KiB"], "page_size 3072"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    bare_model: str, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    assert main(["generate", bare_model, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vattention: error: ")
    assert problem in error


def test_a_file_that_is_no_text_is_refused_with_the_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"one\ntwo\nthr\x80e\n")
    assert main(["generate", "--prompt-file", str(tmp_path / "b")]) == 2
    assert "line 3 is not UTF-8 text" in capsys.readouterr().err


def test_standard_input_is_a_prompt_file(chatty: str, typed: Any) -> None:
    code, out, err = typed(
        ["generate", chatty, "--prompt-file", "-", "--max-tokens", "1", "--quiet"], "\ufeffHello\nworld"
    )
    assert code == 0
    assert out.startswith("Prompt: Hello\nworld\nAnswer: ")
    assert "KV cache at its fullest" not in out
    assert len(err.splitlines()) == 2  # memory and layout
    assert typed(["generate", chatty, "--prompt-file", "-", "--prompt-file", "-"])[0] == 2


def test_a_full_disk_is_no_traceback() -> None:
    command = [sys.executable, "-m", "vattention.cli", "info"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "vattention: error: cannot write: No space left on device\n")
