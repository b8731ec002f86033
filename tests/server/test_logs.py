import io
import json
import logging
from typing import Any

import pytest

from vattention.server import logs
from vattention.server.settings import ServerSettings

KEY = "sk-a-key-of-ours"


def written(kind: str, message: str, level: str = "info", **fields: Any) -> str:
    stream = io.StringIO()
    logs.configure(ServerSettings(served_model_names=("m",), api_keys=(KEY,), log_format=kind), stream)
    extra = {"fields": fields}
    try:
        raise ValueError(f"inside, with {KEY}")
    except ValueError:
        logging.getLogger("vattention.server.x").log(
            logging.getLevelName(level.upper()), message, extra=extra, exc_info=level == "error"
        )
    return stream.getvalue()


def test_json_is_an_object_a_line() -> None:
    line = written("json", "hello", path="/a\nb\x1b[31m", status=200)
    assert line.count("\n") == 1
    assert "\x1b" not in line
    event = json.loads(line)
    assert event.pop("time").endswith("+00:00")
    assert event == {
        "level": "info",
        "logger": "vattention.server.x",
        "message": "hello",
        "path": "/a\nb\x1b[31m",
        "status": 200,
    }


def test_text_is_a_line_that_nobody_can_end() -> None:
    line = written("text", "hel\nlo", path="/a\nb", reason="two words", status=200)
    assert line.count("\n") == 1
    assert line.rstrip().endswith('INFO x: hel\\nlo path="/a\\nb" reason="two words" status=200')


@pytest.mark.parametrize("kind", ["json", "text"])
def test_a_key_never_gets_into_the_log(kind: str) -> None:
    line = written(kind, f"key {KEY}", "error", path=f"/v1/models/{KEY}")
    assert KEY not in line
    assert line.count("[api key]") == 3
    assert "ValueError" in line


def test_the_level_is_that_of_the_settings() -> None:
    assert not written("text", "hello", "debug")


def test_lines_of_others_become_events() -> None:
    stream = io.StringIO()
    logs.configure(ServerSettings(served_model_names=("m",), log_format="json"), stream)
    file = logs.Written()
    print("vattention: one", file=file)
    print("tw", end="", file=file)
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["one"]
    print("o\n\nthree", file=file)
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["one", "two", "three"]
