"""Sizes as people write them."""

import math

import pytest

from vattention.errors import ConfigError
from vattention.memory.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("2GiB", 2 << 30),
        ("512 MiB", 512 << 20),
        ("1.5gib", 3 << 29),
        ("64kib", 64 << 10),
        ("2GB", 2_000_000_000),
        (123, 123),
    ],
)
def test_reads_what_people_write(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2XB", "-1GiB", "nan", "inf", "1e9", "0", 0, -5, "2 Gi B"])
def test_refuses_what_is_no_size(text):
    with pytest.raises(ConfigError, match="memory"):
        parse_size(text, "memory")


@pytest.mark.parametrize("value", [1.5, math.nan, None, True, [1]])
def test_refuses_wrong_types(value):
    with pytest.raises(TypeError, match="memory"):
        parse_size(value, "memory")


def test_prints_short():
    printed = [format_size(size) for size in (0, 512, 1536, 4 << 20, 5 << 40)]
    assert printed == ["0 B", "512 B", "1.5 KiB", "4 MiB", "5 TiB"]
