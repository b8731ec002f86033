import io
import sys
from collections.abc import Callable

import pytest

from support.chat_models import save
from support.models import tiny_model
from vattention.cli import main


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without a tokenizer."""
    path = tmp_path_factory.mktemp("bare")
    tiny_model().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a tokenizer and a chat template, 256 positions."""
    return save(tmp_path_factory.mktemp("chatty"))


@pytest.fixture(scope="session")
def tireless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with so many positions that an answer may go on for minutes."""
    return save(tmp_path_factory.mktemp("tireless"), max_position_embeddings=1 << 16)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command with standard input; returns the exit code, standard output and standard error."""

    def run(command: list[str], text: str | bytes = b"") -> tuple[int, str, str]:
        content = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        capfd.readouterr()  # what making a model has said
        code = main(command)
        out, err = capfd.readouterr()
        return code, out, err

    return run
