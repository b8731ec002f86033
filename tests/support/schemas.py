"""Small JSON Schemas, and what it means for a value to be of one, written down in plain Python."""

from typing import Any

from hypothesis import strategies as st

_NAMES = st.sampled_from(["a", "b", "name", "é", "x y", 'q"uote', "\\", "世界"])


def _strings() -> st.SearchStrategy[dict[str, Any]]:
    lengths = st.tuples(st.integers(0, 3), st.integers(0, 4)).map(
        lambda both: {"type": "string", "minLength": both[0], "maxLength": both[0] + both[1]}
    )
    patterns = st.sampled_from(["^[a-c]{1,4}$", "^(yes|no)$", "^\\d{2}:\\d{2}$"])
    return st.one_of(lengths, patterns.map(lambda pattern: {"type": "string", "pattern": pattern}))


def _integers() -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(st.integers(-2000, 2000), st.integers(0, 500)).map(
        lambda both: {"type": "integer", "minimum": both[0], "maximum": both[0] + both[1]}
    )


_VALUES = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text(max_size=5), st.just([1, {"k": "  "}]))
_FLAT = st.one_of(
    _strings(),
    _integers(),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    _VALUES.map(lambda value: {"const": value}),
    st.lists(_VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
)


def _arrays(items: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(items, st.integers(0, 2), st.integers(0, 2)).map(
        lambda of: {"type": "array", "items": of[0], "minItems": of[1], "maxItems": of[1] + of[2]}
    )


@st.composite
def _objects(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(_NAMES, values, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas whose values are small."""
    return st.recursive(
        _FLAT,
        lambda inner: st.one_of(
            _arrays(inner), _objects(inner), st.lists(inner, min_size=1, max_size=3).map(lambda any_: {"anyOf": any_})
        ),
        max_leaves=5,
    )


_KEYWORDS = (
    *("type", "properties", "required", "items", "enum", "const", "anyOf", "oneOf", "allOf", "not", "$ref", "$defs"),
    *(
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "multipleOf",
        "minLength",
        "maxLength",
        "minItems",
    ),
    *("additionalProperties", "patternProperties", "prefixItems", "maxProperties", "if", "$id", "x-guidance"),
)
_ODD = ["string", "integer", "object", "array", "#", "#/$defs/a", "^a+$", "(?<x>a)", "[", "date-time", "\0", "é"]
_NUMBERS = [0, 1, -1, 3, 0.1, 1e-300, 1e308, 10**20, 2**63, 100_000, 99_991]


def nearly_schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Words of JSON Schema, said in any order."""
    leaves = st.one_of(st.none(), st.booleans(), st.sampled_from(_NUMBERS), st.sampled_from(_ODD))
    keys = st.sampled_from((*_KEYWORDS, "a", "b"))
    values = st.recursive(
        leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4))
    )
    return st.dictionaries(st.sampled_from(_KEYWORDS), values, max_size=4)


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether `value` is of `schema`, which is one of `schemas`."""
    import re

    if "const" in schema:
        return same(value, schema["const"])
    if "enum" in schema:
        return any(same(value, each) for each in schema["enum"])
    if "anyOf" in schema:
        return any(valid(value, each) for each in schema["anyOf"])
    kind = schema["type"]
    if kind == "string":
        if not isinstance(value, str):
            return False
        if "pattern" in schema:
            return re.search(schema["pattern"].replace("$", "\\Z"), value) is not None
        return schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "integer":
        whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value)
        return whole and schema["minimum"] <= value <= schema["maximum"]
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "null":
        return value is None
    if kind == "array":
        right = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return right and all(valid(each, schema["items"]) for each in value)
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= set(value) <= set(schema["properties"])
        and all(valid(each, schema["properties"][name]) for name, each in value.items())
    )


def same(one: Any, other: Any) -> bool:
    """JSON's equality, in which `true` is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)
