"""`vattention chat`: a conversation with a model."""

from __future__ import annotations

import argparse
from typing import Any

from vattention.cli.answers import EngineAnswers
from vattention.cli.console import Console
from vattention.cli.conversation import Conversation
from vattention.cli.options import (
    FAILED,
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


def add_to(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "chat", run, "talk to a model", _MORE)
    add = parser.add_argument
    add_model(parser)
    add("--system", default="", metavar="TEXT", help="the system prompt (what the chat template has)")
    add("--stats", action="store_true", default=False, help="show how long each answer took")
    add("--seed", type=int, default=0, metavar="N", help="of the random numbers (0)")
    add_capacity(parser, without=("max_num_seqs",))
    add_features(parser)
    add_sampling(parser, max_tokens=MAX_TOKENS)
    add_layout(parser, chosen=True)
    add_checks(parser)


def run(args: argparse.Namespace) -> int:
    """Talk. Exit code 1: a message was not answered, or a command refused."""
    settings = Settings(given(args, SAMPLING), stats=args.stats)
    console = Console()
    with open_llm(args, seed=args.seed, max_num_seqs=1) as llm:
        answers = EngineAnswers(llm)
        if console.interactive:
            console.note("/help lists the commands, Ctrl-D ends.")
        conversation = Conversation(answers, console, settings, system=args.system)
        return 0 if conversation.run() else FAILED


_MORE = """\
Lines are messages, and commands where they begin with a slash: /help lists them. Without a terminal each line of
standard input is a message, and nothing but answers goes to standard output.
Exit code 1: a message could not be answered, or a command was refused.

examples:
  vattention chat
  vattention chat ./my-model --system "You are a pirate." --temperature 0.7 --stats
  printf 'What is the capital of France?\\nAnd of Italy?\\n' | vattention chat
"""
