"""What the HTTP application needs of engines, wherever they run.

`EngineClient` is the seam: the Ray deployments implement it over handles, `InProcessEngineClient`
over one engine thread in this process, the tests by a small fake. Knows nothing of HTTP, of
adapter names or of text.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

from core.errors import CoreError
from core.requests import GenerationRequest, RequestOutput
from serving.metrics_pages import Page


class EngineDiedError(CoreError):
    """The replica that ran (or should have run) the request is gone; the request may be retried."""


class GenerationFailedError(CoreError):
    """The engine ended a request with an error; the message is the engine's own."""


class EngineClient(Protocol):
    """One or many engine replicas that serve the same base and the same adapters."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """Run one request; yields what each step brings, the last with a finish_reason.

        Outputs that wait for a slow reader may be joined. Closing or cancelling the generator
        aborts the request in its engine within a step. Raises before the first output:
        InvalidRequestError, PromptTooLongError, EngineOverloadedError, AdapterUnavailableError;
        at any time EngineDiedError when the replica is lost. An output whose finish_reason is
        ERROR is yielded like others; its `error` says why.
        """
        ...

    async def metric_pages(self) -> Mapping[str, Page]:
        """The metrics of every replica that answers, by replica name; see `serving.metrics`."""
        ...

    async def ready(self) -> bool:
        """Whether at least one engine has its weights loaded and takes requests."""
        ...
