"""What the routes of one server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from vattention.async_llm import AsyncLLM
from vattention.server.errors import ApiError
from vattention.server.settings import ServerSettings


@dataclass(eq=False, kw_only=True)
class ServerState:
    """Found by a route through `state_of`.

    Attributes:
        llm: the model.
        settings: what the server was told.
        created: seconds since the epoch at its start.
        warm: everything that is made ready on first use is ready.
        draining: the server ends once the answers under way have; `/ready` says so. Set it on SIGTERM.
    """

    llm: AsyncLLM
    settings: ServerSettings
    created: int = field(default_factory=lambda: int(time.time()))
    warm: bool = False
    draining: bool = False

    @property
    def can_generate(self) -> bool:
        """Whether a request that came now would be answered."""
        return self.warm and self.llm.running

    def model_name(self, asked: str | None) -> str:
        """What to call the model in an answer.

        Args:
            asked: what the request calls it; None for any.

        Raises:
            ApiError: 404, for a name that is none of its.
        """
        names = self.settings.served_model_names
        if asked is None:
            return names[0]
        if asked not in names:
            raise ApiError(
                404,
                f"the model {asked!r} does not exist; served here: {', '.join(names)}",
                param="model",
                code="model_not_found",
            )
        return asked


def state_of(connection: HTTPConnection) -> ServerState:
    """The state of the server that this request came to."""
    state: ServerState = connection.app.state.server
    return state
