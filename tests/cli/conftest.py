import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.models import tiny_model
from support.tokenizers import byte_level
from vattention.cli import main

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without a tokenizer."""
    path = tmp_path_factory.mktemp("bare")
    tiny_model().save_pretrained(path)
    return str(path)


def save(path: Path, *, template: str | None = TEMPLATE, **changes: object) -> str:
    """A small random model with a byte-level tokenizer, in a directory."""
    tokenizer = byte_level()
    tokenizer.chat_template = template
    tiny_model(vocab_size=len(tokenizer), **changes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a tokenizer and a chat template, 256 positions."""
    return save(tmp_path_factory.mktemp("chatty"))


@pytest.fixture(scope="session")
def tireless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with so many positions that an answer may go on for minutes."""
    return save(tmp_path_factory.mktemp("tireless"), max_position_embeddings=1 << 20)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command with standard input; returns the exit code, standard output and standard error."""

    def run(command: list[str], text: str | bytes = b"") -> tuple[int, str, str]:
        content = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        code = main(command)
        out, err = capfd.readouterr()
        return code, out, err

    return run
