"""From what people write to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vattention.engine.prompts import text_ids, tokenize_chat
from vattention.engine.sampling_params import SamplingParams
from vattention.engine.structured import StructuredOutput
from vattention.errors import ConfigError, InvalidRequest


def prompt_ids(tokenizer: Any | None, text: object) -> list[int]:
    """The token ids of what JSON has for a prompt. Raises InvalidRequest as `text_ids`, and for no string."""
    if not isinstance(text, str):
        raise InvalidRequest(f"a prompt is a string, not {type(text).__name__}")
    return text_ids(tokenizer, text)


def chat_ids(tokenizer: Any | None, messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
    """The token ids of a conversation in the model's chat template, up to where the answer begins.

    Raises:
        InvalidRequest: no template, or one that refuses the messages.
    """
    try:
        return tokenize_chat(tokenizer, messages).token_ids
    except TypeError as error:
        raise InvalidRequest(str(error)) from None


def has_template(tokenizer: Any | None) -> bool:
    """Whether there is a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_template(tokenizer: Any | None) -> None:
    """Raises ConfigError where chatting is impossible."""
    if tokenizer is None:
        raise ConfigError("this model came without a tokenizer: a conversation needs one with a chat template")
    if not has_template(tokenizer):
        raise ConfigError("this model has no chat template: use `vattention generate`, which does without")


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """The parameters of these names, from values as JSON has them.

    Raises:
        InvalidRequest: a value of the wrong type or out of range.
    """
    values = dict(values)
    bias = values.get("logit_bias")
    if isinstance(bias, Mapping):
        # The names of a JSON object are strings.
        try:
            values["logit_bias"] = {int(token): value for token, value in bias.items()}
        except ValueError:
            raise InvalidRequest("logit_bias maps token ids to numbers: its names must be whole numbers") from None
    try:
        if isinstance(values.get("structured"), Mapping):
            values["structured"] = StructuredOutput(**values["structured"])
        return SamplingParams(**values)
    except TypeError as error:
        raise InvalidRequest(str(error)) from None
