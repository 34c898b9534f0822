"""From the engines' tokens to the text of a request's choices, as it comes.

Joins the engine, the detokenizer and the stop strings. Knows nothing of HTTP or of OpenAI's shapes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from core.errors import AdapterUnavailableError
from core.requests import FinishReason, GenerationRequest, RequestOutput, TokenLogprobs
from core.text import IncrementalDetokenizer, StopStrings
from serving.engine_client import EngineClient, EngineDiedError, GenerationFailedError

T = TypeVar("T")


@dataclass(frozen=True)
class ChoicePlan:
    """One sequence to generate, and how its text is made."""

    index: int
    request: GenerationRequest
    stops: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True)
class ChoiceDelta:
    """What is new of one choice.

    token_ids      new tokens; their text may come with a later delta
    text_offsets   per new token, the number of characters of the choice before its own
    finish_reason  "stop" or "length" in the choice's last delta, else None
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    text_offsets: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: str | None = None
    num_cached_tokens: int = 0


class ChoiceText:
    """The text of one choice, from its first token to its last."""

    def __init__(self, plan: ChoicePlan, tokenizer: Any) -> None:
        self._plan = plan
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, plan.request.prompt_token_ids, plan.skip_special_tokens
        )
        self._stops = StopStrings(plan.stops, plan.include_stop)
        self._num_tokens = 0

    def take(self, output: RequestOutput) -> ChoiceDelta:
        """The delta that an engine's output brings; its finish_reason ends the choice.

        Tokens after the one that completed a stop string are dropped.
        """
        pieces: list[str] = []
        offsets: list[int] = []
        for number, token_id in enumerate(output.token_ids, start=1):
            offsets.append(self._detokenizer.num_chars)
            is_stop_token = output.finish_reason is FinishReason.STOP and number == len(
                output.token_ids
            )
            if not is_stop_token or self._plan.include_stop:
                pieces.append(self._filter(self._detokenizer.push(token_id)))
            self._num_tokens += 1
            if self._stops.found is not None:
                break
        reason = self._finish_reason(output)
        if reason is not None:
            pieces += [self._filter(self._detokenizer.flush()), self._stops.flush()]
        return ChoiceDelta(
            self._plan.index,
            "".join(pieces),
            output.token_ids[: len(offsets)],
            tuple(offsets),
            output.logprobs[: len(offsets)],
            output.prompt_logprobs,
            "stop" if self._stops.found is not None else reason,
            output.num_cached_tokens,
        )

    def _filter(self, text: str) -> str:
        """Stop strings count from the first token after `min_tokens` on."""
        if self._num_tokens < self._plan.request.sampling.min_tokens:
            return text
        return self._stops.push(text)

    def _finish_reason(self, output: RequestOutput) -> str | None:
        if self._stops.found is not None:
            return "stop"
        return None if output.finish_reason is None else output.finish_reason.value


async def generate_choice(
    engines: EngineClient, plan: ChoicePlan, tokenizer: Any
) -> AsyncGenerator[ChoiceDelta, None]:
    """Deltas of one choice to its end. Closing it, or a stop string, ends the engine's request.

    Raises as `EngineClient.generate` does; GenerationFailedError for an output that is an error.
    """
    text = ChoiceText(plan, tokenizer)
    async with aclosing(engines.generate(plan.request)) as outputs:
        async for output in outputs:
            _raise_failure(plan.request, output)
            delta = text.take(output)
            yield delta
            if delta.finish_reason is not None:
                return
    raise EngineDiedError("the engine stopped before the request was finished")


def _raise_failure(request: GenerationRequest, output: RequestOutput) -> None:
    """An engine that goes on fails single requests only for want of their adapter's factors."""
    if output.finish_reason is FinishReason.ERROR:
        kind = GenerationFailedError if request.adapter_digest is None else AdapterUnavailableError
        raise kind(output.error or "the engine failed")
    if output.finish_reason is FinishReason.ABORT:
        raise EngineDiedError("the engine stopped before the request was finished")


def generate(
    engines: EngineClient, plans: Sequence[ChoicePlan], tokenizer: Any
) -> AsyncGenerator[ChoiceDelta, None]:
    """Deltas of all choices as they come, mixed; an error of one ends all."""
    streams = [generate_choice(engines, plan, tokenizer) for plan in plans]
    return streams[0] if len(streams) == 1 else merge(streams)


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all streams as they come. The first error is raised and closes the others."""
    queue: asyncio.Queue[T | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
