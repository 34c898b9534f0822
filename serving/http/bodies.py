"""Reading JSON bodies with a cap. Knows nothing of what is in them."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel

from serving.http.errors import ApiError

Body = TypeVar("Body", bound=BaseModel)


def media_type(request: Request) -> str:
    """The content type without its parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def refuse_announced(request: Request, max_bytes: int) -> None:
    """Raise ApiError 413 when the client announces a body over `max_bytes`."""
    announced = announced_bytes(request)
    if announced is not None and announced > max_bytes:
        raise too_large(max_bytes)


def announced_bytes(request: Request) -> int | None:
    """The size that the client announces for the body; None if it announces none."""
    announced = request.headers.get("content-length", "")
    return int(announced) if announced.isascii() and announced.isdigit() else None


def too_large(max_bytes: int) -> ApiError:
    """The error for a body over `max_bytes`."""
    return ApiError(413, f"the body is larger than {max_bytes} bytes", "body_too_large")


async def read_json(request: Request, model: type[Body], max_bytes: int) -> Body:
    """The body as `model`. Raises ApiError 413 or 415, or pydantic's ValidationError."""
    if media_type(request) != "application/json":
        raise ApiError(
            415,
            f"the content type is {media_type(request)!r}, must be application/json",
            "unsupported_media_type",
        )
    refuse_announced(request, max_bytes)
    return model.model_validate_json(await read_body(request, max_bytes))


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises ApiError 413 as soon as it is over `max_bytes`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large(max_bytes)
    return bytes(body)
