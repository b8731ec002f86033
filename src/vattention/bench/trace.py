"""Request lengths: from a CSV trace, or drawn."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vattention.errors import ConfigError

_COLUMNS = (("num_prefill_tokens", "num_decode_tokens"), ("ContextTokens", "GeneratedTokens"))
"""Prompt and output, as the traces of vAttention and of Azure name them. Other columns are ignored."""


class Lengths(NamedTuple):
    """One request: tokens of its prompt and of its output, one of each at least."""

    prompt: int
    output: int

    @property
    def stored(self) -> int:
        """Tokens in the cache at its end: the last token that comes out is never fed back."""
        return self.prompt + self.output - 1


def load_trace(path: str, limit: int | None = None) -> list[Lengths]:
    """The first `limit` requests of a CSV file (all for None), in either format.

    Raises:
        ConfigError: no such file, no known columns, or a row that is not two numbers of tokens; with its line number.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            requests = []
            for request in _read(path, csv.reader(file)):
                requests.append(request)
                if len(requests) == limit:
                    break
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}: not a CSV file ({error})") from None
    if not requests:
        raise ConfigError(f"{path} has no requests")
    return requests


def _read(path: str, lines: Iterator[list[str]]) -> Iterator[Lengths]:
    header = [name.strip() for name in next(lines, [])]
    for columns in _COLUMNS:
        if all(name in header for name in columns):
            places = [header.index(name) for name in columns]
            break
    else:
        wanted = " or ".join(",".join(columns) for columns in _COLUMNS)
        raise ConfigError(f"{path}, line 1: the header must name the columns {wanted}; it names {','.join(header)!r}")
    for number, row in enumerate(lines, start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise ConfigError(f"{path}, line {number}: {len(row)} cells under a header of {len(header)}")
        prompt, output = (_tokens(path, number, name, row[place]) for name, place in zip(columns, places, strict=True))
        yield Lengths(prompt, output)


def _tokens(path: str, line: int, column: str, cell: str) -> int:
    text = cell.strip()
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise ConfigError(f"{path}, line {line}: {column} must be a whole number of at least 1, not {cell!r}")
    return int(text)


def draw_requests(count: int, prompt_mean: float, output_mean: float, *, seed: int) -> list[Lengths]:
    """`count` requests with exponentially distributed lengths of these means, always the same for a seed.

    Raises:
        ConfigError: a count or a mean below 1.
    """
    if count < 1 or not (prompt_mean >= 1 and output_mean >= 1):
        raise ConfigError("requests, prompt tokens and output tokens must be at least 1")
    random = np.random.default_rng(seed)
    prompts, outputs = (
        np.maximum(1, np.rint(random.exponential(mean, count))).astype(int).tolist()
        for mean in (prompt_mean, output_mean)
    )
    return [Lengths(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def scaled(requests: Iterable[Lengths], scale: float) -> list[Lengths]:
    """Every length times `scale`, rounded up. Raises ConfigError unless `scale` is positive and finite."""
    if not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"scale must be positive, got {scale}")
    return [Lengths(*(math.ceil(tokens * scale) for tokens in request)) for request in requests]


def mean(values: Sequence[int]) -> float:
    """The arithmetic mean of at least one value."""
    return sum(values) / len(values)
