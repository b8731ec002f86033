"""`vattention serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vattention.cli.options import (
    CAPACITY,
    CHECKS,
    CHOICE,
    FEATURES,
    MODEL,
    add_capacity,
    add_checks,
    add_command,
    add_features,
    add_layout,
    add_model,
    given,
    no_bars,
)
from vattention.cli.sources import Sources
from vattention.cli.startup import keep_for_good, without_collecting
from vattention.errors import ConfigError

if TYPE_CHECKING:
    from vattention.async_llm import AsyncLLM
    from vattention.server.settings import ServerSettings

PREFIX = "VATTENTION_SERVE_"
KEYS = "VATTENTION_API_KEY"
DEMO_NAME = "SmolLM2-135M-Instruct"

_EXTRA = ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance")

# Settings of the server that are one value each: option, type, metavar, help.
_PLAIN: tuple[tuple[str, Any, str, str], ...] = (
    ("host", str, "ADDRESS", "where to listen; 0.0.0.0 for every address (127.0.0.1)"),
    ("port", int, "N", "0 for one that is free (8000)"),
    ("max_tokens", int, "N", "tokens of one answer, at most (what fits)"),
    ("max_samples", int, "N", "answers to one prompt, at most (16)"),
    ("max_queue", int, "N", "answers that may wait, before 429 (256)"),
    ("request_timeout", float, "S", "seconds for a request in all (no limit)"),
    ("body_timeout", float, "S", "seconds for the body of a request to come (60)"),
    ("stall_timeout", float, "S", "seconds that a client may leave an answer unread (60)"),
    ("drain_timeout", float, "S", "seconds for requests to end after SIGTERM (30)"),
)
_SWITCHES = ("warm", "log_prompts", "enable_metrics", "enable_dashboard")


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "serve", run, "answer OpenAI's clients over HTTP", _MORE)
    add_model(parser)
    add = parser.add_argument_group("server").add_argument
    for name, kind, metavar, about in _PLAIN:
        add(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=about)
    add("--max-body-bytes", type=_size, metavar="SIZE", help='of a request, such as "8MiB" (8MiB)')
    add("--served-model-name", action="append", metavar="NAME", help="what clients call the model; may be repeated")
    add("--chat-template", metavar="F", help="a file with a chat template, in place of the model's own")
    add(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        help="whose pages may ask, * for all; may be repeated (none)",
    )
    switch = argparse.BooleanOptionalAction
    add("--warm", action=switch, help="be ready only when all is compiled that is compiled in the background (off)")
    add("--metrics", dest="enable_metrics", action=switch, help="/metrics for Prometheus (on)")
    add("--dashboard", dest="enable_dashboard", action=switch, help="the page at /dashboard (on)")
    add("--config", metavar="F", help="a TOML file with these options, by their names")
    keys = parser.add_argument_group("API keys; without any, whatever a client sends is accepted").add_argument
    keys(
        "--api-key", action="append", metavar="KEY", help=f"other users see it in `ps`: better {KEYS}; may be repeated"
    )
    keys("--api-key-file", metavar="F", help="a file with a key a line")
    log = parser.add_argument_group("log, on standard error").add_argument
    log("--log-level", choices=("debug", "info", "warning", "error", "critical"), help="(info)")
    log("--log-format", choices=("json", "text"), help="(text for a terminal, else json)")
    log("--log-prompts", action=switch, help="write what people ask to the log (off)")
    add_capacity(parser)
    add_features(parser)
    parser.add_argument("--seed", type=int, metavar="N", help="of the random numbers of requests that name none (0)")
    add_layout(parser, chosen=True)
    add_checks(parser)
    parser.set_defaults(options=parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal says stop."""
    sources = Sources(args.options, PREFIX, {"api_key": KEYS})
    sources.fill(args, os.environ)
    try:
        from vattention.server.run import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise ConfigError(f"{error.name} is not installed: pip install 'vattention[server]'") from None
    try:
        return serve(opener(args), settings(args))
    except ConfigError as error:
        raise ConfigError(sources.blame(str(error))) from error.__cause__


def settings(args: argparse.Namespace) -> ServerSettings:
    """What `args` say about the server. Raises ConfigError."""
    from vattention.server.settings import ServerSettings

    values = given(args, (*(name for name, *_ in _PLAIN), *_SWITCHES, "max_body_bytes", "log_level", "log_format"))
    values.setdefault("log_format", "text" if sys.stderr.isatty() else "json")
    if hasattr(args, "chat_template"):
        values["chat_template"] = _read(args.chat_template)
    return ServerSettings(
        served_model_names=tuple(getattr(args, "served_model_name", ())) or (_name(args.model),),
        cors_origins=tuple(getattr(args, "cors_origin", ())),
        api_keys=_keys(args),
        **values,
    )


def opener(args: argparse.Namespace) -> Callable[[], AsyncLLM]:
    """Opens the model that `args` describe. What it has to say goes to the log."""
    options = given(args, (*MODEL, *CAPACITY, *FEATURES, *CHOICE, *CHECKS, "seed"))
    no_bars()

    def opened() -> AsyncLLM:
        with without_collecting():
            from vattention.async_llm import AsyncLLM
            from vattention.server.logs import Written

            with contextlib.redirect_stderr(Written()):
                llm = AsyncLLM(args.model, **options)
        keep_for_good()
        return llm

    return opened


def _keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = list(getattr(args, "api_key", ()))
    if hasattr(args, "api_key_file"):
        lines = [line.strip() for line in _read(args.api_key_file).splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ConfigError(f"{args.api_key_file} has no key: write one a line")
        keys += found
    return tuple(dict.fromkeys(keys))


def _name(model: str | None) -> str:
    """What clients call a model that was given no name: a hub id as it is, a path by its last part."""
    if model is None:
        return DEMO_NAME
    if os.path.exists(model):
        return os.path.basename(os.path.abspath(model)).removesuffix(".gguf")
    return model


def _size(text: str) -> int:
    from vattention.memory.sizes import parse_size  # not for --help: its room loads torch

    try:
        return parse_size(text, "size")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {path}: it is not UTF-8 text") from None


_MORE = f"""\
Every option may also come from the environment, as {PREFIX}MAX_MODEL_LEN is --max-model-len, and from the file of
--config, as max_model_len = 4096. The command line goes before the environment, and that before the file. Several
values are separated by commas in the environment, and are a list in the file. Keys: {KEYS}.

SIGTERM and Ctrl-C end the server once the requests under way have ended; a second one ends it at once.
Exit code 0: it was told to stop; 1: the engine died; 2: it could not start.

examples:
  vattention serve
  vattention serve ./my-model --host 0.0.0.0 --api-key-file keys --max-model-len 4096
  vattention serve --config server.toml --port 8001
  {KEYS}=secret vattention serve --request-timeout 120 --max-queue 64
"""
