"""The whole command line: every command, each of which brings its own arguments."""

from __future__ import annotations

import argparse

from vattention.cli import bench, chat, generate, info, serve, verify
from vattention.cli.options import Parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from vattention.bench.machine import version

        print(f"vattention {version('vattention') or '(not installed as a package)'}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. What it returns has `run`, the function of the chosen command."""
    top = Parser(
        prog="vattention",
        description="Language models with the KV cache in virtual memory.",
        epilog="`vattention COMMAND --help` shows the options of a command, with examples.",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    chosen = top.add_subparsers(required=True, metavar="COMMAND")
    for command in (chat, generate, serve, info, verify, bench):
        command.add_to(chosen)
    return top
