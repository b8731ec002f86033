"""The command line: `vattention COMMAND`. torch and transformers load only when a command needs them."""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vattention.cli.arguments import parser
from vattention.cli.options import USAGE, no_bars
from vattention.errors import VAttentionError

INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell says of a process that SIGINT or SIGPIPE has ended
_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: the process's arguments).

    Returns:
        The exit code: 0 all is well; 1 a check failed, or a request could not be served; 2 bad usage, or an error of
        this package; 130 interrupted; 141 nobody reads the output any more.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may have characters that the terminal has not
    if not sys.stderr.isatty():
        no_bars()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _drop_output()
        print(f"vattention: error: cannot write: {error.strerror}", file=sys.stderr)
        return USAGE


def _drop_output() -> None:
    """Nothing more may be flushed where nothing can be written, when the interpreter exits either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    try:
        with _plain_warnings():
            args = parser().parse_args(argv)
            args.command = shlex.join(["vattention", *argv])
            code: int = args.run(args)
            return code
    except SystemExit as stop:  # argparse: --help, --version, bad usage
        return stop.code if isinstance(stop.code, int) else 0
    except VAttentionError as error:
        print(f"vattention: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    except MemoryError as error:
        print(f"vattention: error: out of memory{f': {error}' if str(error) else ''}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("vattention: interrupted", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as a line each, without the source line that raised them."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"vattention: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
