"""The door to transformers: what a batch must look like, and what is refused because it would change the answer."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from vattention.attention import choose, sdpa
from vattention.attention.base import Attend, AttentionBatch, Features, Segment, attention_forward
from vattention.errors import InvalidRequest, UnsupportedModel

HEADS, KV_HEADS, DIM = 6, 2, 8


def layers(count: int = 2, slots: int = 3, tokens: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (torch.zeros(slots, tokens, KV_HEADS, DIM), torch.zeros(slots, tokens, KV_HEADS, DIM)) for _ in range(count)
    ]


def module(layer: int = 1) -> nn.Module:
    attention = nn.Module()
    attention.layer_idx = layer  # type: ignore[assignment]
    return attention


def call(batch: AttentionBatch | None, rows: int, mask: Any = None, **kwargs: Any) -> torch.Tensor:
    q, k, v = (torch.randn(1, heads, rows, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return attention_forward(module(), q, k, v, mask, scaling=0.3, vattention_batch=batch, **kwargs)[0]


@pytest.fixture
def batch() -> AttentionBatch:
    return AttentionBatch.build([Segment(2, 0, 5, 20)], layers(), sdpa.prepare)


def test_new_tokens_land_in_their_slots_and_nowhere_else() -> None:
    cache = layers(slots=4)
    segments = [Segment(3, 0, 1, 9), Segment(0, 1, 1, 1), Segment(1, 2, 4, 6), Segment(2, 6, 1, 32)]
    batch = AttentionBatch.build(segments, cache, sdpa.prepare)
    key, value = torch.rand(KV_HEADS, 7, DIM) + 1, torch.rand(KV_HEADS, 7, DIM) + 3
    batch.write(1, key, value)
    expected = torch.zeros_like(cache[1][0]), torch.zeros_like(cache[1][1])
    for row, (slot, position) in enumerate([(3, 8), (0, 0), (1, 2), (1, 3), (1, 4), (1, 5), (2, 31)]):
        expected[0][slot, position], expected[1][slot, position] = key[:, row], value[:, row]
    assert torch.equal(cache[1][0], expected[0])
    assert torch.equal(cache[1][1], expected[1])
    assert not cache[0][0].any()


def test_the_output_has_the_shape_transformers_wants(batch: AttentionBatch) -> None:
    assert call(batch, 5).shape == (1, 5, HEADS, DIM)


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [Segment(0, 1, 1, 1)],  # does not start at row 0
        [Segment(0, 0, 2, 2), Segment(1, 3, 1, 1)],  # leaves a row out
        [Segment(0, 0, 2, 1)],  # more rows than tokens
        [Segment(0, 0, 0, 1)],
        [Segment(0, 0, 1, 33)],  # past the end of the slot
        [Segment(3, 0, 1, 1)],
        [Segment(-1, 0, 1, 1)],
        [Segment(0, 0, 1, 1), Segment(0, 1, 1, 2)],  # one slot twice
    ],
)
def test_segments_that_make_no_batch(segments: list[Segment]) -> None:
    with pytest.raises(InvalidRequest):
        AttentionBatch.build(segments, layers(), sdpa.prepare)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", 0),
        ("softcap", 0.0),
        ("softcap", -1.0),
        ("s_aux", torch.zeros(HEADS + 1)),
        ("s_aux", torch.zeros(1, HEADS)),
        ("position_bias", torch.zeros(1)),
        ("dropout", 0.1),
        ("is_causal", False),
        ("output_attentions", True),
        ("something_new", 0),
    ],
)
def test_arguments_that_may_change_the_answer_are_refused_by_name(batch: AttentionBatch, name: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=name):
        call(batch, 5, **{name: value})


def test_a_mask_is_refused(batch: AttentionBatch) -> None:
    with pytest.raises(UnsupportedModel, match="attention_mask"):
        call(batch, 5, torch.zeros(1, 1, 5, 20))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sliding_window": None},
        {"softcap": None},
        {"s_aux": None},
        {"output_router_logits": False},
        {"position_ids": torch.zeros(1, 5)},
    ],
)
def test_arguments_that_change_nothing_are_accepted(batch: AttentionBatch, kwargs: dict[str, Any]) -> None:
    call(batch, 5, **kwargs)


def test_a_layer_of_another_shape_is_refused(batch: AttentionBatch) -> None:
    # One KV head would otherwise be broadcast into both of the cache's.
    q, k = torch.zeros(1, HEADS, 5, DIM), torch.zeros(1, 1, 5, DIM)
    with pytest.raises(UnsupportedModel, match="laid out"):
        attention_forward(module(), q, k, k, None, vattention_batch=batch)


def test_without_a_batch_the_message_says_what_is_missing() -> None:
    with pytest.raises(InvalidRequest, match="vattention_batch="):
        call(None, 5)


def test_features_reach_the_kernel() -> None:
    asked: list[Features] = []

    def kernel(segments: Sequence[Segment], *, dtype: torch.dtype, device: torch.device) -> Attend:
        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, features: Features) -> torch.Tensor:
            asked.append(features)
            return query.transpose(0, 1)

        return attend

    sinks = torch.ones(HEADS)
    batch = AttentionBatch.build([Segment(2, 0, 5, 20)], layers(), kernel)
    call(batch, 5, sliding_window=7, softcap=2.0, s_aux=sinks)
    (got,) = asked
    assert (got.scaling, got.window, got.softcap) == (0.3, 7, 2.0)
    assert got.sinks is sinks


def test_a_layer_that_attends_twice_in_a_pass_is_refused(batch: AttentionBatch) -> None:
    """The second K would overwrite the first, and later passes would read the wrong one."""
    call(batch, 5)
    with pytest.raises(UnsupportedModel, match="twice"):
        call(batch, 5)


def test_k_and_v_of_different_width() -> None:
    shapes = ((3, 32, KV_HEADS, 8), (3, 32, KV_HEADS, 5))
    cache = [(torch.zeros(shapes[0]), torch.zeros(shapes[1]))] * 2
    batch = AttentionBatch.build([Segment(2, 0, 5, 5)], cache, choose.prepare)
    q, k, v = torch.randn(1, HEADS, 5, 8), torch.randn(1, KV_HEADS, 5, 8), torch.randn(1, KV_HEADS, 5, 5)
    out, _ = attention_forward(module(), q, k, v, None, vattention_batch=batch)
    assert out.shape == (1, 5, HEADS, 5)
    with pytest.raises(UnsupportedModel, match="laid out"):
        attention_forward(module(0), q, k, k, None, vattention_batch=batch)
