"""One table from exceptions to HTTP status, and OpenAI's shape for all of them.

Whatever is not in the table is a 500 that says nothing of the inside; its traceback is logged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from adapters import errors as adapter_errors
from core import errors as core_errors
from serving.engine_client import EngineDiedError, GenerationFailedError

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"

_CLIENT_CLOSED_REQUEST = 499  # nginx' word for it


@dataclass(eq=False)
class ApiError(Exception):
    """An error as the client sees it; raised by routes, or made from another by `to_api_error`."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        by_status = {
            401: "authentication_error",
            403: "permission_error",
            429: "rate_limit_error",
        }
        return by_status.get(self.status, SERVER_ERROR if self.status >= 500 else INVALID_REQUEST)

    def body(self) -> bytes:
        """{"error": {...}} as JSON."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        """The whole answer."""
        return Response(self.body(), self.status, dict(self.headers), media_type="application/json")


# From the special to the general: the first class that fits decides.
TABLE: tuple[tuple[type[Exception], int, str], ...] = (
    (core_errors.PromptTooLongError, 400, "context_length_exceeded"),
    (core_errors.InvalidRequestError, 400, "invalid_value"),
    (core_errors.EngineOverloadedError, 429, "engine_overloaded"),
    (core_errors.AdapterUnavailableError, 503, "adapter_unavailable"),
    (EngineDiedError, 503, "engine_unavailable"),
    (GenerationFailedError, 500, "generation_failed"),
    (adapter_errors.UnknownAdapterError, 404, "model_not_found"),
    (adapter_errors.AdapterExistsError, 409, "adapter_exists"),
    (adapter_errors.WrongBaseError, 409, "wrong_base"),
    (adapter_errors.AdapterTooLargeError, 413, "adapter_too_large"),
    (adapter_errors.InvalidAdapterIdError, 422, "invalid_adapter_id"),
    (adapter_errors.UnsupportedAdapterError, 422, "unsupported_adapter"),
    (adapter_errors.MalformedAdapterError, 422, "malformed_adapter"),
)

# What clients are told where the error's own words are for the log: they may quote the inside.
_PUBLIC_WORDS = {
    "adapter_unavailable": "the adapter could not be loaded",
    "engine_unavailable": "the engine that ran this request is lost; try again",
    "generation_failed": "the engine could not finish this request",
    "internal_error": "internal error; the server's log says more",
}


def to_api_error(error: Exception) -> ApiError:
    """What the client may know of `error`; logs those that are not meant for it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _from_validation(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=error.headers or {})
    rows = ((status, code) for kind, status, code in TABLE if isinstance(error, kind))
    status, code = next(rows, (500, "internal_error"))
    if code in _PUBLIC_WORDS:
        logger.error("%s", code, exc_info=error)
    message = _PUBLIC_WORDS.get(code, str(error))
    return ApiError(status, message, code, _param(error), _headers(error))


def _param(error: Exception) -> str | None:
    if isinstance(error, core_errors.InvalidRequestError):
        return error.param
    if isinstance(error, adapter_errors.UnknownAdapterError):
        return "model"
    return None


def _headers(error: Exception) -> dict[str, str]:
    if isinstance(error, core_errors.EngineOverloadedError):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_seconds)))}
    return {}


def _from_validation(error: ValidationError) -> ApiError:
    """The first of pydantic's errors, with the path of the field as `param`."""
    first = error.errors(include_url=False, include_input=False)[0]
    context = first.get("ctx", {})
    path = [*map(str, first["loc"]), *([context["field"]] if "field" in context else [])]
    param = ".".join(path) or None
    messages = {
        "extra_forbidden": f"unknown field {param!r}",
        "missing": f"field {param!r} is required",
        "unsupported": f"{param} is not supported by this server",
    }
    plain = first["msg"] if param is None or param in first["msg"] else f"{param}: {first['msg']}"
    return ApiError(400, messages.get(first["type"], plain), first["type"], param)


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=_CLIENT_CLOSED_REQUEST)  # nobody is left to read it
    return to_api_error(error).response()


def install(app: FastAPI) -> None:
    """Answer every exception of `app`'s routes, and its own 404 and 405, in OpenAI's shape."""
    own = [ApiError, ValidationError, HTTPException, ClientDisconnect, Exception]
    for kind in [*own, *(row[0] for row in TABLE)]:
        app.add_exception_handler(kind, _answer)
