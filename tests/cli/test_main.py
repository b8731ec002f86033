import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from vattention.cli import arguments, bench, info, main
from vattention.errors import DriverError

COMMANDS = [
    ["chat"],
    ["generate"],
    ["serve"],
    ["info"],
    ["verify"],
    ["bench"],
    ["bench", "memory"],
    ["bench", "growth"],
    ["bench", "driver"],
]


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
    assert done.stdout.count("examples:") == 8


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

    monkeypatch.setattr(info, "run", fail)
    assert main(["info"]) == code
    assert re.fullmatch(line + "\n", capsys.readouterr().err)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(args: object) -> int:
        warnings.warn("careful", stacklevel=1)
        return 0

    monkeypatch.setattr(info, "run", warn)
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
    monkeypatch.setattr(bench, "memory", lambda args: seen.append(args.command) or 0)
    assert main(["bench", "memory", "--trace", "my file.csv"]) == 0
    assert seen == ["vattention bench memory --trace 'my file.csv'"]


def test_what_is_not_given_is_left_to_whoever_has_the_default() -> None:
    args = arguments.parser().parse_args(["generate"])
    assert not hasattr(args, "max_num_seqs")
    assert not hasattr(args, "layers_per_stream")
    args = arguments.parser().parse_args(["generate", "--layers-per-stream", "all", "--page-size", "64KiB"])
    assert (args.layers_per_stream, args.page_size) == (None, "64KiB")
    args = arguments.parser().parse_args(["chat", "--no-head-major", "--expected-tokens", "300"])
    assert (args.head_major, args.expected_tokens) == (False, 300)
    args = arguments.parser().parse_args(["verify", "--chunk", "64,whole", "--page-size", "4KiB,2MiB"])
    assert (args.chunks, args.page_sizes) == ([64, 0], ["4KiB", "2MiB"])


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
        "layout chosen",
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
    layouts = known["layouts"]["llama-3-8b"]
    assert set(layouts) == {"cpu", "cuda"}
    assert layouts["cuda"]["131072"]["layout"] == "token-major"
    assert all(each["reason"] and each["page_size"] > 0 for device in layouts.values() for each in device.values())


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
