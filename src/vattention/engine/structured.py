"""What form an answer must have: what a caller may ask for, and what is refused before anything reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vattention.engine.regex_size import regex_size
from vattention.errors import InvalidRequest

_LONGEST = 2**18
"""Characters of a schema, a regular expression, a grammar or all choices together."""

_LARGEST_REGEX = 50_000
"""Characters of a regular expression with its repetitions written out: work and memory grow with those."""

_MOST_PROPERTIES = 1_000
"""Of one object in a schema: the time to read them grows with the square."""

_DEEPEST = 100
"""Levels of a schema."""

_LARGEST_DIVISOR = 10_000
"""Of `multipleOf`, in units of its last digit: what tells multiples apart has a state for each remainder."""


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """The form of an answer: exactly one of `json_schema`, `json_object`, `regex`, `grammar` and `choice`.

    Tokens are chosen among those with which such a text can go on, so every answer that ends with `finish_reason`
    "stop", but for stop strings and stop tokens of the caller, is of that form; one that `max_tokens` cuts is the
    beginning of one. Between two JSON tokens there is one space at most.

    Attributes:
        json_schema: a JSON Schema, as a mapping or as JSON text; kept as text. Properties come in the order of the
            schema. What of the standard is supported: docs/server.md.
        json_object: any JSON object.
        regex: what the whole answer matches, in the syntax of Rust's `regex` crate, which has no look-around and no
            back-references.
        grammar: in llguidance's variant of Lark; its start rule is "start".
        choice: the answer is one of these strings; kept as a tuple.
        compact: no space between JSON tokens.

    Raises:
        TypeError: a value of the wrong type. InvalidRequest: none or several of the five, or one that is too large or
            cannot be read. The grammar itself is read by the engine's `check`.
    """

    json_schema: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    compact: bool = False

    def __post_init__(self) -> None:
        for name in ("json_object", "compact"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, not {type(getattr(self, name)).__name__}")
        forms = ("json_schema", "json_object", "regex", "grammar", "choice")
        given = [name for name in forms if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise InvalidRequest(f"structured output has exactly one of {', '.join(forms)}; given: {given or 'none'}")
        if self.compact and given[0] not in ("json_schema", "json_object"):
            raise InvalidRequest(f"compact is about JSON: leave it out with {given[0]}")
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if self.regex is not None:
            _check_regex("regex", self.regex)
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))

    @property
    def schema_text(self) -> str:
        """The JSON Schema of a JSON answer, as text; that of any object for `json_object`."""
        return '{"type": "object"}' if self.json_schema is None else str(self.json_schema)


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, not {type(text).__name__}")
    if len(text) > _LONGEST:
        raise InvalidRequest(f"{what} has {len(text)} characters, {_LONGEST} are the most")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what} is not Unicode: {error.reason} at character {error.start}") from None


def _check_regex(what: str, regex: str) -> None:
    size = regex_size(regex)
    if size > _LARGEST_REGEX:
        raise InvalidRequest(f"{what} is too large: with repetitions written out it has over {_LARGEST_REGEX} parts")


def _choices(choice: object) -> tuple[str, ...]:
    if isinstance(choice, (str, bytes)) or not isinstance(choice, Sequence):
        raise TypeError(f"choice must be a sequence of strings, not {type(choice).__name__}")
    if not choice:
        raise InvalidRequest("choice is empty: give at least one string")
    for each in choice:
        _check_text("a choice", each)
    if not all(choice):
        raise InvalidRequest("a choice is empty: leave it out")
    _check_text("choice", "".join(choice))
    return tuple(choice)


def _schema_text(schema: object) -> str:
    """A schema as text. Raises TypeError or InvalidRequest where it is none, or too large."""
    try:
        if isinstance(schema, str):
            _check_text("json_schema", schema)
            text, parsed = schema, json.loads(schema)
            json.dumps(parsed, allow_nan=False)  # Python reads numbers that JSON does not have
        elif isinstance(schema, Mapping):
            text, parsed = json.dumps(dict(schema), allow_nan=False), schema
            _check_text("json_schema", text)
        else:
            raise TypeError(f"json_schema must be a mapping or JSON text, not {type(schema).__name__}")
        if not isinstance(parsed, Mapping):
            raise InvalidRequest(f"json_schema must be a JSON object, not {type(parsed).__name__}")
        _check_schema(parsed)
    except RecursionError:
        raise InvalidRequest("json_schema is nested too deeply") from None
    except InvalidRequest:
        raise
    except ValueError as error:
        raise InvalidRequest(f"json_schema is not JSON: {error}") from None
    return text


def _check_schema(part: object, level: int = 0) -> None:
    """Refuse what would be read for minutes. Names of properties are looked at too; nothing is lost by that."""
    if level > _DEEPEST:
        raise InvalidRequest(f"json_schema is nested too deeply: {_DEEPEST} levels are the most")
    if isinstance(part, Mapping):
        for key, value in part.items():
            if key == "pattern" and isinstance(value, str):
                _check_regex("a pattern of json_schema", value)
            elif key == "patternProperties" and isinstance(value, Mapping):
                for pattern in value:
                    _check_regex("a pattern of json_schema", pattern)
            elif key == "properties" and isinstance(value, Mapping) and len(value) > _MOST_PROPERTIES:
                raise InvalidRequest(f"an object of json_schema has over {_MOST_PROPERTIES} properties")
            elif key == "multipleOf" and type(value) in (int, float) and _digits(value) > _LARGEST_DIVISOR:
                raise InvalidRequest(f"multipleOf={value} in json_schema has too many digits")
            _check_schema(value, level + 1)
    elif isinstance(part, (list, tuple)):
        for value in part:
            _check_schema(value, level + 1)


def _digits(number: float) -> float:
    """The digits of a decimal number as a whole number: 25 for 0.25 and for 2500."""
    from decimal import Decimal

    digits = Decimal(repr(number)).normalize().as_tuple().digits if abs(number) < float("inf") else (9,) * 9
    return int("".join(map(str, digits)))
