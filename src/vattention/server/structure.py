"""From `response_format`, and tools that have to be called, to the form of an answer."""

from __future__ import annotations

from typing import Any

from vattention.engine.grammar import json_rule, regex_rule
from vattention.engine.structured import StructuredOutput
from vattention.errors import InvalidRequest
from vattention.server.errors import ApiError
from vattention.server.protocol.chat import ChatCompletionRequest, ResponseFormat
from vattention.server.protocol.completions import CompletionRequest
from vattention.server.tools.request import ToolUse


def structured(
    request: ChatCompletionRequest | CompletionRequest, use: ToolUse | None = None, tokenizer: Any = None
) -> StructuredOutput | None:
    """`SamplingParams.structured` for a request: None where any text will do.

    An answer that has to call a tool is calls and nothing else. One that may call tools and has a `response_format`
    is either.

    Args:
        request: what is asked for.
        use: its tools, and the `tokenizer` that writes their calls.

    Raises:
        ApiError: 400.
    """
    param = "response_format" if request.structured_outputs is None else "structured_outputs"
    try:
        form = _form(request)
        if use is None:
            return form
        param = "tools" if form is None else param
        if use.called:
            if form is not None:
                raise ApiError(400, f"an answer that has to call a tool can have no {param}", param=param)
            return StructuredOutput(grammar=use.grammar(tokenizer))
        if form is None:
            return None
        if form.choice is not None:
            raise ApiError(400, "a choice of answers leaves no room for tool calls: leave tools out", param=param)
        rule = json_rule(form) if form.regex is None else regex_rule(form.regex)
        return StructuredOutput(grammar=use.grammar(tokenizer, rule))
    except (InvalidRequest, TypeError) as error:
        raise ApiError(400, str(error), param=param) from None


def _form(request: ChatCompletionRequest | CompletionRequest) -> StructuredOutput | None:
    asked = request.structured_outputs
    form = None if request.response_format is None else _of_format(request.response_format)
    if asked is None:
        return form
    if form is not None:
        raise ApiError(400, "give response_format or structured_outputs, not both", param="structured_outputs")
    return StructuredOutput(
        json_schema=asked.json_, json_object=bool(asked.json_object), regex=asked.regex, choice=asked.choice
    )


def _of_format(asked: ResponseFormat) -> StructuredOutput | None:
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return StructuredOutput(json_object=True)
    given = getattr(asked, asked.type)
    if given is None:
        raise InvalidRequest(f"response_format of type {asked.type!r} needs {asked.type!r} beside it")
    if asked.type == "regex":
        return StructuredOutput(regex=given)
    schema = given.schema_
    if schema is False:
        raise InvalidRequest("a schema of false allows no answer")
    return StructuredOutput(json_schema={} if schema is True else schema)
