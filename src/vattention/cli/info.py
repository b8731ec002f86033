"""`vattention info`: what this machine allows."""

from __future__ import annotations

import argparse
from typing import Any

from vattention.cli.options import add_command


def add_to(commands: Any) -> None:
    """Add the command."""
    about = "show what this machine allows: drivers, limits, memory, versions"
    parser = add_command(commands, "info", run, about, _MORE)
    parser.add_argument("--json", action="store_true", default=False, help="print JSON, sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Show what this machine allows."""
    from vattention.bench.info import show

    return show(as_json=args.json)


_MORE = """\
examples:
  vattention info
  vattention info --json
"""
