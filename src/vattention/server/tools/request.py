"""What a request says about tools, and what follows for its prompt, its grammar and its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vattention.server.errors import ApiError
from vattention.server.protocol.chat import ChatCompletionRequest, Function, NamedTool
from vattention.server.state import ServerState
from vattention.server.tools.grammar import calls_grammar
from vattention.server.tools.reader import AnswerReader, PlainReader, ToolReader
from vattention.server.tools.styles import Style, style_of


@dataclass(frozen=True)
class ToolUse:
    """Tools that an answer may call.

    Attributes:
        style: how the model writes calls.
        functions: all of them.
        called: those that the answer has to call one of; empty where it may do as it likes.
        parallel: several calls in one answer.
    """

    style: Style
    functions: tuple[Function, ...]
    called: tuple[Function, ...]
    parallel: bool

    @property
    def for_template(self) -> list[dict[str, Any]]:
        """The tools as chat templates know them."""
        return [
            {"type": "function", "function": each.model_dump(exclude_none=True, exclude={"strict"})}
            for each in self.functions
        ]

    def reader(self) -> AnswerReader:
        """Who reads one answer."""
        return ToolReader(self.style, [each.name for each in self.functions], parallel=self.parallel)

    def grammar(self, tokenizer: Any, otherwise: str | None = None) -> str:
        """A grammar of calls, or, where no call has to be made, of what is a rule `otherwise`; see `calls_grammar`."""
        functions = self.called or self.functions
        return calls_grammar(self.style, functions, tokenizer, parallel=self.parallel, otherwise=otherwise)

    def hides_calls(self, tokenizer: Any) -> bool:
        """Whether calls are told by special tokens, which texts leave out unless they are asked for."""
        marks = (self.style.begin, self.style.end, self.style.skip)
        added = tokenizer.added_tokens_decoder.values()
        return any(token.special and token.content and token.content in marks for token in added)


def tool_use(state: ServerState, request: ChatCompletionRequest) -> ToolUse | None:
    """The tools of a request; None where it has none, or is not to use them.

    Raises:
        ApiError: 400, where the model cannot be told of tools, or the request does not agree with itself.
    """
    choice = request.tool_choice
    if not request.tools:
        if choice == "required" or isinstance(choice, NamedTool):
            raise ApiError(400, "tool_choice asks for a call, and there are no tools", param="tool_choice")
        return None
    functions = tuple(tool.function for tool in request.tools)
    names = [function.name for function in functions]
    if not all(names) or len(set(names)) < len(names):
        raise ApiError(400, "every tool needs a name of its own", param="tools")
    if choice == "none":
        return None
    return ToolUse(
        style=_style(state),
        functions=functions,
        called=_called(choice, functions),
        parallel=request.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
    )


def answer_reader(use: ToolUse | None) -> AnswerReader:
    """Who reads one answer to a request with these tools."""
    return PlainReader() if use is None else use.reader()


def _called(
    choice: Literal["none", "auto", "required"] | NamedTool | None, functions: tuple[Function, ...]
) -> tuple[Function, ...]:
    if isinstance(choice, NamedTool):
        called = tuple(each for each in functions if each.name == choice.function.name)
        if not called:
            raise ApiError(400, f"tool_choice names {choice.function.name!r}, which is no tool", param="tool_choice")
        return called
    return functions if choice == "required" else ()


def _style(state: ServerState) -> Style:
    template: Any = state.settings.chat_template or getattr(state.llm.tokenizer, "chat_template", None)
    if isinstance(template, dict):  # transformers takes the one of this name where there are tools
        template = template.get("tool_use") or template.get("default")
    style = style_of(template) if isinstance(template, str) else None
    if style is None:
        raise ApiError(
            400,
            "this model's chat template does not know tools, or writes calls in a way that is not supported",
            param="tools",
            code="not_supported",
        )
    return style
