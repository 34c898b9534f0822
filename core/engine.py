"""The engine: requests in, tokens out, one step at a time.

`step()` is the whole of it: schedule, bind, forward, sample, update. Knows nothing of threads
(see `engine_thread`), text, names of adapters or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core.attention import KVStorage, bytes_per_token
from core.batch import Batch, build_batch, wants_prompt_logprobs
from core.engine_config import EngineConfig
from core.errors import AdapterUnavailableError, InvalidRequestError, PromptTooLongError
from core.factors import FactorSource
from core.kernels.build import load_library
from core.kernels.cpu_ops import CpuOps
from core.kv_cache import KVPool
from core.model import LlamaModel
from core.model_config import ModelConfig, read_model_config
from core.ops import Ops, TorchOps
from core.requests import (
    FinishReason,
    GenerationRequest,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from core.sampler import logprobs_of, sample
from core.scheduler import Scheduler
from core.sequence import Chunk, Sequence, Status
from core.weights import load_weights

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
        self.scheduler = Scheduler(config, self._pool, factor_source, max_reusable_prompt=limit)
        self._sequences: dict[str, Sequence] = {}
        self.num_steps = 0
        own_limit = config.max_model_len or model.config.max_model_len
        self.max_model_len = min(own_limit, self._pool.num_pages * config.page_size)

    # -- requests ------------------------------------------------------------------------------

    def check(self, request: GenerationRequest) -> None:
        """Raise what makes `request` impossible here. Any thread may ask.

        InvalidRequestError, PromptTooLongError, or AdapterUnavailableError when there is no
        source of factors at all.
        """
        tokens = request.prompt_token_ids
        if not tokens:
            raise InvalidRequestError(
                "the prompt is empty, it must have at least one token", param="prompt"
            )
        self._check_token_ids("prompt", tokens)
        self._check_token_ids("logit_bias", request.sampling.logit_bias)
        self._check_stops(request.sampling)
        wanted = len(tokens) + request.sampling.max_tokens
        if wanted > self.max_model_len:
            raise PromptTooLongError(
                f"{len(tokens)} prompt tokens and max_tokens {request.sampling.max_tokens} are "
                f"{wanted} tokens, the longest sequence served has {self.max_model_len}",
                param="max_tokens" if len(tokens) < self.max_model_len else "prompt",
            )
        if request.adapter_digest is not None and not self._has_factors:
            raise AdapterUnavailableError("this engine was built without a source of adapters")

    def _check_stops(self, params: SamplingParams) -> None:
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        stops = params.stop_token_ids | self.model.config.eos_token_ids
        if params.min_tokens and len(stops) >= self.model.config.vocab_size:
            raise InvalidRequestError(
                f"stop_token_ids leaves none for min_tokens {params.min_tokens}, must leave one",
                param="stop_token_ids",
            )

    def _check_token_ids(self, param: str, token_ids: Iterable[int]) -> None:
        vocab_size = self.model.config.vocab_size
        bad = next((token for token in token_ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise InvalidRequestError(
                f"token id {bad} is not in the vocabulary, must be in [0, {vocab_size})",
                param=param,
            )

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
        adapters = self.model.ops.bind(batch.adapter_rows)
        logits_RV = self.model.forward(batch, self._kv, adapters)
        tokens = self._sample(batch, logits_RV)
        self.num_steps += 1
        return outputs + self._update(batch, tokens)

    def _sample(self, batch: Batch, logits_RV: Tensor) -> dict[Sequence, _Sampled | None]:
        """New tokens of the sequences that sample, with logprobs; fills prompt logprobs.

        None for a sequence whose logits are not finite: factors may overflow in the forward.
        """
        finite = logits_RV.amax(dim=-1).isfinite().tolist()
        found: dict[Sequence, _Sampled | None] = {}
        rows: list[int] = []
        seqs: list[Sequence] = []
        end = 0
        for chunk, num_rows in batch.logit_spans:
            end += num_rows
            if not all(finite[end - num_rows : end]):
                found[chunk.seq] = None
                continue
            if wants_prompt_logprobs(chunk):
                _fill_prompt_logprobs(chunk, logits_RV[end - num_rows : end])
            if chunk.samples and chunk.seq.request.sampling.max_tokens > 0:
                rows.append(end - 1)
                seqs.append(chunk.seq)
        if not seqs:
            return found
        chosen_RV = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
        tokens = sample(chosen_RV, seqs, self.model.config.eos_token_ids)
        logprobs = _sampled_logprobs(chosen_RV, seqs, tokens)
        for seq, token in zip(seqs, tokens, strict=True):
            found[seq] = _Sampled(token, logprobs.get(seq))
        return found

    def _update(
        self, batch: Batch, sampled: dict[Sequence, _Sampled | None]
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

    def _append(self, seq: Sequence, new: _Sampled) -> RequestOutput:
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
            adapter_slot_bytes=self.model.ops.adapter_bytes,
            device_bytes=torch.cuda.memory_allocated(self.model.device) if on_cuda else 0,
        )

    def check_integrity(self) -> None:
        """Assert that scheduler, pages, leases and bindings agree."""
        self.scheduler.check_integrity()
        self.model.ops.check_integrity()
        known = {id(seq) for seq in self._sequences.values()}
        listed = {id(seq) for seq in (*self.scheduler.running, *self.scheduler.waiting)}
        assert known == listed | {id(seq) for seq, _ in self.scheduler.failed}, "sequences differ"


@dataclass(frozen=True)
class _Sampled:
    token_id: int
    logprobs: TokenLogprobs | None


def load_engine(
    path: Path | str, config: EngineConfig | None = None, factor_source: FactorSource | None = None
) -> Engine:
    """Read a Hugging Face model directory and build an engine for it.

    Raises UnsupportedModelError for what is not served exactly.
    """
    config = config or EngineConfig()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device, dtype = resolve_placement(config)
    model_config = read_model_config(Path(path))
    weights = load_weights(Path(path), model_config, device, dtype)
    ops = make_ops(model_config, device, dtype, compiled=config.compiled_kernels)
    return Engine(LlamaModel(model_config, weights, ops), config, factor_source)


def make_ops(
    model_config: ModelConfig, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> Ops:
    """Compiled kernels for fp32 on the CPU where they can be had, else torch's operations."""
    if compiled and device.type == "cpu" and dtype == torch.float32:
        library = load_library()
        if library is not None:
            return CpuOps(model_config, library)
    return TorchOps(model_config, device, dtype)


