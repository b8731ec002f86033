"""`vattention chat`: a conversation with a model."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from vattention.cli.answers import Answers, EngineAnswers
from vattention.cli.console import Console
from vattention.cli.conversation import Conversation
from vattention.cli.options import (
    CAPACITY,
    CHECKS,
    CHOICE,
    FAILED,
    FEATURES,
    MODEL,
    SAMPLING,
    add_capacity,
    add_checks,
    add_command,
    add_features,
    add_layout,
    add_model,
    add_sampling,
    given,
    open_llm,
)
from vattention.cli.settings import MAX_TOKENS, Settings
from vattention.errors import ConfigError


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "chat", run, "talk to a model", _MORE)
    add = parser.add_argument
    add_model(parser)
    add("--system", default="", metavar="TEXT", help="the system prompt (what the chat template has)")
    add("--stats", action="store_true", default=False, help="show how long each answer took")
    add("--seed", type=int, metavar="N", help="of the random numbers (0)")
    add("--url", metavar="URL", help="of a server that answers; MODEL is what it calls the model (the first it lists)")
    add("--api-key", metavar="KEY", help="for that server (VATTENTION_API_KEY of the environment)")
    add_capacity(parser, without=("max_num_seqs",))
    add_features(parser)
    add_sampling(parser, max_tokens=MAX_TOKENS)
    add_layout(parser, chosen=True)
    add_checks(parser)


def run(args: argparse.Namespace) -> int:
    """Talk. Exit code 1: a message was not answered, or a command refused."""
    settings = Settings(given(args, SAMPLING), stats=args.stats)
    console = Console()
    with _answers(args) as answers:
        if console.interactive:
            console.note("/help lists the commands, Ctrl-D ends.")
        conversation = Conversation(answers, console, settings, system=args.system)
        return 0 if conversation.run() else FAILED


@contextlib.contextmanager
def _answers(args: argparse.Namespace) -> Iterator[Answers]:
    """Whoever answers: a server, or an engine in this process."""
    url = given(args, ("url",)).get("url")
    if url is None:
        if hasattr(args, "api_key"):
            raise ConfigError("--api-key is for a server: name it with --url")
        with open_llm(args, max_num_seqs=1, **given(args, ("seed",))) as llm:
            yield EngineAnswers(llm)
        return
    of_the_engine = given(args, (*MODEL, *CAPACITY, *FEATURES, *CHOICE, *CHECKS, "seed"))
    if of_the_engine:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in of_the_engine)
        raise ConfigError(f"with --url the engine is the server's: leave {names} out")
    from vattention.cli.remote import RemoteAnswers

    key = getattr(args, "api_key", None) or os.environ.get("VATTENTION_API_KEY")
    yield RemoteAnswers(url, api_key=key, model=args.model)


_MORE = """\
Lines are messages, and commands where they begin with a slash: /help lists them. Without a terminal each line of
standard input is a message, and nothing but answers goes to standard output.
Exit code 1: a message could not be answered, or a command was refused.

examples:
  vattention chat
  vattention chat ./my-model --system "You are a pirate." --temperature 0.7 --stats
  vattention chat --url http://127.0.0.1:8000
  printf 'What is the capital of France?\\nAnd of Italy?\\n' | vattention chat
"""
