"""Where tokens lie: every layout gives each number a place of its own, and the sizes are what arithmetic says."""

import itertools

import pytest
import torch

from vattention.cache import KVCache, KVLayout
from vattention.cache.page_size import choose_page_size
from vattention.errors import ConfigError

LAYOUTS = [
    dict(),
    dict(head_major=True),
    dict(layers_per_stream=2),
    dict(layers_per_stream=None),
    dict(layers_per_stream=None, kv_together=True),
    dict(kv_together=True),
    dict(layers_per_stream=3, kv_together=True),
    dict(layers_per_stream=3, kv_together=True, head_major=True),
    dict(layers_per_stream=4, head_major=True),
]


def layout(layers=5, heads=3, dim=8, dtype=torch.float32, slots=2, length=10, **kind) -> KVLayout:
    return KVLayout(layers, heads, dim, dtype, slots, length, **kind)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_no_two_numbers_share_a_place_and_all_lie_in_their_slots_stream(kind):
    geometry = layout(**kind)
    taken = {}
    for layer, which, slot, token, head in itertools.product(range(5), range(2), range(2), (0, 1, 9), range(3)):
        view = geometry.view(layer, which)
        strides = view.strides
        element = slot * strides[0] + token * strides[1] + head * strides[2]
        start = view.offset + element * 4
        assert strides[3] == 1
        for byte in range(start, start + 8 * 4, 4):
            assert taken.setdefault(byte, (layer, which, slot, token, head)) == (layer, which, slot, token, head)
        inside = [
            stream
            for stream in geometry.streams
            if stream.offset + slot * stream.size + token * stream.token_bytes
            <= start
            <= start + 32
            <= stream.offset + slot * stream.size + (token + 1) * stream.token_bytes
        ]
        assert len(inside) == 1
    assert len(taken) == 5 * 2 * 2 * 3 * 3 * 8


@pytest.mark.parametrize("kind", LAYOUTS)
def test_sizes(kind):
    geometry = layout(**kind)
    assert geometry.bytes_per_token == 2 * 5 * 3 * 8 * 4
    assert sum(stream.token_bytes for stream in geometry.streams) == geometry.bytes_per_token
    assert geometry.padded_len >= geometry.max_model_len
    assert geometry.size == geometry.bytes_per_token * geometry.padded_len * 2
    ends = [stream.offset + stream.size * 2 for stream in geometry.streams]
    assert [0, *ends[:-1]] == [stream.offset for stream in geometry.streams]
    assert ends[-1] == geometry.size
    assert all(stream.size % (2 << 20) == 0 and stream.offset % (2 << 20) == 0 for stream in geometry.streams)


def test_streams_a_slot():
    def count(**kind):
        return len(layout(**kind).streams)

    assert count() == 2 * 5
    assert count(head_major=True) == 2 * 5 * 3
    assert count(layers_per_stream=2) == 2 * 3
    assert count(layers_per_stream=None) == 2
    assert count(layers_per_stream=None, kv_together=True) == 1
    assert count(layers_per_stream=99, kv_together=True) == 1


def test_a_name_says_how_streams_lie():
    assert layout().name == "token-major"
    assert layout(head_major=True, layers_per_stream=2).name == "head-major, 2 layers a stream"
    assert layout(layers_per_stream=None, kv_together=True).name == "token-major, 5 layers a stream, K and V together"


def test_token_major_slots_can_be_seen_as_one_long_row():
    """What kernels with cumulative lengths want: slot i starts at token i * padded_len."""
    geometry = layout()
    strides = geometry.view(3, 1).strides
    assert strides == (geometry.padded_len * 24, 24, 8, 1)


def test_it_is_frozen_and_comparable():
    assert layout() == layout()
    assert hash(layout()) == hash(layout())
    with pytest.raises(AttributeError):
        layout().num_layers = 3