def resolve_placement(config: EngineConfig) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that "auto" stands for on this machine."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if name == "cuda" else "float32"
    return torch.device(name), getattr(torch, dtype)


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


def _fill_prompt_logprobs(chunk: Chunk, logits_RV: Tensor) -> None:
    """Add the logprobs of the prompt's tokens after the chunk's rows, unless they are there."""
    seq = chunk.seq
    known = seq.prompt_logprobs
    if not known:
        known.append(None)  # nothing comes before the first token
    first_row = len(known) - 1 - chunk.start
    targets = seq.token_ids[len(known) : min(chunk.end + 1, seq.num_prompt)]
    if targets and first_row >= 0:
        num_top = seq.request.sampling.prompt_logprobs or 0
        rows_RV = logits_RV[first_row : first_row + len(targets)]
        known.extend(logprobs_of(rows_RV, targets, num_top))


def _sampled_logprobs(
    logits_RV: Tensor, seqs: Seq[Sequence], tokens: Seq[int]
) -> dict[Sequence, TokenLogprobs]:
    found = {}
    for row, (seq, token) in enumerate(zip(seqs, tokens, strict=True)):
        num_top = seq.request.sampling.logprobs
        if num_top is not None:
            found[seq] = logprobs_of(logits_RV[row : row + 1], [token], num_top)[0]
    return found


def _prompt_logprobs(seq: Sequence) -> tuple[TokenLogprobs | None, ...] | None:
    if seq.request.sampling.prompt_logprobs is None:
        return None
    return tuple(seq.prompt_logprobs)
