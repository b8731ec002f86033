"""A server under load: how it is reached, what it serves, and one run against it."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from vattention.bench.load.answer import Answer, Ask, send
from vattention.bench.load.arrivals import Arrivals, arrive
from vattention.bench.load.exchange import Address, Broken, address_of, get_json
from vattention.bench.load.figures import Figures, figures_of
from vattention.bench.load.requests import Form, asks
from vattention.bench.trace import Lengths
from vattention.errors import ConfigError, EngineError

_PROBE_WORDS = (8, 24)
_PATIENCE = 30.0


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        name: what people call it.
        model: what it is asked for.
    """

    name: str
    address: Address
    model: str
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return _headers(self.api_key)


def target_of(name: str, url: str, *, api_key: str | None = None, model: str | None = None) -> Target:
    """The server at `url`; `model` None: the first that it lists.

    Raises:
        ConfigError: no URL, no server, or one that does not say what it serves.
    """
    address = address_of(url)
    if model is not None:
        return Target(name, address, model, api_key)
    try:
        status, said = asyncio.run(_patiently(address, api_key))
    except TimeoutError:
        raise ConfigError(f"{address.url} did not answer within {_PATIENCE:g} s") from None
    except (OSError, Broken) as error:
        raise ConfigError(f"no server answers at {address.url}: {error}") from None
    if status == 401:
        raise ConfigError(f"{address.url} wants an API key: --api-key, or VATTENTION_API_KEY in the environment")
    try:
        return Target(name, address, str(said["data"][0]["id"]), api_key)
    except (TypeError, KeyError, IndexError):
        raise ConfigError(
            f"{address.url}/v1/models does not say what is served there (HTTP {status}): name it with --model-name"
        ) from None


async def _patiently(address: Address, api_key: str | None) -> tuple[int, dict[str, list[dict[str, object]]]]:
    async with asyncio.timeout(_PATIENCE):
        return await get_json(address, "/v1/models", _headers(api_key))


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def run_load(target: Target, asked: Sequence[Ask], arrivals: Arrivals, *, timeout: float) -> Figures:
    """Send all of it, and wait for the answers. Failures are in the result."""
    work = [partial(_send, target, ask, timeout) for ask in asked]
    gc.disable()  # a pause of the generator would look like one of the server
    used = time.process_time()
    try:
        answers = asyncio.run(arrive(arrivals, work))
    finally:
        gc.enable()
    return figures_of(answers, client_cpu=time.process_time() - used)


async def _send(target: Target, ask: Ask, timeout: float, due: float) -> Answer:
    return await send(target.address, target.headers, ask, due=due, timeout=timeout)


def overhead_of(target: Target, form: Form, *, timeout: float) -> int:
    """Tokens that the server counts beyond the words of a prompt.

    Raises:
        ConfigError: a vocabulary in which the words are not a token each. EngineError: a request that failed.
    """
    if form.prompts == "ids":
        return 0
    counted = []
    for words in _PROBE_WORDS:
        asked = asks(form, target.model, [Lengths(words, 2)], seed="probe")
        found = run_load(target, asked, Arrivals("probe"), timeout=timeout)
        if not found.completed:
            raise EngineError(f"{target.name} failed: {found.example}")
        counted.append(found.prompt_tokens)
    if counted[1] - counted[0] != _PROBE_WORDS[1] - _PROBE_WORDS[0]:
        raise ConfigError(f"{target.name}: the words of text prompts are not a token each there: use --prompts ids")
    return counted[0] - _PROBE_WORDS[0]
