import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from support.models import demo_model, tiny_model
from vattention.cli import arguments, commands, main
from vattention.errors import DriverError
from vattention.memory.sizes import parse_size

COMMANDS = [
    ["generate"],
    ["info"],
    ["verify"],
    ["bench"],
    ["bench", "memory"],
    ["bench", "growth"],
    ["bench", "driver"],
]


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without a tokenizer."""
    path = tmp_path_factory.mktemp("bare")
    tiny_model().save_pretrained(path)
    return str(path)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


# -- the frame ------------------------------------------------------------------------------------------------------


def test_help_loads_no_library() -> None:
    code = (
        "import sys; from vattention.cli import main\n"
        f"for command in [[], *{COMMANDS}]: assert main([*command, '--help']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("examples:") == 6


@pytest.mark.parametrize("command", [[], ["nonsense"], ["info", "--bad"], ["verify", "--chunk", "a"], ["bench"]])
def test_bad_usage_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert main(command) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert re.fullmatch(r"vattention.*: error: .* \(see vattention.* --help\)\n", captured.err)


def test_an_option_may_not_be_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--js"]) == 2  # a later option of that beginning would change what scripts mean


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DriverError("map", 12, "check\nthis"), 2, r"vattention: error: map failed with ENOMEM \(.*\): check this"),
        (KeyboardInterrupt(), 130, "vattention: interrupted"),
    ],
)
def test_what_goes_wrong_is_a_line_and_a_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(commands, "info", fail)
    assert main(["info"]) == code
    assert re.fullmatch(line + "\n", capsys.readouterr().err)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(commands, "info", fail)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(args: object) -> int:
        warnings.warn("careful", stacklevel=1)
        return 0

    monkeypatch.setattr(commands, "info", warn)
    assert main(["info"]) == 0
    assert capsys.readouterr().err == "vattention: warning: careful\n"


@pytest.mark.parametrize(("command", "codes"), [("info", {141}), ("--help", {0, 141})])  # argparse looks away itself
def test_a_reader_that_leaves_is_no_error(command: str, codes: set[int]) -> None:
    program = [sys.executable, "-m", "vattention.cli", command]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in codes


def test_the_command_is_kept_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(commands, "bench_memory", lambda args: seen.append(args.command) or 0)
    assert main(["bench", "memory", "--trace", "my file.csv"]) == 0
    assert seen == ["vattention bench memory --trace 'my file.csv'"]


def test_what_is_not_given_is_left_to_whoever_has_the_default() -> None:
    args = arguments.parser().parse_args(["generate"])
    assert not hasattr(args, "max_num_seqs")
    assert not hasattr(args, "layers_per_stream")
    args = arguments.parser().parse_args(["generate", "--layers-per-stream", "all", "--page-size", "64KiB"])
    assert (args.layers_per_stream, args.page_size) == (None, "64KiB")
    args = arguments.parser().parse_args(["verify", "--chunk", "64,whole", "--page-size", "4KiB,2MiB"])
    assert (args.chunks, args.page_sizes) == ([64, 0], ["4KiB", "2MiB"])


# -- generate -------------------------------------------------------------------------------------------------------

CLOSING = re.compile(r"KV cache at its fullest: (.+) reserved, (.+) created, (.+) mapped, (.+) needed")
DEMO_TOKEN = 2 * 30 * 3 * 64 * 4  # bytes of K and V of a token, float32


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


def test_prompts_come_from_options_and_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vattention.engine.loading.load_model", lambda *_, **__: demo_model())  # read once a session
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


def test_options_of_sampling_reach_the_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vattention.engine.loading.load_model", lambda *_, **__: demo_model())
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


def test_a_prompt_file_that_is_no_text_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"\x80\x81")
    assert main(["generate", "--prompt-file", str(tmp_path / "b")]) == 2
    assert "not UTF-8 text" in capsys.readouterr().err


# -- info and bench driver ------------------------------------------------------------------------------------------


def test_info_says_what_this_machine_allows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for words in (
        "CUDA driver",
        "vm.max_map_count",
        "memfd",
        "kernel page",
        "torch threads",
        "ulimit",
    ):
        assert words in out


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["drivers"]["host"]["available"]
    assert known["drivers"]["host"]["granularity"] == known["limits"]["kernel_page_size"]
    assert 0 < known["limits"]["mappings_in_use"] < known["limits"]["max_map_count"]
    assert known["drivers"]["host"]["mapping_budget"] < known["limits"]["max_map_count"]
    assert known["threads"]["torch"] == torch.get_num_threads()
    assert known["versions"]["torch"] == torch.__version__
    sizes = list(known["default_page_size"]["smollm2-135m"].values())
    assert sizes == sorted(sizes)  # a larger budget never asks for smaller pages


def test_info_where_there_is_no_memfd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.memfd_create")
    assert main(["info"]) == 0
    assert "host driver                 not available: the host driver needs memfd_create" in capsys.readouterr().out


def test_driver_calls_are_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vattention.bench.driver._BYTES", 1 << 20)
    path = tmp_path / "d.json"
    assert main(["bench", "driver", "--page-sizes", "64KiB,128KiB", "--json", str(path)]) == 0
    assert "128 KiB" in capsys.readouterr().out
    times = json.loads(path.read_text())["microseconds"]
    assert set(times) == {"65536", "131072"}
    assert all(value > 0 for value in times["65536"].values())
    assert main(["bench", "driver", "--page-size", "many"]) == 2
