"""What can be set in a conversation, by name: how tokens are chosen, and what is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vattention.cli.prompts import sampling_params
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import InvalidRequest

MAX_TOKENS = 512
_DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_tokens": MAX_TOKENS}
_FIXED = {
    "n": "there is one answer at a time",
    "detokenize": "a conversation is text",
    "logprobs": "a conversation does not show them: use `vattention generate --logprobs`",
    "prompt_logprobs": "a conversation does not show them: use `vattention generate --prompt-logprobs`",
    "output_kind": "answers are shown as they come",
}
_WORDS = {"none": None, "true": True, "on": True, "false": False, "off": False}


class Settings:
    """The settings of a conversation.

    Attributes:
        stats: show how long each answer took.

    Raises:
        InvalidRequest: a value that cannot be.
    """

    def __init__(self, given: Mapping[str, Any] | None = None, *, stats: bool = False) -> None:
        self._defaults = {each.name: each.default for each in fields(SamplingParams) if each.name not in _FIXED}
        self._defaults |= _DEFAULTS
        self._values = {**self._defaults, **(given or {})}
        self.params = sampling_params(self._values)
        self.stats = stats

    def set(self, name: str, text: str) -> None:
        """Give a setting another value, written as people do; "default" is a value.

        Raises:
            InvalidRequest: no such setting, or no such value. Nothing has changed then.
        """
        name = name.replace("-", "_")
        if name == "stats":
            shown = _WORDS.get(text.lower())
            if shown is None and text != "default":
                raise InvalidRequest("stats is on or off")
            self.stats = bool(shown)
            return
        if name in _FIXED:
            raise InvalidRequest(f"{name} stays as it is: {_FIXED[name]}")
        if name not in self._defaults:
            raise InvalidRequest(f"there is no setting {name!r}: /set lists them")
        value = self._defaults[name] if text == "default" else _value(name, text)
        values = {**self._values, name: value}
        self.params = sampling_params(values)
        self._values = values

    def shown(self, name: str) -> str:
        """A setting and its value, as `set` takes them."""
        value = self._values[name]
        return f"{name} {json.dumps(value, ensure_ascii=False).replace('null', 'none')}"

    def lines(self) -> list[str]:
        """Every setting, a line each."""
        return [*(self.shown(name) for name in self._values), f"stats {json.dumps(self.stats)}"]


_FORMS = {
    "stop_token_ids": "a list such as [1, 2]",
    "logit_bias": 'an object such as {"5": -10}',
    "structured": 'an object such as {"regex": "[a-z]+"}',
}


def _value(name: str, text: str) -> Any:
    """A value as it is written: a number, a word such as on or none, JSON, or text as it is for `stop`."""
    if text.lower() in _WORDS:
        return () if text.lower() == "none" and name == "stop_token_ids" else _WORDS[text.lower()]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if name == "stop":
            return text
        value = None
    if value is None or (name == "stop_token_ids" and not isinstance(value, list)):
        switch = isinstance(SamplingParams.__dataclass_fields__[name].default, bool)
        form = _FORMS.get(name, "on or off" if switch else "a number")
        raise InvalidRequest(f"{name} must be {form}, not {text!r}")
    return value
