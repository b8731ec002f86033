import asyncio
import base64
import json
from typing import Any

import pytest

from support.asgi import call, saying, scope_of
from vattention.server.middleware.keys import ApiKeys

KEYS = ("sk-first-key", "sk-second-key")


def ask(path: str = "/v1/models", method: str = "GET", keys: tuple[str, ...] = KEYS, **headers: str) -> Any:
    return asyncio.run(call(ApiKeys(saying("in"), keys=keys), scope_of(method, path, **headers)))


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "authorization",
    ["Bearer sk-first-key", "bearer sk-second-key", "Bearer   sk-first-key ", basic("anybody:sk-second-key")],
)
def test_each_key_opens_every_path(authorization: str) -> None:
    for path in ("/v1/models", "/metrics", "/dashboard", "/anything"):
        assert ask(path, authorization=authorization).body == b"in"


@pytest.mark.parametrize(
    "authorization",
    [
        *("", "Bearer", "Bearer ", "Bearer sk-first", "Bearer sk-first-key2", "Bearer SK-FIRST-KEY", "sk-first-key"),
        *("Basic sk-first-key", "Basic !", basic("sk-first-key"), basic("sk-first-key:"), basic(":"), "Digest x"),
        *("Bearer sk-first-key, Bearer sk-second-key", "Bearer \xff\xfe", "Bearer sk-first-key\x00"),
    ],
)
def test_anything_else_is_401_in_the_shape_of_openai(authorization: str) -> None:
    answer = ask(authorization=authorization)
    assert answer.status == 401
    error = json.loads(answer.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_api_key"
    assert not any(key in answer.body.decode() for key in ("sk-first", "sk-second"))
    assert answer.headers["www-authenticate"] == "Bearer"


def test_without_a_header_and_with_two_of_them() -> None:
    assert ask().status == 401
    scope = scope_of("GET", "/v1/models", authorization="Bearer sk-first-key")
    scope["headers"] *= 2
    assert asyncio.run(call(ApiKeys(saying("in"), keys=KEYS), scope)).status == 401


def test_who_watches_needs_none_and_a_browser_is_asked_for_one() -> None:
    for path in ("/health", "/ready", "/version"):
        assert ask(path).body == b"in"
    for path in ("/health/", "/healthz", "/ready/x"):
        assert ask(path).status == 401
    assert ask("/dashboard").headers["www-authenticate"].startswith("Basic ")


def test_with_no_key_configured_any_is_accepted() -> None:
    for headers in ({}, {"authorization": "Bearer whatever"}, {"authorization": "nonsense"}):
        assert ask(keys=(), **headers).body == b"in"
