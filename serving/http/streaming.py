"""Server-sent events, and noticing that a client has gone.

Knows ASGI; knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.http.errors import to_api_error

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def event(data: bytes) -> bytes:
    """One server-sent event; `data` is JSON, which has no line breaks."""
    return b"data: " + data + b"\n\n"


async def events_to_the_end(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """`events`, then [DONE]; an error becomes the last event, in OpenAI's shape."""
    try:
        async with aclosing(events):
            async for item in events:
                yield item
    except Exception as error:
        yield event(to_api_error(error).body())
        return
    yield DONE


class EventStreamResponse(StreamingResponse):
    """Sends events as they come and stops as soon as the client has gone.

    Starlette watches for that only between two chunks on newer servers; a request may wait long
    for its next token. `events` and the `source` that they come from are closed in every case.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, source: AsyncGenerator[Any, None]
    ) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._source = events, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the client goes."""
        try:
            await race(self.stream_response(send), self.listen_for_disconnect(receive))
        except (OSError, ClientDisconnect):
            pass  # nobody is left to be told
        finally:
            await self._events.aclose()
            await self._source.aclose()


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. Cancels it and raises ClientDisconnect if the client goes before.

    The request's body must have been read.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return await race(work, watch())


async def race(work: Coroutine[Any, Any, T], watch: Coroutine[Any, Any, None]) -> T:
    """What `work` returns, or ClientDisconnect if `watch` ends first; both have ended then."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch)
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
