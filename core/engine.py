"""The engine: requests in, tokens out, one step at a time.

`step()` is the whole of it: schedule, forward, sample, update. Knows nothing of threads
(see `engine_thread`), text, names of adapters or HTTP.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from core.batch import Batch, build_batch
from core.engine_config import EngineConfig
from core.errors import AdapterUnavailableError, InvalidRequestError
from core.factors import FactorSource
from core.kv_cache import KVPool
from core.kv_storage import KVStorage, bytes_per_token
from core.model import LlamaModel
from core.next_tokens import NextToken, next_tokens
from core.request_check import check_request
from core.requests import FinishReason, GenerationRequest, RequestOutput, TokenLogprobs
from core.scheduler import Scheduler
from core.sequence import Sequence, Status

_CPU_KV_BYTES = 1 << 30
_CUDA_KV_SHARE = 0.6


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of counts and bytes; totals count from the engine's start."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_preemptions: int
    num_prefix_hit_tokens: int
    base_bytes: int
    kv_bytes_total: int
    kv_bytes_used: int
    adapter_slot_bytes: int
    device_bytes: int


class Engine:
    """One model, its KV cache and its scheduler. One thread calls everything but `check`."""

    def __init__(
        self, model: LlamaModel, config: EngineConfig, factor_source: FactorSource | None = None
    ) -> None:
        self.model, self.config = model, config
        self._has_factors = factor_source is not None
        self._pool = KVPool(_num_pages(model, config), config.page_size)
        self._kv = KVStorage(
            model.config, self._pool.num_pages, config.page_size, model.device, model.dtype
        )
        limit = model.config.max_model_len if model.rotary.depends_on_length else None
        self.scheduler = Scheduler(
            config,
            self._pool,
            factor_source,
            tokens_per_step=config.tokens_per_step(model.device.type),
            max_reusable_prompt=limit,
        )
        self._sequences: dict[str, Sequence] = {}
        self.num_steps = 0
        self.num_threads = torch.get_num_threads()  # of CPU threads; `load_engine` has set it
        own_limit = config.max_model_len or model.config.max_model_len
        self.max_model_len = min(own_limit, self._pool.num_pages * config.page_size)

    # -- requests ------------------------------------------------------------------------------

    def check(self, request: GenerationRequest) -> None:
        """Raise what makes `request` impossible here. Any thread may ask.

        InvalidRequestError, PromptTooLongError, or AdapterUnavailableError when there is no
        source of factors at all.
        """
        check_request(request, self.model.config, self.max_model_len)
        if request.adapter_digest is not None and not self._has_factors:
            raise AdapterUnavailableError("this engine was built without a source of adapters")

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises as `check` does, and EngineOverloadedError."""
        self.check(request)
        if request.request_id in self._sequences:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use already")
        seq = Sequence.start(request, time.monotonic())
        self.scheduler.add(seq)
        self._sequences[request.request_id] = seq

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request and free all it holds; None if it is not there (any more)."""
        seq = self._sequences.get(request_id)
        return None if seq is None else self._finish(seq, FinishReason.ABORT)

    @property
    def has_work(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._sequences)

    # -- the step ------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Compute one batch; the outputs of all requests that it brought on or ended."""
        chunks = self.scheduler.schedule()
        outputs = self._report_failed()
        if not chunks:
            return outputs
        batch = build_batch(
            chunks,
            self.config.page_size,
            self.model.device,
            with_lengths=self.model.rotary.depends_on_length,
        )
        x_RH = self.model.forward(batch, self._kv)
        tokens = next_tokens(batch, x_RH, self.model.head, self.model.config.eos_token_ids)
        self.num_steps += 1
        return outputs + self._update(batch, tokens)

    def _update(
        self, batch: Batch, sampled: dict[Sequence, NextToken | None]
    ) -> list[RequestOutput]:
        outputs = []
        for chunk in batch.chunks:
            self.scheduler.complete(chunk)
            seq = chunk.seq
            if seq in sampled:
                new = sampled[seq]
                outputs.append(self._fail(seq) if new is None else self._append(seq, new))
            elif chunk.samples:
                outputs.append(self._finish(seq, FinishReason.LENGTH, is_first=True))
        return outputs

    def _fail(self, seq: Sequence) -> RequestOutput:
        weights = "the base's" if seq.digest is None else f"adapter {seq.digest}'s"
        return self._finish(
            seq, FinishReason.ERROR, error=f"{weights} logits are not finite for this request"
        )

    def _append(self, seq: Sequence, new: NextToken) -> RequestOutput:
        seq.token_ids.append(new.token_id)
        is_first = seq.first_token is None
        if is_first:
            seq.first_token = time.monotonic()
        reason = self._finish_reason(seq, new.token_id)
        logprobs = () if new.logprobs is None else (new.logprobs,)
        if reason is not None:
            return self._finish(seq, reason, (new.token_id,), logprobs, is_first=is_first)
        return RequestOutput(
            seq.request.request_id,
            (new.token_id,),
            logprobs,
            prompt_logprobs=_prompt_logprobs(seq) if is_first else None,
            num_cached_tokens=seq.num_cached_tokens,
            timings=seq.timings(None) if is_first else None,
        )

    def _finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        params = seq.request.sampling
        is_eos = token_id in self.model.config.eos_token_ids and not params.ignore_eos
        if is_eos or token_id in params.stop_token_ids:
            return FinishReason.STOP
        if seq.num_output >= params.max_tokens or len(seq.token_ids) >= self.max_model_len:
            return FinishReason.LENGTH
        return None

    def _finish(
        self,
        seq: Sequence,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        error: str | None = None,
        *,
        is_first: bool = False,
    ) -> RequestOutput:
        if seq.status is not Status.FINISHED:
            self.scheduler.finish(seq)
        del self._sequences[seq.request.request_id]
        return RequestOutput(
            seq.request.request_id,
            token_ids,
            logprobs,
            prompt_logprobs=_prompt_logprobs(seq) if is_first else None,
            finish_reason=reason,
            error=error,
            num_cached_tokens=seq.num_cached_tokens,
            timings=seq.timings(time.monotonic()),
        )

    def _report_failed(self) -> list[RequestOutput]:
        failed, self.scheduler.failed = self.scheduler.failed, []
        return [self._finish(seq, FinishReason.ERROR, error=message) for seq, message in failed]

    # -- figures -------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counts and bytes as of now. Any thread may ask; figures may be a step old."""
        page_bytes = self._kv.num_bytes // self._pool.num_pages
        on_cuda = self.model.device.type == "cuda"
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_steps=self.num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_prefix_hit_tokens=self.scheduler.num_prefix_hit_tokens,
            base_bytes=self.model.weights.num_bytes,
            kv_bytes_total=self._kv.num_bytes,
            kv_bytes_used=self._pool.num_used * page_bytes,
            adapter_slot_bytes=self.model.layers.adapter_bytes,
            device_bytes=torch.cuda.memory_allocated(self.model.device) if on_cuda else 0,
        )

    def check_integrity(self) -> None:
        """Assert that scheduler, pages, leases and bindings agree."""
        self.scheduler.check_integrity()
        self.model.layers.check_integrity()
        known = {id(seq) for seq in self._sequences.values()}
        listed = {id(seq) for seq in (*self.scheduler.running, *self.scheduler.waiting)}
        assert known == listed | {id(seq) for seq, _ in self.scheduler.failed}, "sequences differ"


def _num_pages(model: LlamaModel, config: EngineConfig) -> int:
    budget = config.kv_cache_bytes
    if budget is None and model.device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(model.device)[0] * _CUDA_KV_SHARE)
    page_bytes = config.page_size * bytes_per_token(model.config, model.dtype)
    num_pages = (budget or _CPU_KV_BYTES) // page_bytes
    if num_pages < 1:
        raise InvalidRequestError(
            f"kv_cache_bytes is {budget}, one page of {config.page_size} tokens takes {page_bytes}",
            param="kv_cache_bytes",
        )
    return num_pages


def _prompt_logprobs(seq: Sequence) -> tuple[TokenLogprobs | None, ...] | None:
    if seq.request.sampling.prompt_logprobs is None:
        return None
    return tuple(seq.prompt_logprobs)
