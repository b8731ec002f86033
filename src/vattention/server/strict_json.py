"""JSON as the standard has it: numbers are finite, text is Unicode. Python's own is more generous both ways."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode(value: Any) -> bytes:
    """JSON in UTF-8. Half of a surrogate pair, which UTF-8 has no bytes for, is written as JSON's escape of it."""
    return _encoder.encode(value).encode("utf-8", "backslashreplace")


def decode(body: bytes) -> Any:
    """Read JSON. Raises json.JSONDecodeError (a ValueError) for anything else, however it fails."""
    try:
        return json.loads(body.decode(), parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError(f"not UTF-8 at byte {error.start}", "", 0) from None
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
    except ValueError as error:  # a number that is not finite, or of thousands of digits
        raise json.JSONDecodeError(str(error), "", 0) from None


class JsonResponse(Response):
    """An answer of JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """To bytes."""
        return encode(content)


class StrictRoute(APIRoute):
    """A route whose body is read by `decode`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, over a request that is strict."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return handle


class _StrictRequest(Request):
    async def json(self) -> Any:
        return decode(await self.body())


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large for a float")
    return number
