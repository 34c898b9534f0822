"""Reading bodies with caps on size and patience. Knows nothing of what is in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel

from serving.http.errors import ApiError

PATIENCE_SECONDS = 60.0  # for the next piece of a body

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
    """The body as `model`. Raises ApiError 408, 413 or 415, or pydantic's ValidationError."""
    if media_type(request) != "application/json":
        raise ApiError(
            415,
            f"the content type is {media_type(request)!r}, must be application/json",
            "unsupported_media_type",
        )
    refuse_announced(request, max_bytes)
    return model.model_validate_json(await read_body(request, max_bytes))


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises ApiError 413 as soon as it is over `max_bytes`, and 408."""
    body = bytearray()
    async for chunk in pieces_of(request):
        body += chunk
        if len(body) > max_bytes:
            raise too_large(max_bytes)
    return bytes(body)


async def pieces_of(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises ApiError 408 when nothing comes for PATIENCE_SECONDS."""
    pieces = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ApiError(
                408, f"no more of the body came for {PATIENCE_SECONDS:g} seconds", "body_timeout"
            ) from None
        yield piece
