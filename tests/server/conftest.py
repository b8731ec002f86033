"""Servers for the tests: on real ports, loaded once a session."""

from collections.abc import Iterator

import pytest

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
    llm = AsyncLLM(model, max_num_seqs=8, kv_cache_memory="16MiB")
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def tiny_server(tiny_llm: AsyncLLM) -> Iterator[str]:
    with serving(create_app(tiny_llm, ServerSettings(served_model_names=("tiny", "also-tiny")))) as url:
        yield url
