"""Servers for the tests: on real ports, loaded once a session."""

import logging
from collections.abc import Iterator

import pytest

from support import server_process
from support.chat_models import save
from support.models import demo_model, loaded, tiny_model
from support.servers import serving
from vattention import AsyncLLM
from vattention.server.app import create_app
from vattention.server.settings import ServerSettings


@pytest.fixture(scope="session")
def tiny_llm() -> Iterator[AsyncLLM]:
    """Random weights behind the demo model's tokenizer: quick, and its text is of every kind."""
    demo = demo_model()
    model = loaded(tiny_model(vocab_size=demo.geometry.vocab_size, hidden_size=24), demo.tokenizer)
    llm = AsyncLLM(model, max_num_seqs=8, kv_cache_memory="16MiB", compile=False)
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def tiny_server(tiny_llm: AsyncLLM) -> Iterator[str]:
    with serving(create_app(tiny_llm, ServerSettings(served_model_names=("tiny", "also-tiny")))) as url:
        yield url


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
def shared_server(tireless: str) -> Iterator[server_process.Server]:
    """One for all tests that leave it as it was: 8 answers at once, 24 that wait, bodies of 1 MiB at most."""
    flags = [
        "--max-tokens",
        "32",
        "--max-num-seqs",
        "8",
        "--max-queue",
        "24",
        "--kv-cache-memory",
        "256MiB",
        "--max-body-bytes",
        "1MiB",
    ]
    with server_process.serving(tireless, *flags, "--served-model-name", "tiny") as server:
        yield server
