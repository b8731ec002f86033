"""Conversations, in the form that the model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vattention.errors import InvalidRequest

Message = Mapping[str, Any]
"""At least `role` and `content`; what else a model's template knows is handed through."""


def chat_text(
    tokenizer: Any | None,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    **options: Any,
) -> str:
    """The text of a conversation, special tokens written out: tokenize it without adding more.

    Args:
        tokenizer: of transformers.
        messages: the turns.
        template: in place of the tokenizer's own.
        add_generation_prompt: begin the answer.
        options: what else the template knows, such as `tools`.

    Raises:
        TypeError: no messages. InvalidRequest: no tokenizer, no template, or one that refuses these messages.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a sequence of dictionaries, not {type(messages).__name__}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"message {number} must be a dictionary, not {type(message).__name__}")
        if not isinstance(message.get("role"), str):
            raise InvalidRequest(f'message {number} has no "role"')
    if not messages:
        raise InvalidRequest("a conversation needs at least one message")
    if tokenizer is None:
        raise InvalidRequest("this model came without a tokenizer: chat needs one with a chat template")
    if template is None and not getattr(tokenizer, "chat_template", None):
        raise InvalidRequest("this model has no chat template: give one, or use generate with plain text")
    # Of transformers' own requirements for templates; imported late, as it is needed for nothing else.
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **options,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the chat template refuses these messages: {error}") from None
    return text
