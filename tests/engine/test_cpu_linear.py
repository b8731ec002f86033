"""Linear layers with packed weights, against float64: any shape and number of rows, with and without bias."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vattention.engine import cpu_linear, linears
from vattention.engine.cpu_linear import Linear

pytestmark = pytest.mark.skipif(
    not cpu_linear.works(), reason="no C++ compiler, or a processor that does not multiply bfloat16"
)
BF16 = torch.bfloat16


def layer(inputs: int, outputs: int, *, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.randn(outputs, inputs).to(BF16), torch.randn(outputs).to(BF16) if bias else None


def expected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


def check(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    assert out.dtype == BF16
    error = 1e-6 * weight.shape[1] ** 0.5
    torch.testing.assert_close(
        out.double(), expected(x, weight, bias), rtol=2**-8, atol=error + 1e-5, check_dtype=False
    )


@settings(max_examples=60)
@given(st.data())
def test_anything(data: Any) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    inputs = 2 * draw(st.one_of(st.integers(1, 50), st.sampled_from([32, 288, 768])))
    outputs = draw(st.one_of(st.integers(1, 100), st.sampled_from([64, 192])))
    rows = draw(st.one_of(st.integers(1, 40), st.integers(1, 600)))
    weight, bias = layer(inputs, outputs, bias=draw(st.booleans()))
    x = torch.randn(1, rows, inputs).to(BF16)
    product = Linear(weight, bias)
    out = product(x)
    check(out, x, weight, bias)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(product(x), out)
    finally:
        torch.set_num_threads(before)


def test_a_row_gets_the_same_whatever_the_others_are() -> None:
    weight, bias = layer(576, 200, bias=True)
    product = Linear(weight, bias)
    x = torch.randn(700, 576).to(BF16)
    out = product(x)
    for rows in (1, 2, 8, 13, 14, 15, 31, 32, 33, 252, 253, 300):
        assert torch.equal(product(x[:rows]), out[:rows])
        assert torch.equal(product(x[-rows:]), out[-rows:])


def test_rows_that_are_not_dense_and_none_at_all() -> None:
    weight, _ = layer(32, 16, bias=False)
    x = torch.randn(4, 64).to(BF16)[:, ::2]
    check(Linear(weight, None)(x), x, weight, None)
    assert Linear(weight, None)(x[:0]).shape == (0, 16)


def test_nothing_is_written_behind_the_last_output() -> None:
    """Outputs that fill no block, row by row."""
    weight, _ = layer(64, 33, bias=False)
    x = torch.randn(40, 64).to(BF16)
    for rows in (1, 13, 14, 40):
        check(Linear(weight, None)(x[:rows]), x[:rows], weight, None)


@pytest.mark.parametrize(
    ("weight", "accepted"),
    [
        (torch.zeros(3, 4, dtype=BF16), True),
        (torch.zeros(3, 5, dtype=BF16), False),
        (torch.zeros(3, 4), False),
        (torch.zeros(3, 4, dtype=torch.float16), False),
        (torch.zeros(3, 4, dtype=BF16, device="meta"), False),
    ],
)
def test_what_it_computes(weight: torch.Tensor, accepted: bool) -> None:
    assert cpu_linear.can(weight) == accepted


@pytest.mark.parametrize("moved", ["weight", "bias"])
def test_weights_and_biases_that_have_moved_are_found_again(moved: str) -> None:
    weights, biases = zip(*(layer(64, n, bias=True) for n in (32, 16)), strict=True)
    x = torch.randn(1, 3, 64).to(BF16)
    torch.ops.vattention.linears(x, weights, biases)
    tensor = (weights if moved == "weight" else biases)[1]
    tensor.data = torch.randn(tensor.shape).to(BF16)
    out = torch.ops.vattention.linears(x, weights, biases)
    check(out, x, torch.cat(weights), torch.cat(biases))


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("inputs", [64, 63])
def test_by_ours_or_by_onednn(dtype: torch.dtype, inputs: int) -> None:
    weights = [torch.randn(n, inputs).to(dtype) for n in (32, 16)]
    biases = [torch.randn(n).to(dtype) for n in (32, 16)]
    if not linears.can_pack(weights[0]):
        pytest.skip("oneDNN does not multiply these here")
    for rows in (1, 5, 200):
        x = torch.randn(1, rows, inputs).to(dtype)
        out = torch.ops.vattention.linears(x, weights, biases)
        wanted = expected(x, torch.cat(weights), torch.cat(biases))
        torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=0.05, check_dtype=False)
