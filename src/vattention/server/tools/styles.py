"""How models write tool calls. What a model was trained on shows in its chat template."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """One way to write calls.

    Attributes:
        begin: what comes before calls; "": a call is the whole answer.
        end: what comes after them; "" for the end of the answer.
        inner: white space between those and the calls.
        arguments: the key of a call's arguments; that of its name is "name".
        listed: all calls of an answer are one JSON array between `begin` and `end`; otherwise each has its own.
        parallel: there may be several calls in an answer.
        skip: what may come before a call where `begin` is empty.
    """

    begin: str
    end: str = ""
    inner: str = ""
    arguments: str = "arguments"
    listed: bool = False
    parallel: bool = True
    skip: str = ""


def style_of(template: str) -> Style | None:
    """The style of a chat template; None where it does not know tools, or writes calls in a way that is not known.

    Known are that of Hermes, Qwen and SmolLM, that of Mistral (with JSON arrays), that of Phi-4 and Granite, and that
    of Llama 3.
    """
    if not re.search(r"\btools\b", template):
        return None
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template:
        return Style("[TOOL_CALLS]", inner=" " if "[TOOL_CALLS] " in template else "", listed=True)
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        listed = re.search(r"<tool_call>(\\n|\s)*\[", template) is not None
        return Style("<tool_call>", "</tool_call>", inner="" if listed else "\n", listed=listed)
    if "<|tool_call|>" in template:
        return Style("<|tool_call|>", "<|/tool_call|>" if "<|/tool_call|>" in template else "", listed=True)
    if "<|python_tag|>" in template or re.search(r'\{"name": ?function name, ?"parameters"', template):
        return Style("", arguments="parameters", parallel=False, skip="<|python_tag|>")
    return None
