"""The plain Python API: a model directory, prompts in, completions out. No server, no threads.

Joins an engine with the model's tokenizer. Knows nothing of adapters' names or files: an adapter
is the digest under which the factor source yields its factors.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from core.engine_config import EngineConfig
from core.errors import CoreError, EngineOverloadedError, InvalidRequestError
from core.factors import FactorSource
from core.loading import load_engine
from core.requests import (
    FinishReason,
    GenerationRequest,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from core.text import IncrementalDetokenizer, StopStrings
from core.tokenizer import load_tokenizer

Prompt = str | Seq[int]

_FACTORS_POLL_SECONDS = 0.001


@dataclass
class Completion:
    """What one prompt brought; `text` ends before a stop string, `token_ids` with its last one."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class LLM:
    """An engine and its tokenizer, for use from one thread.

    Raises UnsupportedModelError for a model directory that is not served exactly.
    """

    def __init__(
        self,
        path: Path | str,
        config: EngineConfig | None = None,
        *,
        factor_source: FactorSource | None = None,
    ) -> None:
        self.engine = load_engine(path, config, factor_source)
        self.tokenizer = load_tokenizer(path)

    def generate(
        self,
        prompts: Seq[Prompt],
        sampling: SamplingParams = SamplingParams(),  # noqa: B008  frozen
        *,
        adapters: Seq[str | None] | str | None = None,
        stop: Seq[str] | str = (),
    ) -> list[Completion]:
        """Complete all prompts, in one batch where they fit; any number of them may wait.

        `adapters` is one digest for all prompts or one per prompt, None being the base. Raises
        InvalidRequestError and its kin before anything runs, and CoreError when an adapter's
        factors can't be had.
        """
        digests = _per_prompt(adapters, len(prompts))
        stops = (stop,) if isinstance(stop, str) else stop
        runs = [
            self._start(f"generate-{number}", prompt, sampling, digest, stops)
            for number, (prompt, digest) in enumerate(zip(prompts, digests, strict=True))
        ]
        for run in runs:
            self.engine.check(run.request)
        by_id = {run.request.request_id: run for run in runs}
        try:
            self._run(by_id)
        finally:
            for request_id in by_id:
                self.engine.abort(request_id)
        return [run.completion for run in runs]

    def _start(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        digest: str | None,
        stop: Seq[str],
    ) -> _Run:
        ids = tuple(self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt)
        request = GenerationRequest(request_id, ids, sampling, digest)
        return _Run(request, IncrementalDetokenizer(self.tokenizer, ids), StopStrings(stop))

    def _run(self, by_id: dict[str, _Run]) -> None:
        coming = deque(run.request for run in by_id.values())
        while coming or self.engine.has_work:
            self._add_while_room(coming)
            num_steps = self.engine.num_steps
            for output in self.engine.step():
                if by_id[output.request_id].take(output):
                    self.engine.abort(output.request_id)
            if self.engine.num_steps == num_steps:
                time.sleep(_FACTORS_POLL_SECONDS)

    def _add_while_room(self, coming: deque[GenerationRequest]) -> None:
        with suppress(EngineOverloadedError):  # the rest is added after a step
            while coming:
                self.engine.add(coming[0])
                coming.popleft()


@dataclass
class _Run:
    request: GenerationRequest
    detokenizer: IncrementalDetokenizer
    stops: StopStrings
    completion: Completion = field(default_factory=Completion)

    def take(self, output: RequestOutput) -> bool:
        """Add a step's output; True when a stop string is complete and the rest is unwanted."""
        done = self.completion
        if output.finish_reason is FinishReason.ERROR:
            raise CoreError(output.error)
        done.token_ids += output.token_ids
        done.logprobs += output.logprobs
        done.finish_reason = output.finish_reason
        for token_id in output.token_ids:
            done.text += self.stops.push(self.detokenizer.push(token_id))
        if self.stops.found is None and output.finish_reason is not None:
            done.text += self.stops.push(self.detokenizer.flush())
            done.text += self.stops.flush()
        if self.stops.found is not None:
            done.finish_reason = FinishReason.STOP
            return output.finish_reason is None
        return False


def _per_prompt(adapters: Seq[str | None] | str | None, num_prompts: int) -> Seq[str | None]:
    if adapters is None or isinstance(adapters, str):
        return [adapters] * num_prompts
    if len(adapters) != num_prompts:
        raise InvalidRequestError(
            f"{len(adapters)} adapters for {num_prompts} prompts, must be one or one per prompt",
            param="adapters",
        )
    return adapters
