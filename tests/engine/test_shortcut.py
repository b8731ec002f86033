"""Compiled layers called directly: when that is possible, and that it changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vattention.engine.shortcut import Shortcut, watchable


class Layer(nn.Module):
    """Stands for a decoder layer, and what `run` makes of it for one that torch has compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.asked: list[str] = []

    def code(self, weight: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, rows: int) -> tuple[torch.Tensor, ...]:
        self.asked.append("code")
        assert rows == x.shape[1]
        return (x @ weight * scale,)


def door(layer: Layer, *, extra: bool = False, changes: bool = False, result: str = "one") -> Callable[..., Any]:
    """The front door: counts who comes through, and calls the code as torch.compile would."""
    code = watchable(layer.code)

    def run(layer: Layer, x: torch.Tensor, *, scales: tuple[torch.Tensor, Any], mode: Any = None) -> Any:
        layer.asked.append("door")
        if changes:
            layer.last = x  # type: ignore[assignment]
        scale = scales[0] + 0 if extra else scales[0]
        outputs = code(layer.weight, x, scale, x.shape[1])
        return {"one": outputs[0], "all": outputs, "other": outputs[0] * 2}[result]

    return run


def call(shortcut: Any, rows: int = 5, mode: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    x = torch.randn(1, rows, 4, dtype=dtype)
    return shortcut(x, scales=(torch.rand(1), None), mode=mode), x


def opened(layer: Layer, run: Callable[..., Any]) -> Shortcut:
    shortcut = Shortcut(layer, run)
    for rows in (1013, 1019, 1, 1):
        call(shortcut.watch, rows)
    layer.asked.clear()
    return shortcut


@pytest.mark.parametrize("rows", [1, 2, 700])
@pytest.mark.parametrize("result", ["one", "all"])
def test_what_was_watched_twice_goes_the_short_way(rows: int, result: str) -> None:
    layer = Layer()
    shortcut = opened(layer, door(layer, result=result))
    x, scale = torch.randn(1, rows, 4), torch.rand(1)
    out = shortcut(x, scales=(scale, None), mode=None)
    assert layer.asked == ["code"]
    assert isinstance(out, tuple) is (result == "all")
    torch.testing.assert_close(out[0] if result == "all" else out, x @ layer.weight * scale)


def test_weights_that_are_changed_in_place_count() -> None:
    layer = Layer()
    shortcut = opened(layer, door(layer))
    layer.weight.fill_(1.0)
    out, x = call(shortcut)
    assert layer.asked == ["code"]
    assert out.shape == x.shape
    assert torch.equal(out[..., 0], out[..., 3])


@pytest.mark.parametrize(
    "unclear",
    [
        dict(extra=True),  # an argument that comes from nowhere
        dict(changes=True),  # an attribute that the call replaces
        dict(result="other"),  # a result that the code does not return
    ],
    ids=str,
)
def test_what_is_unclear_goes_through_the_front_door(unclear: dict[str, Any]) -> None:
    layer = Layer()
    shortcut = opened(layer, door(layer, **unclear))
    call(shortcut)
    assert layer.asked == ["door", "code"]


def test_another_kind_of_call_goes_through_the_front_door() -> None:
    layer = Layer()
    shortcut = opened(layer, door(layer))
    call(shortcut, mode="other")
    assert layer.asked == ["door", "code"]
    layer.asked.clear()
    with pytest.raises(RuntimeError, match="dtype"):
        call(shortcut, dtype=torch.float64)
    assert layer.asked[0] == "door"
    layer.asked.clear()
    shortcut(torch.randn(1, 5, 4), scales=(torch.rand(1), None))
    assert layer.asked == ["door", "code"]


def test_one_pass_is_not_enough() -> None:
    layer = Layer()
    shortcut = Shortcut(layer, door(layer))
    call(shortcut.watch, 1013)
    layer.asked.clear()
    call(shortcut)
    assert layer.asked == ["door", "code"]


def test_a_number_that_only_looks_like_the_rows_is_not_taken_for_them() -> None:
    layer = Layer()
    code = watchable(lambda weight, x, number: (x * number,))

    def run(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        layer.asked.append("door")
        return code(layer.weight, x, 1013)[0]

    shortcut = Shortcut(layer, run)
    shortcut.watch(torch.ones(1, 1013, 4))
    shortcut.watch(torch.ones(1, 1019, 4))
    layer.asked.clear()
    assert shortcut(torch.ones(1, 5, 4)).max() == 1013
    assert layer.asked == ["door"]
