"""The largest number of each row against torch's own `max`."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vattention.engine import cpu_largest
from vattention.engine.cpu_largest import largest

NUMBERS = [0.0, 1.0, 1.0, -1.0, 3e38, -3e38, 1e-40, -1e-40, math.inf, -math.inf, math.nan]


@given(st.data())
def test_as_torch(data: Any) -> None:
    draw = data.draw
    rows = draw(st.integers(0, 4))
    numbers = draw(st.one_of(st.integers(1, 40), st.sampled_from([1023, 1024, 1025, 5000])))
    torch.manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(rows, numbers + draw(st.integers(0, 3))).to(draw(st.sampled_from([torch.bfloat16, torch.float32])))
    x = x[:, :numbers]  # rows need not follow each other
    for _ in range(draw(st.integers(0, 4)) if rows else 0):
        place = draw(st.integers(0, rows - 1)), draw(st.integers(0, numbers - 1))
        x[place] = draw(st.sampled_from(NUMBERS)) * draw(st.sampled_from([1, -1]))
    values, places = largest(x)
    expected = x.max(dim=-1)
    torch.testing.assert_close(values, expected.values, rtol=0, atol=0, equal_nan=True)
    for row in range(rows):
        if not values[row].isnan() and values[row] != 0:  # 0 and -0 are the same number, in two places
            assert places[row] == expected.indices[row]


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F81, 0xFFC0, 0xFF81])
def test_what_is_no_number_is_the_largest_of_either_sign(bits: int) -> None:
    x = torch.randn(2, 1500).bfloat16()
    x.view(torch.uint16)[1, 1040] = bits
    values, places = largest(x)
    assert values.isnan().tolist() == [False, True]
    assert places[1] == 1040


def test_many_rows_on_several_threads() -> None:
    x = torch.randn(64, 50_000).bfloat16()
    values, places = largest(x)
    assert torch.equal(values, x.max(dim=-1).values)
    assert torch.equal(places, x.max(dim=-1).indices)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_largest, "_library", lambda: None)
    assert largest(torch.tensor([[1.0, 2.0, 2.0]]).bfloat16())[1].tolist() == [1]
