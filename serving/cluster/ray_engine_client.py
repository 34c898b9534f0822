"""`EngineClient` over Serve's handles: unary calls out, tokens back by the token channel.

Knows Ray Serve and nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from core.errors import EngineOverloadedError
from core.requests import GenerationRequest, RequestOutput
from serving.cluster.engine_wire import GenerateCall, decode_result, encode
from serving.cluster.request_stream import RequestStream
from serving.cluster.token_channel import TokenReceiver
from serving.engine_client import EngineDiedError
from serving.metrics_pages import Page

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0


class RayEngineClient:
    """All engine replicas behind `engines`; `ingresses` is asked for its metrics too."""

    def __init__(
        self, engines: DeploymentHandle, ingresses: DeploymentHandle, receiver: TokenReceiver
    ) -> None:
        self._engines = engines
        self._ingresses = ingresses
        self._receiver = receiver
        self._calls: set[asyncio.Task[None]] = set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """See `EngineClient.generate`."""
        stream = self._receiver.open(request.request_id)
        call = GenerateCall(request, self._receiver.address)
        response = self._engines.generate.remote(encode(call))
        task = asyncio.create_task(_await_result(response, stream))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        finished = False
        try:
            while not finished:
                output = await stream.next()
                finished = output.finish_reason is not None
                yield output
        finally:
            self._receiver.close(request.request_id)
            if not finished:
                response.cancel()

    async def metric_pages(self) -> Mapping[str, Page]:
        """See `EngineClient.metric_pages`: a page per engine replica and per ingress replica."""
        answers = await asyncio.gather(
            _ask_all(self._engines, "metric_page"), _ask_all(self._ingresses, "metric_page")
        )
        return dict(named_page for pages in answers for named_page in pages)

    async def ready(self) -> bool:
        """See `EngineClient.ready`."""
        return any(await _ask_all(self._engines, "is_ready"))


async def _await_result(response: DeploymentResponse, stream: RequestStream) -> None:
    """Give the stream the call's result, or the error that stands for its failure."""
    try:
        stream.push_result(decode_result(await response))
    except BackPressureError as error:
        stream.fail(EngineOverloadedError(f"no engine takes more requests: {error}"))
    except (RayError, RayServeException, asyncio.CancelledError) as error:
        first_line = str(error).strip().partition("\n")[0]
        stream.fail(EngineDiedError(f"the engine replica is gone: {first_line}"))
    except Exception as error:  # whatever it is, the reader must not wait for ever
        logger.exception("an engine's result cannot be read")
        stream.fail(error)


async def _ask_all(deployment: DeploymentHandle, method: str) -> list[Any]:
    """The answers of all replicas that give one; a warning for each that does not."""
    try:
        answers = await deployment.broadcast(method).results_async(
            timeout_s=_ANSWER_SECONDS, return_exceptions=True
        )
    except (TimeoutError, RayError, RayServeException) as error:
        answers = [error]
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    for failure in failures:
        logger.warning("%s of a replica failed: %s", method, failure)
    return [answer for answer in answers if not isinstance(answer, BaseException)]
