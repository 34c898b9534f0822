"""`EngineClient` over one engine thread in this process: tests and deployments without Ray.

A step's outputs of all requests cross to the event loop in one hand-over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping

from core.engine import Engine
from core.engine_thread import EngineThread
from core.errors import CoreError
from core.requests import FinishReason, GenerationRequest, RequestOutput
from serving.engine_client import EngineDiedError
from serving.metrics import EngineMetrics
from serving.metrics_pages import Page


class InProcessEngineClient:
    """Use as an async context manager, on the event loop that will call `generate`."""

    def __init__(
        self,
        engine: Engine,
        *,
        metrics: EngineMetrics | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = EngineThread(engine, self._on_step)
        self._metrics = metrics
        self._queues: dict[str, asyncio.Queue[RequestOutput]] = {}

    async def __aenter__(self) -> InProcessEngineClient:
        self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self._thread.stop)

    def wake(self) -> None:
        """Tell the engine, from any thread, that factors it waits for may be ready."""
        self._thread.wake()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """See `EngineClient.generate`."""
        queue: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._queues[request.request_id] = queue
        try:
            self._submit(request)
            reason = None
            while reason is None:
                output = await queue.get()
                reason = output.finish_reason
                if reason is FinishReason.ERROR and self._thread.error is not None:
                    raise EngineDiedError("the engine has stopped after an error")
                yield output
        finally:
            del self._queues[request.request_id]
            self._thread.abort(request.request_id)

    async def metric_pages(self) -> Mapping[str, Page]:
        """See `EngineClient.metric_pages`."""
        return {} if self._metrics is None else {"engine": self._metrics.page()}

    async def ready(self) -> bool:
        """See `EngineClient.ready`."""
        return self._thread.is_alive and self._thread.error is None

    def _submit(self, request: GenerationRequest) -> None:
        if self._metrics is not None:
            self._metrics.requests.submitted(request)
        try:
            self._thread.submit(request)
        except CoreError as error:
            if self._metrics is not None:
                self._metrics.requests.rejected(request)
            if not self._thread.is_alive:
                raise EngineDiedError("the engine has stopped") from error
            raise

    def _on_step(self, outputs: list[RequestOutput]) -> None:
        """In the engine's thread."""
        if self._metrics is not None:
            self._metrics.requests.observe(outputs)
        with contextlib.suppress(RuntimeError):  # the loop may be closed already
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            queue = self._queues.get(output.request_id)
            if queue is not None:
                queue.put_nowait(output)
