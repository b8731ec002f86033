"""Chat templates that know tools, small ones in the styles of models that people use, and tools to call."""

from typing import Any

_TURNS = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}CALL{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""

_TOLD = """\
{%- if tools -%}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }}
{% endfor %}HOW<|im_end|>
{% endif -%}
"""

_CALL = '{"name": "{{ call.function.name }}", "KEY": {{ call.function.arguments | tojson }}}'


def _template(how: str, call: str, key: str = "arguments") -> str:
    return _TOLD.replace("HOW", how) + _TURNS.replace("CALL", call.replace("JSON", _CALL.replace("KEY", key)))


TEMPLATES = {
    "hermes": _template(
        'Answer with <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>', "<tool_call>\nJSON\n</tool_call>\n"
    ),
    "smollm": _template("Call like this: <tool_call>[{...}]</tool_call>", "<tool_call>[JSON]</tool_call>"),
    "mistral": _template("[AVAILABLE_TOOLS]", "[TOOL_CALLS] [JSON]"),
    "phi": _template("", "<|tool_call|>[JSON]<|/tool_call|>"),
    "llama": _template(
        'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.',
        "JSON",
        "parameters",
    ),
    "coder": _template("", "<tool_call>\n<function={{ call.function.name }}>...</function>\n</tool_call>"),
    "none": _TURNS.replace("CALL", ""),
}


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A tool as clients give it."""
    return {
        "type": "function",
        "function": {"name": name, "description": f"Does {name}.", "parameters": parameters, **more},
    }


WEATHER = tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "Rome"]},
            "unit": {"$ref": "#/$defs/unit"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "unit", "days"],
        "additionalProperties": False,
        "$defs": {"unit": {"enum": ["celsius", "fahrenheit"]}},
    },
)
TIME = tool("get_time")
TOOLS = [WEATHER, TIME]


def is_call(name: str, arguments: Any) -> bool:
    """Whether this calls one of `TOOLS` as it wants to be called."""
    if name == "get_time":
        return bool(arguments == {})
    right = set(arguments) == {"city", "unit", "days"} and arguments["city"] in ("Paris", "Rome")
    return (
        name == "get_weather"
        and right
        and arguments["unit"] in ("celsius", "fahrenheit")
        and 1 <= arguments["days"] <= 9
    )
