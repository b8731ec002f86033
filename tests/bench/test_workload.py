from pathlib import Path

import pytest

from vattention.bench.trace import Lengths
from vattention.bench.workload import Case, fitted, fixed, sampled
from vattention.errors import ConfigError


def trace(path: Path, rows: list[tuple[int, int]]) -> str:
    path.write_text("ContextTokens,GeneratedTokens\n" + "".join(f"{p},{o}\n" for p, o in rows))
    return str(path)


def test_a_case_for_each_combination() -> None:
    cases = fixed([1, 8], [512, 2048], 64)
    assert [case.name for case in cases] == ["1 x 512/64", "8 x 512/64", "1 x 2048/64", "8 x 2048/64"]
    assert [case.longest for case in cases] == [576, 576, 2112, 2112]
    assert (cases[1].prompt_tokens, cases[1].output_tokens) == (4096, 512)


@pytest.mark.parametrize(
    "bad", [([0], [5], 5, 0), ([1], [0], 5, 0), ([1], [5], 0, 0), ([1], [5], 5, 5), ([1], [5], 5, -1)]
)
def test_nothing_is_made_of_nonsense(bad: tuple[list[int], list[int], int, int]) -> None:
    with pytest.raises(ConfigError):
        fixed(*bad[:3], shared=bad[3])


def test_prompts_are_the_same_for_the_same_seed_and_share_nothing_for_another() -> None:
    case = Case("", (Lengths(40, 1), Lengths(7, 2)))
    prompts = case.prompts(1000, "a")
    assert prompts == case.prompts(1000, "a")
    assert [len(prompt) for prompt in prompts] == [40, 7]
    assert all(0 <= token < 1000 for prompt in prompts for token in prompt)
    other = case.prompts(1000, "b")
    assert prompts[0][:4] != other[0][:4]
    assert prompts[0][:4] != prompts[1][:4]


def test_a_shared_beginning_leaves_every_prompt_a_token_of_its_own() -> None:
    case = Case("", (Lengths(40, 1), Lengths(30, 1), Lengths(10, 1)), shared=20)
    a, b, short = case.prompts(10_000, "x")
    assert [len(a), len(b), len(short)] == [40, 30, 10]
    assert a[:20] == b[:20]
    assert a[20:24] != b[20:24]
    assert short[:9] == a[:9]
    assert short[9] != a[9]
    assert a[:20] != case.prompts(10_000, "y")[0][:20]  # no run shares it with another


def test_lengths_are_scaled_by_one_factor_to_the_longest_allowed() -> None:
    requests = [Lengths(3000, 1096), Lengths(100, 50), Lengths(1, 1)]
    assert fitted(requests, 2048) == [Lengths(1500, 548), Lengths(50, 25), Lengths(1, 1)]
    assert fitted(requests, 4096) == requests
    for longest in range(2, 60):  # rounding never makes one too long
        assert all(2 <= sum(request) <= longest for request in fitted(requests, longest))
    with pytest.raises(ConfigError):
        fitted(requests, 1)


def test_a_sample_of_a_trace_keeps_the_order_of_arrival(tmp_path: Path) -> None:
    rows = [(100 + i, 1 + i) for i in range(50)]
    path = trace(tmp_path / "t.csv", rows)
    case = sampled(path, 10, 1000, seed=3)
    assert len(case.requests) == 10
    assert list(case.requests) == sorted(set(case.requests))
    assert set(case.requests) < {Lengths(*row) for row in rows}
    assert case == sampled(path, 10, 1000, seed=3)
    assert case != sampled(path, 10, 1000, seed=4)
    assert sampled(path, 10, 50, seed=3).longest <= 50
    for count in (0, 51):
        with pytest.raises(ConfigError, match="50 requests"):
            sampled(path, count, 1000, seed=0)
