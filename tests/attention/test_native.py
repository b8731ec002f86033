"""Compiling at first use: where libraries are kept, who may make them, and what happens where nobody can."""

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from support.compiler import has_compiler, needs_compiler
from vattention.attention import choose, cpu_decode, native
from vattention.attention.base import Features, Segment

ANSWER = 'extern "C" int answer() { return NUMBER; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own, and nothing loaded or warned of yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_warned", False)
    native._load.cache_clear()
    yield tmp_path / "cache" / "vattention"
    native._load.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(ANSWER)
    return path


def answer(source: Path, number: int) -> int:
    library = native.load(source, NUMBER=number)
    assert library is not None
    return library.answer()


@needs_compiler
def test_made_once_and_kept(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(source, 42) == 42
    (kept,) = cache.iterdir()
    native._load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
        assert answer(source, 42) == 42
    assert answer(source, 43) == 43  # other macros
    source.write_text(ANSWER.replace("NUMBER", "NUMBER + 1"))
    native._load.cache_clear()
    assert answer(source, 42) == 43  # another source
    monkeypatch.setattr(native, "_processor", lambda: "another one")
    native._load.cache_clear()
    assert answer(source, 42) == 43
    assert kept in cache.iterdir()
    assert len(list(cache.iterdir())) == 4
    assert cache.stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.parametrize("home", ["/proc/nothing", "/dev/null"])
def test_without_a_place_to_keep_it(home: str, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(source, 7) == 7


@needs_compiler
def test_a_directory_of_somebody_else_is_not_trusted(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: cache.parent.parent.stat().st_uid + 1)
    assert answer(source, 7) == 7
    assert not list(cache.iterdir())


@needs_compiler
def test_many_processes_at_once(cache: Path, source: Path) -> None:
    code = (
        "from pathlib import Path; from vattention.attention import native;"
        f" print(native.load(Path({str(source)!r}), NUMBER=11).answer())"
    )

    def run(_: int) -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(run, range(3))) == {"11\n"}
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("why", ["none", "broken source", "broken compiler"])
def test_without_a_compiler_there_is_one_warning(
    why: str, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "none":
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.delenv("CXX", raising=False)
    elif why == "broken source":
        source.write_text("this is no C++")
        if not has_compiler():
            pytest.skip("no C++ compiler")
    else:
        monkeypatch.setenv("CXX", "false")
    with pytest.warns(RuntimeWarning, match=r"install g\+\+") as caught:
        made = [native.load(source, NUMBER=number) for number in (1, 2)]
    assert made == [None, None]
    assert len(caught) == 1
    assert not cache.exists() or not list(cache.iterdir())


@needs_compiler
def test_without_a_compiler_the_results_are_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    keys, values, query = torch.randn(2, 300, 2, 64), torch.randn(2, 300, 2, 64), torch.randn(6, 5, 64)
    segments = [Segment(1, 0, 1, 300), Segment(0, 1, 4, 30)]

    def outputs() -> list[torch.Tensor]:
        attend = choose.prepare(segments, dtype=torch.float32, device=torch.device("cpu"))
        return [attend(query, keys, values, asked) for asked in (Features(), Features(window=20, softcap=1.0))]

    ours = outputs()
    monkeypatch.setattr(cpu_decode, "_libraries", {})
    monkeypatch.setenv("CXX", "no-such-compiler")
    native._load.cache_clear()
    with pytest.warns(RuntimeWarning, match="no-such-compiler") as caught:
        theirs = outputs()
    assert len(caught) == 1
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_cxx_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -E")
    assert native.find_compiler() == (sys.executable, "-E")


def test_the_source_is_part_of_the_package() -> None:
    assert cpu_decode._SOURCE.is_file()
    assert isinstance(cpu_decode._SOURCE, Path)
