"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, and never a stack trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from vattention.errors import EngineError, InvalidRequest, OutOfPages, PromptTooLong
from vattention.server.admission import Overloaded
from vattention.server.strict_json import JsonResponse

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
"""The `type` of an error by its status; else "invalid_request_error" below 500 and "server_error" from there."""


_MOST_MEANINGS = 5


class ApiError(Exception):
    """What a client is told in place of an answer. Raise it anywhere below the app.

    Args:
        status: of HTTP.
        message: for the client's eyes: what is wrong, and what to do.
        param: the field that is wrong.
        code: a name that programs can tell apart, such as "context_length_exceeded".
        headers: such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = None if headers is None else dict(headers)

    def body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        return JsonResponse(self.body(), self.status, self.headers)


def api_error(error: BaseException) -> ApiError:
    """What to tell a client of an error that the engine, the framework or a bug raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _validation(error.errors())
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), param="prompt", code="context_length_exceeded")
    if isinstance(error, InvalidRequest):
        return ApiError(400, str(error))
    if isinstance(error, Overloaded):
        message = f"the queue of this server is full: try again in {error.retry_after} s"
        return ApiError(429, message, code="queue_full", headers={"retry-after": str(error.retry_after)})
    if isinstance(error, RecursionError):
        return ApiError(400, "the request is nested too deeply")
    if isinstance(error, OutOfPages):
        return ApiError(503, f"there is not enough memory for this request now: {error}", code="out_of_memory")
    if isinstance(error, EngineError):
        return ApiError(503, "the engine has stopped, or was closed, before this request had ended", code="engine")
    return ApiError(500, "internal error: the server's log has more", code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    """Have every error of `app` answered in OpenAI's shape."""

    async def handle(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    for kind in (ApiError, RequestValidationError, HTTPException, InvalidRequest, RecursionError, EngineError):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(OutOfPages, handle)
    app.add_exception_handler(Overloaded, handle)
    # Anything else is a bug: the client is told 500, and the error goes on to the server's log.
    app.add_exception_handler(Exception, handle)


def _validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that is wrong with a request, without what the client sent: that may be anything."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    if not where:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    param = where[0]
    # A field that may be of several types has an error for each.
    meanings = dict.fromkeys(error["msg"] for error in errors if error["loc"][1:2] == first["loc"][1:2])
    name = ".".join(where) if len(meanings) == 1 else param
    return ApiError(400, f"{name}: {'; or: '.join(list(meanings)[:_MOST_MEANINGS])}", param=param)
