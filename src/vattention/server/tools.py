"""From generated text to OpenAI's messages: what is content, and what is a tool call. The seam of tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from vattention.server.errors import ApiError
from vattention.server.protocol.chat import ChatCompletionRequest


@dataclass(frozen=True)
class MessageDelta:
    """What a piece of text adds to a message.

    Attributes:
        content: text for people.
        tool_calls: pieces of calls in the shape of OpenAI's `delta.tool_calls`: `index`, and `id`, `type` and
            `function.name` in the first piece of each, and more of `function.arguments` in each.
    """

    content: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()


class AnswerReader(Protocol):
    """Reads the text of one answer as it comes. One for each sample."""

    def feed(self, text: str, *, last: bool) -> MessageDelta:
        """Take the next piece of text. `last`: there is no more."""


class PlainReader:
    """All of it is content."""

    def feed(self, text: str, *, last: bool) -> MessageDelta:
        """The text itself."""
        return MessageDelta(text)


def answer_reader(request: ChatCompletionRequest) -> AnswerReader:
    """Who reads the answers to this request."""
    return PlainReader()


def template_tools(request: ChatCompletionRequest) -> list[dict[str, Any]] | None:
    """The tools that the chat template is told of; None: none.

    Raises:
        ApiError: 400, where the request asks for what is not built.
    """
    if not request.tools or request.tool_choice == "none":
        return None
    raise ApiError(400, "tools are not built yet", param="tools", code="not_supported")
