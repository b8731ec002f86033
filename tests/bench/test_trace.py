from pathlib import Path

import pytest

from vattention.bench.trace import Lengths, draw_requests, load_trace, scaled
from vattention.errors import ConfigError

VATTENTION = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n100,10,110,10.0\n7,1,8,7.0\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,100,10\n2023-11-16 18:15:50.99,7,1\n"


def written(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


@pytest.mark.parametrize("text", [VATTENTION, AZURE])
def test_both_formats_say_the_same(tmp_path: Path, text: str) -> None:
    requests = load_trace(written(tmp_path / "t.csv", text))
    assert requests == [Lengths(100, 10), Lengths(7, 1)]
    assert [request.stored for request in requests] == [109, 7]


def test_columns_are_found_by_name_however_the_file_was_written(tmp_path: Path) -> None:
    text = "\ufeff GeneratedTokens , x,ContextTokens\r\n 3 ,,5\r\n\r\n4,,6\r\n"
    assert load_trace(written(tmp_path / "t.csv", text)) == [Lengths(5, 3), Lengths(6, 4)]


def test_no_row_past_the_limit_is_looked_at(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", AZURE + "what,ever,\n")
    assert load_trace(path, 2) == [Lengths(100, 10), Lengths(7, 1)]
    with pytest.raises(ConfigError, match="line 4"):
        load_trace(path)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("t,1", "line 3: 2 cells under a header of 3"),
        ("t,1,2,3", "line 3: 4 cells"),
        ("t,x,1", "line 3: ContextTokens .* not 'x'"),
        ("t,1,", "line 3: GeneratedTokens .* not ''"),
        ("t,0,1", "line 3: ContextTokens .* at least 1, not '0'"),
        ("t,-3,1", "line 3: ContextTokens"),
        ("t,1.5,1", "line 3: ContextTokens"),
        ("t,\u0663,1", "line 3: ContextTokens"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, problem: str) -> None:
    path = written(tmp_path / "t.csv", f"TIMESTAMP,ContextTokens,GeneratedTokens\nt,1,1\n{row}\n")
    with pytest.raises(ConfigError, match=problem):
        load_trace(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1: the header must name"),
        ("a,b\n1,2\n", "it names 'a,b'"),
        ("ContextTokens,num_decode_tokens\n1,2\n", "line 1"),
        ("ContextTokens,GeneratedTokens\n", "has no requests"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_trace(written(tmp_path / "t.csv", text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_trace(str(tmp_path / "missing.csv"))
    with pytest.raises(ConfigError, match="directory"):
        load_trace(str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80" * 10)
    with pytest.raises(ConfigError, match="not a CSV file"):
        load_trace(str(tmp_path / "binary"))


def test_drawn_lengths_have_the_means_asked_for_and_never_change() -> None:
    requests = draw_requests(20_000, 300, 40, seed=3)
    assert abs(sum(request.prompt for request in requests) / 20_000 - 300) < 10
    assert abs(sum(request.output for request in requests) / 20_000 - 40) < 2
    assert min(min(request) for request in requests) == 1
    assert requests == draw_requests(20_000, 300, 40, seed=3)
    assert requests != draw_requests(20_000, 300, 40, seed=4)


@pytest.mark.parametrize("bad", [(0, 10, 10), (1, 0, 10), (1, 10, 0.5), (1, float("nan"), 1)])
def test_nothing_is_drawn_from_nonsense(bad: tuple[int, float, float]) -> None:
    with pytest.raises(ConfigError):
        draw_requests(*bad, seed=0)


def test_scaling_rounds_up() -> None:
    assert scaled([Lengths(100, 10), Lengths(1, 1)], 0.25) == [Lengths(25, 3), Lengths(1, 1)]
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="scale"):
            scaled([Lengths(1, 1)], scale)
