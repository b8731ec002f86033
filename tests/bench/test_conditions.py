from dataclasses import replace

import pytest

from vattention.bench.conditions import Conditions, differences, rows

ONE = Conditions("a", "1", ("bfloat16",), ("bfloat16",), 2, False, 64, 512, "no", ("gomp",), (), (), "", 1)


def test_nothing_differs_from_itself() -> None:
    assert differences([ONE, ONE, ONE]) == []
    assert {row[-1] for row in rows([ONE, ONE])} == {"", "same"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": ("float32",)}, "weights: bfloat16 and float32"),
        ({"weights": ("bfloat16", "float32")}, "weights: bfloat16 and bfloat16, float32"),
        ({"kv": ("uint8",)}, "K and V: bfloat16 and uint8"),
        ({"kv": ()}, "K and V: bfloat16 and "),
        ({"threads": 1}, "threads: 2 and 1"),
        ({"prefix_caching": True}, "prefix caching: off and on"),
        ({"max_num_seqs": 16}, "requests in a pass: 64 and 16"),
        ({"allocators": ("tcmalloc",)}, "allocator: libc's and tcmalloc"),
        ({"wait_policy": "passive"}, "OpenMP threads wait: by default and passive"),
        ({"warm": 0}, "warm-up rounds: 1 and 0"),
    ],
)
def test_whatever_must_be_equal_is_named(change: dict[str, object], words: str) -> None:
    other = replace(ONE, **change)  # type: ignore[arg-type]
    assert differences([ONE, other]) == [words]
    assert sum(row[-1] == "DIFFERENT" for row in rows([ONE, other])) == 1


@pytest.mark.parametrize(
    "change", [{"engine": "b"}, {"compiled": "yes"}, {"threading": ("tbb",)}, {"weights": ("float16",)}]
)
def test_what_is_an_engines_own_matter_is_only_shown(change: dict[str, object]) -> None:
    assert differences([ONE, replace(ONE, **change)]) == []  # type: ignore[arg-type]
