from typing import Any

import pytest

from vattention.errors import ConfigError
from vattention.server.settings import ServerSettings


def made(**changes: Any) -> ServerSettings:
    return ServerSettings(**{"served_model_names": ("m",), **changes})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("served_model_names", ()), ("served_model_names", ("",)), ("api_keys", (" ",)), ("api_keys", ("a b",))),
        *(("api_keys", ("é",)), ("api_keys", ("a\n",)), ("max_body_bytes", 0), ("max_queue", -1), ("max_tokens", 0)),
        *(("max_samples", 0), ("request_timeout", 0), ("request_timeout", float("inf")), ("body_timeout", 0)),
        *(("stall_timeout", float("nan")), ("drain_timeout", -1), ("port", 65536), ("port", -1)),
        *(("log_level", "loud"), ("log_format", "xml")),
    ],
)
def test_a_value_that_cannot_be_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        made(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("served_model_names", "m"), ("api_keys", ["k"]), ("cors_origins", (1,)), ("max_queue", 1.0)),
        *(("max_tokens", True), ("port", "80"), ("request_timeout", "1"), ("host", None), ("log_prompts", 1)),
        ("chat_template", b""),
        ("warm", 1),
    ],
)
def test_a_value_of_the_wrong_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        made(**{name: value})


def test_keys_are_not_shown() -> None:
    assert "sk-secret" not in repr(made(api_keys=("sk-secret",)))
    with pytest.raises(ConfigError) as raised:
        made(api_keys=("sk-secret", "sk secret"))
    assert "secret" not in str(raised.value)
    assert "key 2" in str(raised.value)
