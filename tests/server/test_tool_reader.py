"""Content and tool calls in the text of an answer, however it is cut into pieces."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vattention.server.tools.reader import ToolReader
from vattention.server.tools.styles import Style

HERMES = Style("<tool_call>", "</tool_call>", inner="\n")
MISTRAL = Style("[TOOL_CALLS]", inner=" ", listed=True)
PHI = Style("<|tool_call|>", "<|/tool_call|>", listed=True)
LLAMA = Style("", arguments="parameters", parallel=False, skip="<|python_tag|>")

F = ("f", {"a": [1, {"b": '}"]'}]})
G: tuple[str, dict[str, Any]] = ("g", {})


def read(style: Style, pieces: Sequence[str], *, parallel: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """All that is told of an answer, put together as a client would."""
    reader = ToolReader(style, {"f", "g"}, parallel=parallel)
    content, calls, ids = "", {}, set()
    for place, piece in enumerate(pieces):
        told = reader.feed(piece, last=place == len(pieces) - 1)
        content += told.content
        assert len({call["index"] for call in told.tool_calls}) == len(told.tool_calls)
        for call in told.tool_calls:
            if call["index"] not in calls:
                assert (call["index"], call["type"]) == (len(calls), "function")
                ids.add(call["id"])
                calls[call["index"]] = [call["function"]["name"], ""]
            else:
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
            calls[call["index"]][1] += call["function"]["arguments"]
    assert len(ids) == len(calls)
    return content, [(name, arguments) for name, arguments in calls.values()]


def as_json(calls: Sequence[tuple[str, str]]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


def written(call: tuple[str, Any], key: str = "arguments") -> str:
    return json.dumps({"name": call[0], key: call[1]})


CASES: list[tuple[Style, str, str, list[tuple[str, Any]]]] = [
    (HERMES, f"Well.\n\n<tool_call>\n{written(F)}\n</tool_call>", "Well.", [F]),
    (HERMES, f"<tool_call>\n{written(F)}\n</tool_call>\n<tool_call>\n{written(G)}\n</tool_call>\n", "", [F, G]),
    (HERMES, f"<tool_call>{written(G)}</tool_call> and more", " and more", [G]),
    (HERMES, f"<tool_call>[{written(F)}, {written(G)}]</tool_call>", "", [F, G]),
    (HERMES, '<tool_call>\n{"arguments": {"x": 1}, "name": "f"}\n</tool_call>', "", [("f", {"x": 1})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", {"x": 1})]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", {})]),
    (HERMES, '<tool_call>{"id": 7, "name": "f", "arguments": {}}</tool_call>', "", [("f", {})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}, "id": "}7"}</tool_call>', "", [("f", {})]),
    (HERMES, f"{written(G)} 2 < 3 <tool_cal", f"{written(G)} 2 < 3 <tool_cal", []),
    (HERMES, "  nothing\n ", "  nothing\n ", []),
    (HERMES, f"<tool_call>{written(('h', {}))}</tool_call>!", f"<tool_call>{written(('h', {}))}</tool_call>!", []),
    (HERMES, "a \n<tool_call> f() </tool_call>", "a \n<tool_call> f() </tool_call>", []),
    (HERMES, "<tool_call>{broken}</tool_call>", "<tool_call>{broken}</tool_call>", []),
    (HERMES, '<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
    # Cut off behind a call, before it could be another.
    (HERMES, f"<tool_call>{written(G)}</tool_call>\n<tool_call>\n{{", "", [G]),
    (HERMES, f"<tool_call>{written(G)}</tool_call>\n<tool_c", "", [G]),
    (HERMES, f"<tool_call>{written(G)}</tool_c", "", [G]),
    (HERMES, f"<tool_call>{written(G)}</tool_call>\n<tool_call>", "", [G]),
    (MISTRAL, f"[TOOL_CALLS] [{written(F)}, {written(G)}]", "", [F, G]),
    (MISTRAL, f'[TOOL_CALLS] [{written(F)}, {{"name": "g', "", [F]),
    (MISTRAL, "See [TOOL_CALLS] above", "See [TOOL_CALLS] above", []),
    (PHI, f"<|tool_call|>[{written(F)}]<|/tool_call|>", "", [F]),
    (LLAMA, written(F, "parameters"), "", [F]),
    (LLAMA, f"\n<|python_tag|>{written(F, 'parameters')}; {written(G, 'parameters')}", "", [F, G]),
    (LLAMA, '{"type": "function", "function": {"name": "g", "parameters": {}}}', "", [G]),
    (LLAMA, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    (LLAMA, '{"name": "f", "age": 3} {', '{"name": "f", "age": 3} {', []),
    (LLAMA, f"Call {written(G, 'parameters')}", f"Call {written(G, 'parameters')}", []),
    (LLAMA, " ", " ", []),
    (LLAMA, "<|pyt", "<|pyt", []),
    (LLAMA, "", "", []),
]  # fmt: skip


@pytest.mark.parametrize(("style", "text", "content", "calls"), CASES)
def test_what_is_told(style: Style, text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    told, called = read(style, [text])
    assert (told, as_json(called)) == (content, calls)
    assert read(style, [*text, ""]) == (told, called)


def test_arguments_are_told_as_they_come() -> None:
    """And as the model wrote them."""
    reader = ToolReader(HERMES, {"f"})
    pieces = ['<tool_call>{"name": "f", "arguments": ', '{"a":', "  1", ', "b"', ': "}', '"}', "}</tool_call>"]
    told = [reader.feed(piece, last=False).tool_calls for piece in pieces]
    news = [[call["function"]["arguments"] for call in calls] for calls in told]
    assert news == [[], ['{"a":'], ["  1"], [', "b"'], [': "}'], ['"}'], []]


def test_one_call_where_no_more_are_wanted() -> None:
    text = f"<tool_call>{written(F)}</tool_call>\n<tool_call>{written(G)}</tool_call>"
    content, calls = read(HERMES, [*text], parallel=False)
    assert (content, as_json(calls)) == ("", [F])


PARTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "[TOOL_CALLS]",
            "<|python_tag|>",
            "<",
            "[",
            "]",
            "{",
            "}",
            ",",
            ";",
            ":",
            "\n",
        ),
        *(" ", '"', "\\", "x", '"name"', '"f"', '"g"', '"arguments"', '"parameters"', '{"name": "f", "arguments": '),
        *(written(F), written(G, "parameters"), written(("h", {})), '{"a": 1}'),
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([HERMES, MISTRAL, PHI, LLAMA]), st.lists(PARTS, max_size=14), st.data())
def test_any_text_in_any_pieces(style: Style, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    whole = read(style, [text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    assert read(style, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == whole
    assert read(style, [*text, ""]) == whole
    if not whole[1]:
        assert whole[0] == text, style
