"""What the routes of one server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property

from starlette.requests import HTTPConnection

from vattention.async_llm import AsyncLLM
from vattention.server.admission import Admission
from vattention.server.errors import ApiError
from vattention.server.middleware import current_record
from vattention.server.settings import ServerSettings


@dataclass(eq=False, kw_only=True)
class ServerState:
    """Found by a route through `state_of`.

    Attributes:
        llm: the model.
        settings: what the server was told.
        admission: who may come in; the middlewares keep it.
        created: seconds since the epoch at its start.
        warm: everything that is made ready on first use is ready.
        draining: the server ends once the answers under way have; `/ready` says so. Set it on SIGTERM.
    """

    llm: AsyncLLM
    settings: ServerSettings
    admission: Admission
    created: int = field(default_factory=lambda: int(time.time()))
    warm: bool = False
    draining: bool = False

    @cached_property
    def longest_text(self) -> int | None:
        """Characters that no prompt which fits the model can have; None: not known.

        Reading a text of megabytes takes seconds of a processor, so one that must be too long is refused unread. Four
        characters may become one before they are read (Unicode's normal forms).
        """
        if self.llm.tokenizer is None:
            return None
        return 4 * self.llm.max_model_len * max(map(len, self.llm.tokenizer.get_vocab()))

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
            asked = names[0]
        if asked not in names:
            # A key by mistake is not for the text of an error, and nobody needs to read all of a long name.
            secret = any(key in asked for key in self.settings.api_keys)
            shown = "[api key]" if secret else repr(asked[:200])
            raise ApiError(
                404,
                f"the model {shown} does not exist; served here: {', '.join(names)}",
                param="model",
                code="model_not_found",
            )
        current_record().model = asked
        return asked


def state_of(connection: HTTPConnection) -> ServerState:
    """The state of the server that this request came to."""
    state: ServerState = connection.app.state.server
    return state
