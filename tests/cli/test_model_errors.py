"""A model that is missing, cut short, wrong or too large is one line and exit code 2, whatever command reads it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.chat_models import save
from support.models import tiny_model
from vattention.engine import weights
from vattention.engine.loading import find

COMMANDS = (["generate"], ["generate", "--input", "/dev/null"], ["chat"], ["verify"], ["bench", "growth"])


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut_gguf(directory: Path) -> Path:
    source = find(None)
    with open(Path(source.name) / str(source.gguf_file), "rb") as file:
        (directory / "model.gguf").write_bytes(file.read(5000))
    return directory / "model.gguf"


def junk_gguf(directory: Path) -> Path:
    (directory / "junk.gguf").write_bytes(b"junk" * 100)
    return directory / "junk.gguf"


def empty(directory: Path) -> Path:
    (directory / "empty").mkdir()
    return directory / "empty"


def shards(directory: Path) -> Path:
    tiny_model().save_pretrained(directory / "shards", max_shard_size="60KB")
    max((directory / "shards").glob("*.safetensors")).unlink()
    return directory / "shards"


# What to do to a directory that is a model, and what is said then. What it returns is taken in place of the directory.
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda d: d / "nowhere", "there is no model at .*no such file or directory"),
    "empty directory": (empty, "has no config.json"),
    "a name with null": (lambda d: "a\0b", "there is no model at"),
    "a name that is too long": (lambda d: d / ("x" * 300), "cannot read .*File name too long"),
    "a sentence": (lambda d: "What is this?", "there is no model 'What is this\\?': a prompt"),
    "a hub id without network": (lambda d: "nobody/nothing", "no such model on the hub, or no network"),
    "wrong kind of file": (lambda d: d / "model.safetensors", "is a file but no .gguf"),
    "config without weights": (lambda d: (d / "model.safetensors").unlink(), "weights of .*no file named"),
    "weights cut in the header": (lambda d: cut(d / "model.safetensors", 0.001), "damaged: .*cut short"),
    "weights cut at the end": (lambda d: cut(d / "model.safetensors", 0.999), "damaged: .*finish the download"),
    "empty weights": (lambda d: cut(d / "model.safetensors", 0), "damaged: 0 bytes"),
    "a shard is missing": (shards, "1 of .* weight files are missing"),
    "corrupt JSON": (lambda d: cut(d / "config.json", 0.5), "configuration of .*not a valid JSON"),
    "JSON of another kind": (lambda d: (d / "config.json").write_text("[]") and None, "configuration of .*damaged"),
    "corrupt tokenizer": (lambda d: (d / "tokenizer.json").write_text("{") and None, "tokenizer of .*damaged"),
    "unsupported architecture": (lambda d: configure(d, model_type="mamba"), "'mamba' is not supported: it keeps"),
    "unknown architecture": (lambda d: configure(d, model_type="zzz"), "zzz"),
    "weights of another size": (lambda d: configure(d, intermediate_size=32), "mismatched"),
    "a GGUF file cut short": (cut_gguf, "model.gguf.*damaged"),
    "a GGUF file that is none": (junk_gguf, "junk.gguf is no GGUF file"),
    "unreadable directory": (lambda d: d.chmod(0), "cannot read .*Permission denied"),
    "unreadable configuration": (lambda d: (d / "config.json").chmod(0), "configuration of .*Permission denied"),
    "unreadable weights": (lambda d: (d / "model.safetensors").chmod(0), "weights of .*Permission denied"),
}


@pytest.fixture(scope="module")
def whole() -> Iterator[Path]:
    """A model that everybody may read, in a directory that everybody may pass."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(save(Path(folder) / "model"))


@pytest.fixture
def copy(whole: Path) -> Iterator[Path]:
    path = Path(shutil.copytree(whole, whole.parent / "copy"))
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


def is_one_line(code: int, out: str, err: str, message: str) -> None:
    assert (code, out) == (2, "")
    assert re.fullmatch(f"vattention: error: .*{message}.*\n", err), err


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("case", CASES)
def test_a_model_that_cannot_be_read(copy: Path, typed: Any, case: str, command: list[str]) -> None:
    spoil, message = CASES[case]
    model = spoil(copy) or copy
    if case == "a sentence" and command[0] in ("verify", "bench"):
        message = "there is no model at"
    root = os.geteuid() == 0
    if root and case.startswith("unreadable"):
        os.seteuid(65534)  # root may read everything
    try:
        result = typed([*command, str(model)], "")
    finally:
        if root:
            os.seteuid(0)
    is_one_line(*result, message)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_model_that_is_too_large(
    whole: Path, typed: Any, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "memory_headroom", lambda: 100_000)
    is_one_line(*typed([*command, str(whole)]), "needs .* for its weights, and .* are left: take a smaller model")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_code_of_the_model_runs_only_when_trusted(copy: Path, typed: Any, command: list[str]) -> None:
    configure(copy, model_type="zzz", auto_map={"AutoConfig": "own.OwnConfig"})
    (copy / "own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'zzz'\n"
    )
    is_one_line(*typed([*command, str(copy)]), "custom code")
    is_one_line(*typed([*command, str(copy), "--trust-remote-code"]), "'zzz' is not among")  # it has been read


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    "options", [["--device", "cuda:99"], ["--device", "toaster"], ["--dtype", "int8"]], ids=" ".join
)
def test_what_no_command_can_do(whole: Path, typed: Any, command: list[str], options: list[str]) -> None:
    # `verify` and `bench growth` compute before they open a cache.
    few = ["--prompts", "1", "--longest", "1", "--max-tokens", "1"] if command == ["verify"] else []
    code, _, err = typed([*command, str(whole), *options, *few])
    assert code == 2
    assert re.fullmatch(r"(vattention: .*\n)*vattention: error: .*(device|dtype).*\n", err), err


def test_the_same_in_a_process_of_its_own(copy: Path) -> None:
    """Nothing else that is loaded there has a word to say either."""
    spoil, message = CASES["corrupt tokenizer"]  # which is read last
    spoil(copy)
    program = [sys.executable, "-m", "vattention.cli", "chat", str(copy)]
    done = subprocess.run(program, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    is_one_line(done.returncode, done.stdout, done.stderr, message)
