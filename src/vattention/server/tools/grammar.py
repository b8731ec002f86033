"""Grammars of answers that are tool calls, in the words of a model's style."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vattention.engine.grammar import json_rule
from vattention.engine.structured import StructuredOutput
from vattention.server.protocol.chat import Function
from vattention.server.tools.styles import Style

_MOST_CALLS = 16
"""In one answer that is made to call: it has to end some time."""


def calls_grammar(
    style: Style, functions: Sequence[Function], tokenizer: Any, *, parallel: bool, otherwise: str | None = None
) -> str:
    """A Lark grammar: calls of these functions, with arguments of their parameters.

    Args:
        style: how the model writes calls.
        functions: at least one.
        tokenizer: of transformers: what it holds for special tokens is written as such.
        parallel: several calls, where the style has them.
        otherwise: a rule for answers that are no calls; None: there are none.

    Raises:
        InvalidRequest: parameters that no grammar can be made of.
    """
    names = [f"call_{place}" for place in range(len(functions))]
    rules = [f"{name}: {_call(style, function)}" for name, function in zip(names, functions, strict=True)]
    rules.append("call: " + " | ".join(names))
    before, after = _marker(style.begin + style.inner, tokenizer), _marker(style.inner + style.end, tokenizer)
    if style.listed:
        before, after = f'{before} "["', f'"]" {_marker(style.inner + style.end if style.end else "", tokenizer)}'
    more = _MOST_CALLS - 1 if parallel and style.parallel else 0
    if style.listed:
        rules.append(f"calls: {before} call" + (f' (", " call){{0,{more}}}' if more else "") + f" {after}")
    else:
        rules.append(f"one: {before} call {after}")
        rules.append("calls: one" + (f' ("\\n" one){{0,{more}}}' if more else ""))
    if otherwise is not None:
        rules.append(f"otherwise: {otherwise}")
    rules.append("start: calls" + ("" if otherwise is None else " | otherwise"))
    return "\n".join(rules)


def _call(style: Style, function: Function) -> str:
    # The parameters stay the root of a schema of their own: what they refer to by "#/..." is found there.
    parameters = {"type": "object", **(function.parameters or {"properties": {}, "additionalProperties": False})}
    rule = json_rule(StructuredOutput(json_schema=parameters), lenient=not function.strict)
    name = json.dumps(function.name, ensure_ascii=False)
    return " ".join((_text(f'{{"name": {name}, "{style.arguments}": '), rule, _text("}")))


def _marker(text: str, tokenizer: Any) -> str:
    """A text in which special tokens stand for themselves."""
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    parts = []
    while text:
        found = [(at, -len(name), name) for name in special if name and (at := text.find(name)) >= 0]
        at, _, name = min(found, default=(len(text), 0, ""))
        if at:
            parts.append(_text(text[:at]))
        if name:
            parts.append(f"<[{special[name]}]>")
        text = text[at + len(name) :]
    return " ".join(parts)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
