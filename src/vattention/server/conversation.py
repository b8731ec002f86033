"""From the messages of a request to a prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from vattention.engine.prompts import TokenizedPrompt
from vattention.server.errors import ApiError
from vattention.server.protocol.chat import ChatCompletionRequest, ChatMessage, ContentPart, ToolCall
from vattention.server.state import ServerState
from vattention.server.tools.request import tool_use

_NOT_FOR_TEMPLATES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "template",
        "tokenize",
        "tokenizer",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""What `apply_chat_template` takes for itself: a client's `chat_template_kwargs` are for the template alone."""


async def conversation(state: ServerState, body: ChatCompletionRequest) -> TokenizedPrompt:
    """The prompt of a conversation. Raises ApiError, 400, and InvalidRequest where the template refuses it."""
    options = dict(body.chat_template_kwargs or {})
    taken = _NOT_FOR_TEMPLATES & options.keys()
    if taken:
        raise ApiError(400, f"chat_template_kwargs cannot set {', '.join(sorted(taken))}", param="chat_template_kwargs")
    use = tool_use(state, body)
    if use is not None:
        options["tools"] = use.for_template
    return await state.llm.tokenize_chat(
        [_message(place, message) for place, message in enumerate(body.messages)],
        chat_template=state.settings.chat_template,
        add_generation_prompt=body.add_generation_prompt is not False,
        **options,
    )


def texts_of(message: ChatMessage) -> Iterator[str]:
    """The texts of a message, one by one."""
    if isinstance(message.content, str):
        yield message.content
    for part in message.content if isinstance(message.content, list) else ():
        yield part.text or ""


def _message(place: int, message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates know it."""
    # The developer's word is the newer name of the system's, and templates know the older one.
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if message.content is None and message.role != "assistant":  # which may have called tools and said nothing
        raise ApiError(400, f"message {place} of role {message.role!r} has no content", param="messages")
    turn["content"] = _text(place, message.content)
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [_call(place, call) for call in message.tool_calls]
    return turn


def _text(place: int, content: str | Sequence[ContentPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise ApiError(
                400,
                f"message {place} has a part of type {part.type!r}: this model reads text only",
                param="messages",
                code="not_supported",
            )
    return "\n".join(part.text or "" for part in content)


def _call(place: int, call: ToolCall) -> dict[str, Any]:
    """A tool call with its arguments as an object: templates write them out themselves."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError:
        raise ApiError(
            400, f"message {place}: the arguments of {call.function.name!r} are no JSON", param="messages"
        ) from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
