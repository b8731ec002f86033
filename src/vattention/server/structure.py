"""From `response_format` to a grammar for the engine. The seam of structured output."""

from __future__ import annotations

from typing import Any

from vattention.server.errors import ApiError
from vattention.server.protocol.chat import ChatCompletionRequest
from vattention.server.protocol.completions import CompletionRequest


def structured(request: ChatCompletionRequest | CompletionRequest) -> Any | None:
    """`SamplingParams.structured` for a request: None where any text will do.

    Raises:
        ApiError: 400.
    """
    if request.response_format is None or request.response_format.type == "text":
        return None
    raise ApiError(400, "response_format is not built yet", param="response_format", code="not_supported")
