"""From `response_format` and tools to the form of an answer, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from support import tokenizers
from support.tools import TEMPLATES, TOOLS, tool
from vattention import StructuredOutput
from vattention.engine.grammar import Grammars
from vattention.server.errors import ApiError
from vattention.server.protocol.chat import ChatCompletionRequest
from vattention.server.protocol.completions import CompletionRequest
from vattention.server.settings import ServerSettings
from vattention.server.structure import structured
from vattention.server.tools.request import ToolUse, tool_use

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
REGEX = {"type": "regex", "regex": "a"}


def of_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema, **more}}


class Model:
    """What a request asks of a model."""

    def __init__(self, template: Any) -> None:
        self.tokenizer = tokenizers.byte_level()
        self.tokenizer.chat_template = template


def state_with(template: Any, given: str | None = None) -> Any:
    settings = ServerSettings(served_model_names=("m",), chat_template=given)
    return SimpleNamespace(llm=Model(template), settings=settings)


def asked(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}], **fields})


def use_of(template: str = "hermes", **fields: Any) -> ToolUse | None:
    return tool_use(state_with(TEMPLATES[template]), asked(**fields))


def form_of(**fields: Any) -> StructuredOutput | None:
    request = asked(**fields)
    state = state_with(TEMPLATES["hermes"])
    return structured(request, tool_use(state, request), state.llm.tokenizer)


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
        ({"response_format": of_schema(SCHEMA, name="x", strict=True)}, StructuredOutput(json_schema=SCHEMA)),
        ({"response_format": of_schema(True)}, StructuredOutput(json_schema={})),
        ({"response_format": {"type": "regex", "regex": "a+"}}, StructuredOutput(regex="a+")),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutput(json_schema=SCHEMA)),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, StructuredOutput(json_schema='{"type": "null"}')),
        ({"structured_outputs": {"json_object": True}}, StructuredOutput(json_object=True)),
        ({"structured_outputs": {"regex": "a"}}, StructuredOutput(regex="a")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(choice=["a", "b"])),
        ({"tools": TOOLS}, None),
        ({"tools": TOOLS, "tool_choice": "none", "response_format": REGEX}, StructuredOutput(regex="a")),
        ({"tools": []}, None),
    ],
)  # fmt: skip
def test_forms(fields: dict[str, Any], form: StructuredOutput | None) -> None:
    assert form_of(**fields) == form
    if "tools" not in fields:
        assert structured(CompletionRequest.model_validate({"prompt": "x", **fields})) == form


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs 'json_schema'"),
        ({"response_format": {"type": "regex"}}, "response_format", "needs 'regex'"),
        ({"response_format": of_schema(False)}, "response_format", "false"),
        ({"response_format": {"type": "regex", "regex": "(a{1000}){1000}"}}, "response_format", "too large"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a"}, "response_format": REGEX}, "structured_outputs", "both"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": REGEX}, "response_format", "call"),
        ({"tools": TOOLS, "structured_outputs": {"choice": ["a"]}}, "structured_outputs", "choice"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": TOOLS}, "tool_choice", "'x'"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "no tools"),
        ({"tools": [tool("a"), tool("a")]}, "tools", "name of its own"),
        ({"tools": [tool("")]}, "tools", "name of its own"),
        ({"tools": [tool("a", {"not": {"pattern": "(.{999}){99}"}})], "tool_choice": "required"}, "tools", "large"),
    ],
)  # fmt: skip
def test_refused(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(ApiError, match=says) as refused:
        form_of(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_what_is_no_request() -> None:
    for wrong in (
        {"type": "xml"},
        {"type": "json_schema", "json_schema": {"schema": 3}},
        {"type": "regex", "regex": 3},
    ):
        with pytest.raises(ValidationError):
            asked(response_format=wrong)


def test_templates_without_tools() -> None:
    for template in ("none", "coder"):
        with pytest.raises(ApiError, match="does not know tools") as refused:
            use_of(template, tools=TOOLS)
        assert (refused.value.status, refused.value.param, refused.value.code) == (400, "tools", "not_supported")
        assert use_of(template, tools=TOOLS, tool_choice="none") is None


def test_which_template_counts() -> None:
    request = asked(tools=TOOLS)
    named = {"default": TEMPLATES["none"], "tool_use": TEMPLATES["phi"]}
    for state, begin in (
        (state_with(named), "<|tool_call|>"),
        (state_with({"default": TEMPLATES["mistral"]}), "[TOOL_CALLS]"),
        (state_with(named, given=TEMPLATES["hermes"]), "<tool_call>"),
    ):
        use = tool_use(state, request)
        assert use is not None
        assert use.style.begin == begin


def test_what_templates_are_told() -> None:
    use = use_of(tools=[tool("f", {"type": "object"}, strict=True), tool("g")])
    assert use is not None
    assert use.for_template == [
        {"type": "function", "function": {"name": "f", "description": "Does f.", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "g", "description": "Does g."}},
    ]


@pytest.mark.parametrize("template", ["hermes", "smollm", "mistral", "phi", "llama"])
@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_time"}}])
def test_every_grammar_can_be_read(template: str, choice: Any) -> None:
    fields = {} if choice != "auto" else {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
    request = asked(tools=TOOLS, tool_choice=choice, **fields)
    state = state_with(TEMPLATES[template])
    form = structured(request, tool_use(state, request), state.llm.tokenizer)
    assert form is not None
    tokenizer = state.llm.tokenizer
    Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id]).read(form)


def test_special_tokens_stand_for_themselves() -> None:
    state = state_with(TEMPLATES["mistral"])
    use = tool_use(state, asked(tools=TOOLS))
    assert use is not None
    tokenizer: Any = state.llm.tokenizer
    assert '"[TOOL_CALLS] "' in use.grammar(tokenizer)
    assert not use.hides_calls(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    number = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    assert f'<[{number}]> " "' in use.grammar(tokenizer)
    assert use.hides_calls(tokenizer)
    form = StructuredOutput(grammar=use.grammar(tokenizer))
    grammar = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id]).read(form)
    assert grammar.start.deep_copy().try_consume_tokens([number]) == 1