@pytest.mark.parametrize("name", ["layers", "heads", "dim", "slots", "length"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_must_be_positive(name, value):
    with pytest.raises(ConfigError, match="at least 1"):
        layout(**{name: value})


@pytest.mark.parametrize("value", [1.5, "3", None, True, float("nan")])
def test_numbers_must_be_integers(value):
    with pytest.raises(TypeError, match="num_layers"):
        layout(layers=value)


@pytest.mark.parametrize("dtype", ["float32", 32, None])
def test_dtype_must_be_one(dtype):
    with pytest.raises(TypeError, match="dtype"):
        layout(dtype=dtype)


def test_integer_dtypes_and_absurd_sizes_are_refused():
    with pytest.raises(ConfigError, match="floating point"):
        layout(dtype=torch.int8)
    with pytest.raises(ConfigError, match="TiB of addresses"):
        layout(length=10**12)
    with pytest.raises(ConfigError, match="at least 1"):
        layout(layers_per_stream=0)


def test_page_size_chosen_is_the_smallest_that_the_mapping_limit_carries():
    smollm = KVLayout(30, 3, 64, torch.bfloat16, 16, 2048)

    def choose(budget, mappings=50_000):
        return choose_page_size(smollm, budget, 4096, mappings)

    assert choose(128 << 20) == 4 << 10
    assert choose(1 << 30) == 32 << 10
    assert choose(2 << 30) == 64 << 10
    assert choose(2 << 30, None) == 4 << 10
    assert choose(1 << 40) == 2 << 20, "no page is large enough: the largest"
    assert choose(4 << 20, 10) == 16 << 10, "a handful of short requests must fit first"
    assert choose(1 << 20, 10) == 4 << 10
    assert choose_page_size(smollm, 2 << 30, 64 << 10, None) == 64 << 10


SHAPES = ((3, 8, 5), (1, 8, 8), (2, 4, 6), (3, 8, 5), (1, 2, 2))
MIXED = [kind for kind in LAYOUTS if not kind.get("head_major")]


@pytest.mark.parametrize("kind", MIXED)
def test_layers_of_different_shapes_share_no_place(kind):
    geometry = layout(shapes=SHAPES, **kind)
    taken = set()
    for layer, which, slot, token in itertools.product(range(5), range(2), range(2), (0, 1, 9)):
        view, (heads, *widths) = geometry.view(layer, which), SHAPES[layer]
        for head in range(heads):
            element = slot * view.strides[0] + token * view.strides[1] + head * view.strides[2]
            start = view.offset + element * 4
            places = set(range(start, start + widths[which] * 4, 4))
            assert not places & taken
            taken |= places
            assert any(
                stream.offset + slot * stream.size + token * stream.token_bytes
                <= start
                < start + widths[which] * 4
                <= stream.offset + slot * stream.size + (token + 1) * stream.token_bytes
                for stream in geometry.streams
            )
    numbers = sum(heads * (k + v) for heads, k, v in SHAPES)
    assert len(taken) == 2 * 3 * numbers
    assert geometry.bytes_per_token == numbers * 4 == sum(stream.token_bytes for stream in geometry.streams)


@pytest.mark.parametrize("kind", MIXED)
def test_a_cache_of_layers_of_different_shapes(kind):
    geometry = layout(shapes=SHAPES, **kind)
    with KVCache(geometry, memory="1MiB", page_size=4096, guard=True) as cache:
        slots = [cache.alloc(), cache.alloc()]
        cache.step(dict.fromkeys(slots, 10))
        views = [cache.layer(i)[which] for i in range(5) for which in (0, 1)]
        for number, view in enumerate(views):
            assert view.shape == (2, geometry.padded_len, SHAPES[number // 2][0], SHAPES[number // 2][1 + number % 2])
            view[:, :10] = number
        assert all((view[:, :10] == number).all() for number, view in enumerate(views))


def test_uniform_shapes_are_the_uniform_layout():
    for kind in LAYOUTS:
        plain, same = layout(**kind), layout(shapes=[(3, 8, 8)] * 5, **kind)
        assert plain.streams == same.streams
        assert [plain.view(i, w) for i in range(5) for w in (0, 1)] == [
            same.view(i, w) for i in range(5) for w in (0, 1)
        ]


@pytest.mark.parametrize(
    ("shapes", "kind", "problem"),
    [
        ([(3, 8, 8)] * 4, {}, "5 times"),
        ([(3, 8, 0)] * 5, {}, "all positive"),
        ([(2, 8, 8)] * 5, {}, "the largest in shapes, 2 and 8"),
        ([(3, 8, 9)] * 5, {}, "the largest in shapes, 3 and 9"),
        (SHAPES, {"head_major": True}, "the same number of heads"),
    ],
)
def test_shapes_that_do_not_fit(shapes, kind, problem):
    with pytest.raises(ConfigError, match=problem):
        layout(shapes=shapes, **kind)


def test_different_widths_in_head_major():
    shapes = ((3, 8, 5), (3, 4, 8), (3, 8, 8), (3, 2, 2), (3, 8, 5))
    geometry = layout(shapes=shapes, head_major=True, layers_per_stream=2)
    with KVCache(geometry, memory="1MiB", page_size=4096, guard=True) as cache:
        slot = cache.alloc()
        cache.step({slot: 10})
        views = [cache.layer(i)[which][slot, :10] for i in range(5) for which in (0, 1)]
        for number, view in enumerate(views):
            view[:] = number
        assert all((view == number).all() for number, view in enumerate(views))
