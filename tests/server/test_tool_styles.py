"""Which style of tool calls a chat template speaks of."""

import pytest
from jinja2 import Environment

from support.tools import TEMPLATES, TOOLS
from vattention.server.tools.styles import Style, style_of

STYLES = {
    "hermes": Style("<tool_call>", "</tool_call>", inner="\n"),
    "smollm": Style("<tool_call>", "</tool_call>", listed=True),
    "mistral": Style("[TOOL_CALLS]", inner=" ", listed=True),
    "phi": Style("<|tool_call|>", "<|/tool_call|>", listed=True),
    "llama": Style("", arguments="parameters", parallel=False, skip="<|python_tag|>"),
    "coder": None,
    "none": None,
}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_style_of(name: str) -> None:
    assert style_of(TEMPLATES[name]) == STYLES[name]
    text = Environment().from_string(TEMPLATES[name]).render(messages=[], tools=TOOLS)
    assert ("get_weather" in text) == (name != "none")


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{% if tools %}{{ '[TOOL_CALLS][' }}{% endif %}", Style("[TOOL_CALLS]", listed=True)),
        ("{% if tools %}[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}{% endif %}", None),
        ("{% if tools %}<|tool_call|>{% endif %}", Style("<|tool_call|>", listed=True)),
        ("{% if tools %}{{ '<|python_tag|>' }}{% endif %}", STYLES["llama"]),
        ("{% if tools %}<tool_call>{{ name }}<arg_key>{% endif %}", None),
        ("{% if tools %}{{ tools }}{% endif %}", None),
        ("<tool_call> toolset", None),
        ("", None),
    ],
)
def test_others(template: str, style: Style | None) -> None:
    assert style_of(template) == style
