"""Few rows through linear layers, against float64: every number of rows, any shape, with and without bias."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vattention.engine import cpu_linear, linears

pytestmark = pytest.mark.skipif(
    cpu_linear._library() is None, reason="no C++ compiler, or a processor that does not multiply bfloat16"
)
BF16 = torch.bfloat16


def layers(inputs: int, outputs: list[int], *, bias: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    weights = [torch.randn(n, inputs).to(BF16) for n in outputs]
    return weights, [torch.randn(n).to(BF16) for n in outputs] if bias else []


def expected(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    out = torch.cat([x.double() @ weight.double().T for weight in weights], -1)
    return out + torch.cat(biases).double() if biases else out


@settings(max_examples=60)
@given(st.data())
def test_anything(data: Any) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    inputs = draw(st.one_of(st.integers(1, 100), st.sampled_from([64, 576, 1536])))
    outputs = draw(st.lists(st.one_of(st.integers(1, 40), st.sampled_from([64, 192])), min_size=1, max_size=4))
    rows = draw(st.integers(1, cpu_linear.MOST_ROWS))
    weights, biases = layers(inputs, outputs, bias=draw(st.booleans()))
    x = torch.randn(1, rows, inputs).to(BF16)
    out = cpu_linear.linear(x, weights, biases)
    assert out is not None
    error = 2e-2 * inputs**0.5
    torch.testing.assert_close(out.double(), expected(x, weights, biases), rtol=1e-2, atol=error, check_dtype=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(cpu_linear.linear(x, weights, biases), out)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)


def test_what_it_does_not_compute() -> None:
    weights, _ = layers(32, [16], bias=False)
    assert cpu_linear.linear(torch.randn(1, 4, 32).to(BF16), weights, []) is not None
    assert cpu_linear.linear(torch.randn(1, cpu_linear.MOST_ROWS + 1, 32).to(BF16), weights, []) is None
    assert cpu_linear.linear(torch.randn(1, 0, 32).to(BF16), weights, []) is None
    assert cpu_linear.linear(torch.randn(1, 4, 64).to(BF16)[..., ::2], weights, []) is None
    assert cpu_linear.linear(torch.randn(1, 4, 32), [weights[0].float()], []) is None
    assert cpu_linear.linear(torch.randn(1, 4, 16).to(BF16), [weights[0][:, ::2]], []) is None


def test_weights_that_have_moved_are_found_again() -> None:
    weights, biases = layers(64, [32, 16], bias=True)
    x = torch.randn(1, 3, 64).to(BF16)
    cpu_linear.linear(x, weights, biases)
    weights[1].data = torch.randn(16, 64).to(BF16)
    out = cpu_linear.linear(x, weights, biases)
    assert out is not None
    torch.testing.assert_close(out.double(), expected(x, weights, biases), rtol=1e-2, atol=0.1, check_dtype=False)


@pytest.mark.parametrize("rows", [1, 16, 17, 200])
def test_few_and_many_rows_agree(rows: int) -> None:
    weights, biases = layers(64, [32, 16], bias=True)
    x = torch.randn(1, rows, 64).to(BF16)
    out = torch.ops.vattention.linears(x, weights, biases)
    torch.testing.assert_close(out.double(), expected(x, weights, biases), rtol=1e-2, atol=0.1, check_dtype=False)
    assert linears.can_pack(weights[0])
