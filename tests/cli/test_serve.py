"""Where the options of `vattention serve` come from. What it does with them is tested in tests/server."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vattention.cli.arguments import parser
from vattention.cli.serve import KEYS, PREFIX, opener, settings
from vattention.cli.sources import Sources
from vattention.errors import ConfigError

KEY = "sk-very-secret"


def read(*flags: str, environ: Mapping[str, str] | None = None) -> argparse.Namespace:
    args = parser().parse_args(["serve", *flags])
    sources = Sources(args.options, PREFIX, {"api_key": KEYS})
    sources.fill(args, environ or {})
    args.sources = sources
    return args


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "server.toml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_before_the_environment_before_the_file_before_defaults(file: Any) -> None:
    path = file("port = 1\nmax-queue = 1\ndrain_timeout = 1\nmodel = 'a'\n")
    environ = {"VATTENTION_SERVE_PORT": "2", "VATTENTION_SERVE_MAX_QUEUE": "2", "VATTENTION_SERVE_CONFIG": path}
    made = settings(read("--port", "3", environ=environ))
    assert (made.port, made.max_queue, made.drain_timeout, made.max_samples) == (3, 2, 1.0, 16)
    assert made.served_model_names == ("a",)
    assert settings(read("b", environ=environ)).served_model_names == ("b",)


def test_every_option_of_the_engine_can_come_from_anywhere(file: Any) -> None:
    text = (
        'dtype = "float32"\nmax_model_len = 64\nkv-cache-memory = "1GiB"\nhead-major = true\n'
        'layers_per_stream = "all"\ncompile = false\nseed = 3\n'
    )
    from_file = read("--config", file(text))
    from_environment = read(
        environ={
            PREFIX + "DTYPE": "float32",
            PREFIX + "MAX_MODEL_LEN": "64",
            PREFIX + "KV_CACHE_MEMORY": "1GiB",
            PREFIX + "HEAD_MAJOR": "on",
            PREFIX + "LAYERS_PER_STREAM": "all",
            PREFIX + "COMPILE": "no",
            PREFIX + "SEED": "3",
        }
    )
    flags = "--dtype float32 --max-model-len 64 --kv-cache-memory 1GiB --head-major --layers-per-stream all"
    from_flags = read(*flags.split(), "--no-compile", "--seed", "3")
    for args in (from_file, from_environment, from_flags):
        for name in ("run", "config", "options", "sources"):
            vars(args).pop(name, None)
    assert vars(from_file) == vars(from_environment) == vars(from_flags)


def test_every_option_of_the_engine_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("vattention.async_llm.AsyncLLM", lambda model, **options: given.update(options, model=model))
    monkeypatch.setattr("vattention.cli.serve.keep_for_good", lambda: None)  # this process goes on with other tests
    opener(read("m", "--device", "cpu", "--page-size", "64KiB", "--no-compile", "--expected-tokens", "300"))()
    assert given == dict(model="m", device="cpu", page_size="64KiB", compile=False, expected_tokens=300)


def test_all_goes_before_another_number_of_layers() -> None:
    args = read("--layers-per-stream", "all", environ={PREFIX + "LAYERS_PER_STREAM": "2"})
    assert args.layers_per_stream is None


def test_a_switch_that_is_off_on_the_command_line_stays_off() -> None:
    made = settings(read("--no-dashboard", "--no-metrics", environ={PREFIX + "DASHBOARD": "1"}))
    assert not made.enable_dashboard
    assert not made.enable_metrics


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(('port = "many"', "port must be a whole number"), ("head_major = 1", "head_major must be true or false")),
        *(("prot = 1", "no option 'prot': port"), ("port = ", "is not TOML"), ("port = [1]", "must be text or a num")),
        *(("log-level = 'loud'", "log-level must be one of"), ("api_key = []", "is empty"), ("run = 1", "no option")),
        *(("config = 'x'", "no option 'config'"), ("max_body_bytes = 'lots'", "is not a size")),
    ],
)
def test_a_mistake_in_the_file_names_the_file(text: str, message: str, file: Any) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read("--config", file(text))
    assert "server.toml" in str(raised.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.toml: No such file"):
        read("--config", "nowhere.toml")


@pytest.mark.parametrize(
    ("variable", "text"),
    [("PORT", "many"), ("PORT", ""), ("COMPILE", "maybe"), ("LOG_FORMAT", "xml"), ("CORS_ORIGIN", " , ")],
)
def test_a_mistake_in_the_environment_names_the_variable(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=PREFIX + variable):
        read(environ={PREFIX + variable: text})


def test_a_variable_that_is_no_option_is_said() -> None:
    with pytest.warns(UserWarning, match="VATTENTION_SERVE_PROT"):
        read(environ={"VATTENTION_SERVE_PROT": "1", "VATTENTION_OTHER": "1"})


def test_a_value_that_cannot_be_names_where_it_comes_from(file: Any) -> None:
    args = read("--config", file("port = 70000"))
    with pytest.raises(ConfigError) as raised:
        settings(args)
    assert "server.toml" in args.sources.blame(str(raised.value))
    assert "server.toml" not in args.sources.blame("there is no support")


def test_keys_add_up_from_where_they_are(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsk-1\n\n  sk-2\nsk-1\n")
    assert settings(read()).api_keys == ()
    assert settings(read(environ={KEYS: "a, b"})).api_keys == ("a", "b")
    assert settings(read("--api-key", "c", "--api-key", "d", environ={KEYS: "a"})).api_keys == ("c", "d")
    assert settings(read("--api-key-file", str(keys), environ={KEYS: "a"})).api_keys == ("a", "sk-1", "sk-2")


def test_an_empty_source_of_keys_does_not_open_the_server(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(ConfigError, match=KEYS):
        read(environ={KEYS: ""})
    with pytest.raises(ConfigError, match="has no key"):
        settings(read("--api-key-file", str(tmp_path / "keys")))
    with pytest.raises(ConfigError, match="api_keys"):
        settings(read("--api-key", ""))


def test_no_message_shows_a_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n{KEY} twice\n")
    with pytest.raises(ConfigError) as raised:
        settings(read("--api-key-file", str(tmp_path / "keys")))
    assert KEY not in str(raised.value)


def test_what_clients_call_the_model(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "it.gguf").touch()
    names = [
        settings(read(*flags)).served_model_names
        for flags in ([], [f"{tmp_path}/my-model/"], [f"{tmp_path}/it.gguf"], ["org/name"])
    ]
    assert names == [("SmolLM2-135M-Instruct",), ("my-model",), ("it",), ("org/name",)]
    assert settings(read("--served-model-name", "a", "--served-model-name", "b")).served_model_names == ("a", "b")


def test_a_chat_template_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert settings(read("--chat-template", str(tmp_path / "t.jinja"))).chat_template == "{{ messages }}"
    with pytest.raises(ConfigError, match="cannot read"):
        settings(read("--chat-template", str(tmp_path / "no.jinja")))
