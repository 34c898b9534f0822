"""One thread that owns an engine: an inbox for requests and aborts, one callback per step.

Knows nothing of event loops; `on_step` hands a step's outputs over as it likes.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable

import torch

from core.engine import Engine, EngineStats
from core.errors import CoreError, InvalidRequestError
from core.requests import FinishReason, GenerationRequest, RequestOutput

logger = logging.getLogger(__name__)

_IDLE_WAIT_SECONDS = 0.5


class EngineThread:
    """Runs `engine.step()` while there is work.

    `on_step` is called from this thread with the outputs of a step, aborts included, and must not
    block. When a step raises, the thread ends: all requests get an ERROR output, `error` keeps the
    exception, and `submit` raises it on.
    """

    def __init__(self, engine: Engine, on_step: Callable[[list[RequestOutput]], None]) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self._on_step = on_step
        self._wake = threading.Condition()
        self._inbox: list[GenerationRequest] = []
        self._pending: Counter[str | None] = Counter()  # requests in the inbox, per digest
        self._aborts: list[str] = []
        self._open: set[str] = set()  # requests that were submitted and have not ended
        self._stopping = self._woken = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin stepping."""
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request from any thread.

        Raises InvalidRequestError, PromptTooLongError, AdapterUnavailableError or
        EngineOverloadedError at once, and CoreError when the thread has ended.
        """
        self.engine.check(request)
        with self._wake:
            if self._stopping or self.error is not None:
                raise CoreError(f"the engine has stopped: {self.error or 'shut down'}")
            if request.request_id in self._open:
                raise InvalidRequestError(f"request id {request.request_id!r} is in use already")
            waiting = self.engine.scheduler.waiting
            digest = request.adapter_digest
            waiting.check_room(digest, len(self._inbox), self._pending[digest])
            self._inbox.append(request)
            self._pending[digest] += 1
            self._open.add(request.request_id)
            self._notify()

    def abort(self, request_id: str) -> None:
        """End a request within a step, from any thread; nothing happens if it has ended."""
        with self._wake:
            if request_id in self._open:
                self._aborts.append(request_id)
                self._notify()

    def wake(self) -> None:
        """Look for work again, from any thread: some factors may be ready now."""
        with self._wake:
            self._notify()

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """End the thread after the step that runs; open requests end with ABORT."""
        with self._wake:
            self._stopping = True
            self._notify()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def stats(self) -> EngineStats:
        """The engine's figures, from any thread."""
        return self.engine.stats()

    @property
    def is_alive(self) -> bool:
        """Whether the thread steps."""
        return self._thread.is_alive()

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            # torch keeps it per thread, and what another thread sets first would count here else
            torch.set_num_threads(self.engine.num_threads)
            while not self._stopping:
                num_steps = self.engine.num_steps
                self._hand_over(self._drain() + self.engine.step())
                if self.engine.num_steps == num_steps:
                    self._wait_for_work()
        except BaseException as error:
            logger.exception("the engine's thread ends")
            self.error = error
        finally:
            self._end_all()

    def _drain(self) -> list[RequestOutput]:
        """Move inbox and aborts into the engine."""
        with self._wake:
            requests, self._inbox = self._inbox, []
            aborts, self._aborts = self._aborts, []
            self._pending.clear()
            self._woken = False
            outputs = [failed for request in requests if (failed := self._add(request))]
        ended = (self.engine.abort(request_id) for request_id in aborts)
        return outputs + [output for output in ended if output is not None]

    def _add(self, request: GenerationRequest) -> RequestOutput | None:
        try:
            self.engine.add(request)
        except CoreError as error:
            return RequestOutput(
                request.request_id, (), finish_reason=FinishReason.ERROR, error=str(error)
            )
        return None

    def _hand_over(self, outputs: list[RequestOutput]) -> None:
        if not outputs:
            return
        ended = [output.request_id for output in outputs if output.finish_reason is not None]
        if ended:
            with self._wake:
                self._open.difference_update(ended)
        self._on_step(outputs)

    def _wait_for_work(self) -> None:
        """Wait for a wake-up: there is no request, or only such that wait for their factors."""
        with self._wake:
            if not self._woken and not self._stopping:
                self._wake.wait(_IDLE_WAIT_SECONDS)

    def _end_all(self) -> None:
        with self._wake:
            self._stopping = True
            left, self._open = self._open, set()
        reason = FinishReason.ABORT if self.error is None else FinishReason.ERROR
        message = None if self.error is None else f"the engine has failed: {self.error}"
        if self.error is None:  # else nobody knows what state the engine is in
            for name in left:
                self.engine.abort(name)
        if left:
            self._on_step(
                [RequestOutput(name, (), finish_reason=reason, error=message) for name in left]
            )

    def _notify(self) -> None:
        self._woken = True
        self._wake.notify()
