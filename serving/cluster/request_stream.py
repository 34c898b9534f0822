"""One request's outputs put back together, exactly once and in order.

They come one by one over a channel that may lose them, and whole at the end as the result of the
call that ran the request. Knows nothing of sockets, Ray or HTTP.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from core.requests import RequestOutput
from serving.cluster.engine_wire import GenerateResult, SequencedOutput, from_wire
from serving.engine_client import EngineDiedError


class OutputAssembler:
    """One request's outputs, exactly once and in order, from messages that may be lost.

    Its state depends on nothing but what it is given; every output that it lets through is
    returned by the call that completed it.
    """

    def __init__(self) -> None:
        self.finished = False
        self._engine: str | None = None  # the process whose outputs are let through
        self._next_index = 0
        self._num_tokens = 0
        self._prompt_logprobs_given = False
        self._early: dict[int, RequestOutput] = {}  # came before one with a lower index

    def take_message(self, engine: str, sequenced: SequencedOutput) -> list[RequestOutput]:
        """Return the outputs that are next now. Raises EngineDiedError as `take_result` does."""
        if self.finished:
            return []
        self._follow(engine)
        if sequenced.index >= self._next_index:
            self._early[sequenced.index] = sequenced.output
        ready = []
        while not self.finished and (output := self._early.pop(self._next_index, None)):
            self._next_index += 1
            ready.append(self._let_through(output))
        return ready

    def take_result(self, result: GenerateResult) -> list[RequestOutput]:
        """Return what is still missing, as one output, unless all has come already.

        Raises the error that the engine refused the request with, and EngineDiedError when
        another engine has begun anew what this one had half done.
        """
        if result.error is not None:
            raise from_wire(result.error)
        if self.finished or result.output is None:
            return []
        self._follow(result.engine)
        whole, begun = result.output, self._num_tokens
        tail = replace(
            whole,
            token_ids=whole.token_ids[begun:],
            logprobs=whole.logprobs[begun:],
            prompt_logprobs=None if self._prompt_logprobs_given else whole.prompt_logprobs,
        )
        return [self._let_through(tail)]

    def _follow(self, engine: str) -> None:
        """Serve may give a request to another replica when the first one dies."""
        if self._engine == engine:
            return
        if self._next_index > 0:
            raise EngineDiedError("the engine replica that ran this request was lost")
        self._engine = engine
        self._early.clear()

    def _let_through(self, output: RequestOutput) -> RequestOutput:
        self._num_tokens += len(output.token_ids)
        self._prompt_logprobs_given |= output.prompt_logprobs is not None
        self.finished = output.finish_reason is not None
        return output


class RequestStream:
    """The outputs of one request as they come, for one reader."""

    def __init__(self) -> None:
        self._assembler = OutputAssembler()
        self._ready: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()

    def push_message(self, engine: str, sequenced: SequencedOutput) -> None:
        """Take one output from the channel."""
        try:
            outputs = self._assembler.take_message(engine, sequenced)
        except EngineDiedError as error:
            self.fail(error)
        else:
            self._put(outputs)

    def push_result(self, result: GenerateResult) -> None:
        """Take the request's whole outcome; the reader gets what it lacks."""
        try:
            outputs = self._assembler.take_result(result)
        except Exception as error:
            self.fail(error)
        else:
            self._put(outputs)

    def fail(self, error: Exception) -> None:
        """Raise `error` to the reader after what has come so far, unless all has come."""
        if not self._assembler.finished:
            self._ready.put_nowait(error)

    async def next(self) -> RequestOutput:
        """Wait for the next output."""
        item = await self._ready.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _put(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self._ready.put_nowait(output)
