"""The official client against our server, or against any other.

`VATTENTION_CONFORMANCE_URL=http://host:port VATTENTION_CONFORMANCE_MODEL=name pytest tests/server/conformance` runs
what is about the protocol against the server there. Tests of what is ours alone have the fixture `ours`, and are
skipped.
"""

import os
from collections.abc import Iterator

import httpx
import pytest

from support.models import demo_model
from support.openai_client import Client, Endpoint
from support.servers import serving
from vattention import AsyncLLM

OTHER = os.environ.get("VATTENTION_CONFORMANCE_URL")


@pytest.fixture(scope="session")
def endpoint() -> Iterator[Endpoint]:
    """The demo model in float32, served by ourselves, or the other server."""
    if OTHER:
        model = os.environ.get("VATTENTION_CONFORMANCE_MODEL")
        yield Endpoint(OTHER, model or httpx.get(f"{OTHER}/v1/models").json()["data"][0]["id"])
        return
    from vattention.server.app import create_app
    from vattention.server.settings import ServerSettings

    llm = AsyncLLM(demo_model(), max_num_seqs=16, kv_cache_memory="512MiB", compile=False)
    try:
        with serving(create_app(llm, ServerSettings(served_model_names=("smollm2",)))) as url:
            yield Endpoint(url, "smollm2")
    finally:
        llm.close()


@pytest.fixture
def ours() -> None:
    """Marks a test of what other servers need not do."""
    if OTHER:
        pytest.skip("about our own server")


@pytest.fixture
def client(endpoint: Endpoint) -> Client:
    return Client(endpoint)
