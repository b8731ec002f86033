import logging
from collections.abc import Iterator

import pytest

from support.chat_models import save
from support.servers import Server, serving


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("vattention.server", "uvicorn", "py.warnings")]
    before = [(each.handlers, each.level, each.propagate) for each in loggers]
    yield
    logging.captureWarnings(False)
    for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)


@pytest.fixture(scope="session")
def tireless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model that chats, and whose answers may go on for minutes."""
    return save(tmp_path_factory.mktemp("tireless"), max_position_embeddings=1 << 16)


@pytest.fixture(scope="session")
def shared_server(tireless: str) -> Iterator[Server]:
    """One for all tests that leave it as it was: 8 answers at once, 24 that wait, bodies of 1 MiB at most."""
    flags = ["--max-num-seqs", "8", "--max-queue", "24", "--kv-cache-memory", "256MiB", "--max-body-bytes", "1MiB"]
    with serving(tireless, *flags, "--served-model-name", "tiny") as server:
        yield server
