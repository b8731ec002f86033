"""Random numbers that nothing can shift, and tokens drawn in proportion to their probability."""

from typing import Any

import numpy as np
import pytest
import torch

from vattention.engine import sampler
from vattention.engine.randomness import philox, random_bits, uniform
from vattention.engine.sampler import Row, sample
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import VAttentionError


def words(*values: int) -> list[np.ndarray]:
    return [np.array([value], dtype=np.uint64) for value in values]


def row(temperature: float, seed: int, position: int, **options: Any) -> Row:
    return Row(SamplingParams(temperature=temperature, **options), seed, position)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    """The known-answer vectors of Random123, the authors' own library."""
    assert [int(word[0]) for word in philox(words(*counter), words(*key))] == expected


def test_every_part_of_the_name_of_a_number_matters() -> None:
    top = 2**64 - 1
    names = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (0, 2**32, 0), (0, 0, 2**32), (top, 0, 0)]
    assert len(set(random_bits(*zip(*names, strict=True)).tolist())) == len(names)


def test_uniform_numbers_are_uniform() -> None:
    numbers = uniform(np.repeat(range(100), 100), [0] * 10_000, [*range(100)] * 100)
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    # Chi-square with 99 degrees of freedom: 149 is exceeded once in a thousand; these numbers are always the same.
    assert ((counts - 100) ** 2 / 100).sum() < 149
    neighbours = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(neighbours) < 0.04


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [9.0, -1.0, 2.0]])
    assert sample(logits, [row(0.0, 0, 1), row(0.0, 0, 1)]) == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_in_proportion(temperature: float) -> None:
    logits = torch.tensor([2.0, 0.0, -torch.inf, 1.0, -1.0])
    draws = 20_000
    tokens = sample(logits.expand(draws, -1), [row(temperature, seed=7, position=i) for i in range(draws)])
    counts = torch.bincount(torch.tensor(tokens), minlength=5)
    expected = (logits / temperature).softmax(-1) * draws
    assert counts[2] == 0
    keep = expected > 0
    chi_square = ((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, one in a thousand


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2.0**-53])
def test_the_ends_of_the_interval(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number, however unlikely, picks a token of probability zero."""
    monkeypatch.setattr(sampler, "uniform", lambda seeds, *_: np.full(len(seeds), number))
    logits = torch.tensor([[-torch.inf, -torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    expected = 2 if number < 0.5 else 4
    assert sample(logits, [row(1.0, 0, 0)]) == [expected]


def test_a_row_does_not_depend_on_its_company() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 50, generator=generator)
    rows = [row(temperature, seed=i % 3, position=10 + i) for i, temperature in enumerate([0, 1, 0.3, 0, 5, 1, 1, 0.7])]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    backwards = sample(logits.flip(0), rows[::-1])
    assert backwards == together[::-1]


def test_extreme_temperatures_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]])
    assert sample(logits, [row(5e-324, 0, 0)]) == [0]
    spread = {sample(logits, [row(1e300, 0, position)])[0] for position in range(50)}
    assert spread == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    assert sample(torch.tensor([[0.0, 20.0]], dtype=dtype), [row(1.0, 0, 0)]) == [1]


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(damage: float, temperature: float) -> None:
    with pytest.raises(VAttentionError, match="not finite"):
        sample(torch.tensor([[0.0, damage, 1.0]]), [row(temperature, 0, 0)])


def test_no_rows() -> None:
    assert sample(torch.empty(0, 5), []) == []
