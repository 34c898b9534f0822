"""When requests are sent: a closed loop of clients, or an open loop by the clock.

Knows nothing of HTTP; `send` follows one request to its end and never raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator

from loadtest.records import RequestRecord
from loadtest.workload import PlannedRequest

Send = Callable[[PlannedRequest], Awaitable[RequestRecord]]
Clock = Callable[[], float]

_PAUSE_AFTER_FAILURE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_TIMER_SECONDS = 0.001  # of uvloop, which rounds down: never send early, at most this late


async def closed_loop(
    send: Send, requests: Iterable[PlannedRequest], num_clients: int, ends: Callable[[], bool]
) -> list[RequestRecord]:
    """`num_clients` clients send their next request as soon as the last one has ended.

    Stops when `requests` are used up or `ends()` holds; requests in flight are followed to their
    end. A failed request makes its client wait as long as the server asked, or 0.1 s, so that a
    refusing server is not hammered in a busy loop.
    """
    queue, records = iter(requests), list[RequestRecord]()

    async def client() -> None:
        while not ends() and (request := next(queue, None)) is not None:
            record = await send(request)
            records.append(record)
            if record.error is not None:
                await asyncio.sleep(_pause(record))

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(client())
    return records


def _pause(record: RequestRecord) -> float:
    asked = record.retry_after or _PAUSE_AFTER_FAILURE_SECONDS
    return min(asked, _LONGEST_PAUSE_SECONDS)


async def open_loop(
    send: Send, requests: Iterable[PlannedRequest], clock: Clock, ends_at: float
) -> list[RequestRecord]:
    """Send each request when it is due, however many are still running, until `ends_at` seconds.

    Nothing bounds the requests in flight: a slow server gets no relief, and since latencies count
    from the due time, a late client shows as latency (and as send lag in the report).
    """
    tasks = list[asyncio.Task[RequestRecord]]()
    async with asyncio.TaskGroup() as group:
        for request in _until(requests, ends_at):
            wait = (request.due or 0.0) - clock()
            if wait > 0:
                await asyncio.sleep(wait + _TIMER_SECONDS)
            tasks.append(group.create_task(_sent(send, request)))
    return [task.result() for task in tasks]


async def _sent(send: Send, request: PlannedRequest) -> RequestRecord:
    return await send(request)


def _until(requests: Iterable[PlannedRequest], ends_at: float) -> Iterator[PlannedRequest]:
    for request in requests:
        if (request.due or 0.0) >= ends_at:
            return
        yield request
