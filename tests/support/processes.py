"""Processes that a test starts, known by a mark in their environment: others may measure on this machine too."""

import os
from pathlib import Path

import pytest

_NAME, _VALUE = "VATTENTION_TEST_MARK", str(os.getpid())


def mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started from here to the end of the test inherits the mark."""
    monkeypatch.setenv(_NAME, _VALUE)


def left_running() -> list[str]:
    """The numbers of processes with the mark. This one is not among them: it was not started with it."""
    wanted = f"{_NAME}={_VALUE}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(entry.name)
        except OSError:  # it has ended
            continue
    return found
