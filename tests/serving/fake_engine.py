"""An `EngineClient` without a model: tokens from a script, at a pace, with failures on demand.

It keeps the contract of a real one: errors before the first output, a request aborted as soon as
its generator is closed, the stop token among the tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from core.requests import (
    FinishReason,
    GenerationRequest,
    RequestOutput,
    RequestTimings,
    TokenLogprobs,
)
from serving.metrics_pages import Page

Script = Callable[[GenerationRequest], Sequence[int]]


@dataclass
class FakeEngine:
    """script: the tokens of a request, cut at its max_tokens; tokens_per_step come together.

    refuse: raised instead of the first output. fail_after: raised after so many outputs.
    end_with: a last output with this reason instead of the script's end.
    """

    script: Script
    eos_token_id: int
    seconds_per_step: float = 0.0
    tokens_per_step: int = 1
    refuse: Exception | None = None
    fail_after: tuple[int, Exception] | None = None
    end_with: tuple[int, FinishReason] | None = None
    is_ready: bool = True
    pages: Mapping[str, Page] = field(default_factory=dict)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[GenerationRequest] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        self.requests.append(request)
        self.started.set()
        if self.refuse is not None:
            raise self.refuse
        ended = False
        try:
            for number, output in enumerate(self._outputs(request)):
                await asyncio.sleep(self.seconds_per_step)
                if self.fail_after is not None and number == self.fail_after[0]:
                    ended = True
                    raise self.fail_after[1]
                if self.end_with is not None and number == self.end_with[0]:
                    output = RequestOutput(
                        request.request_id, (), finish_reason=self.end_with[1], error="no luck"
                    )
                ended = output.finish_reason is not None
                if ended:
                    self.finished.append(request.request_id)
                yield output
                if ended:
                    return
        finally:
            if not ended:
                self.aborted.append(request.request_id)

    async def metric_pages(self) -> Mapping[str, Page]:
        return self.pages

    async def ready(self) -> bool:
        return self.is_ready

    def _outputs(self, request: GenerationRequest) -> Iterator[RequestOutput]:
        tokens = self._tokens(request)
        stops = request.sampling.stop_token_ids | (
            set() if request.sampling.ignore_eos else {self.eos_token_id}
        )
        last_is_stop = bool(tokens) and tokens[-1] in stops
        reason = FinishReason.STOP if last_is_stop else FinishReason.LENGTH
        steps = [
            tuple(tokens[start : start + self.tokens_per_step])
            for start in range(0, len(tokens), self.tokens_per_step)
        ] or [()]
        for number, step in enumerate(steps):
            yield RequestOutput(
                request.request_id,
                step,
                logprobs=tuple(self._logprobs(request, step)),
                prompt_logprobs=self._prompt_logprobs(request) if number == 0 else None,
                finish_reason=reason if number == len(steps) - 1 else None,
                num_cached_tokens=self._num_cached(request),
                timings=RequestTimings(1.0, 1.5, 2.0) if number == 0 else None,
            )

    def _num_cached(self, request: GenerationRequest) -> int:
        """Of a prompt that came before, one token more each time."""
        prompts = [other.prompt_token_ids for other in self.requests]
        earlier = prompts[: self.requests.index(request)]
        return 2 + earlier.count(request.prompt_token_ids)

    def _tokens(self, request: GenerationRequest) -> list[int]:
        """The script, as often as it takes where it does not end with a stop token."""
        script = self.script(request)
        sampling = request.sampling
        stops = sampling.stop_token_ids | (set() if sampling.ignore_eos else {self.eos_token_id})
        tokens: list[int] = []
        for token_id in itertools.islice(itertools.cycle(script), sampling.max_tokens):
            tokens.append(token_id)
            if token_id in stops and len(tokens) > sampling.min_tokens:
                break
        return tokens

    def _logprobs(
        self, request: GenerationRequest, tokens: Sequence[int]
    ) -> Iterator[TokenLogprobs]:
        if request.sampling.logprobs is not None:
            yield from (logprobs_of(token, request.sampling.logprobs) for token in tokens)

    def _prompt_logprobs(
        self, request: GenerationRequest
    ) -> tuple[TokenLogprobs | None, ...] | None:
        num_top = request.sampling.prompt_logprobs
        if num_top is None:
            return None
        return (None, *(logprobs_of(token, num_top) for token in request.prompt_token_ids[1:]))


def logprobs_of(token_id: int, num_top: int) -> TokenLogprobs:
    """The token itself is the most probable; one of the others has no probability at all."""
    alternatives = {token_id: -0.5, token_id + 1: -1.5, token_id + 2: -math.inf}
    top = dict(itertools.islice(alternatives.items(), num_top))
    return TokenLogprobs(token_id, -0.5, 1, top)
