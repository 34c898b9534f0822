"""One engine replica: the base, a factor cache over the adapter store, an engine thread.

A request is one unary call that lasts as long as the request, so that Serve's routing, accounting
and cancellation apply to it, and a replica's death is an error of the call. Its tokens leave by
the token channel as they come; the call's result holds them all again. Knows nothing of HTTP or
of adapter names.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from serving.cluster.garbage import collection_paused, set_loaded_objects_aside

with collection_paused():
    from ray import serve

    from adapters.factor_cache import FactorCache
    from core.engine_config import EngineConfig
    from core.engine_thread import EngineThread
    from core.errors import CoreError
    from core.loading import load_engine, resolve_placement
    from core.model_config import read_base_info
    from core.requests import FinishReason, GenerationRequest, RequestOutput
    from serving.cluster.engine_wire import (
        GenerateResult,
        decode_call,
        encode,
        join_outputs,
        to_wire,
    )
    from serving.cluster.token_channel import TokenSender
    from serving.engine_client import EngineDiedError
    from serving.metrics import AdapterLabels, EngineMetrics, EngineState
    from serving.metrics_pages import Page
    from serving.settings import Settings
    from serving.stores import open_store


@dataclass
class _Running:
    """A request between its call and its result."""

    outcome: asyncio.Future[RequestOutput]  # resolved on the event loop
    outputs: list[RequestOutput] = field(default_factory=list)  # appended by the engine's thread


class EngineReplica:
    """What Ray Serve runs `num_engine_replicas` times. Methods are called on one event loop."""

    def __init__(self, settings: Settings, base_name: str, model: Path) -> None:
        self._process = secrets.token_hex(8)  # another one after each restart
        self._loop = asyncio.get_running_loop()
        self._running: dict[str, _Running] = {}
        self._sender = TokenSender(self._process)
        config = engine_config(settings)
        device, dtype = resolve_placement(config)
        store = open_store(settings, base_name, read_base_info(model))
        self._cache = FactorCache(
            store.load,
            budget_bytes=settings.factor_cache_bytes,
            compact_budget_bytes=settings.compact_cache_bytes,
            device=device,
            dtype=dtype,
        )
        labels = AdapterLabels(base_name, settings.adapter_label_cap)
        self._metrics = EngineMetrics(labels, self._state)
        self._thread = EngineThread(load_engine(model, config, self._cache), self._on_step)
        self._cache.set_on_ready(self._thread.wake)
        set_loaded_objects_aside()
        self._thread.start()

    async def generate(self, data: bytes) -> bytes:
        """Run one GenerateCall to its end; returns a GenerateResult. Cancelling it aborts."""
        call = decode_call(data)
        request = call.request
        running = _Running(self._loop.create_future())
        self._running[request.request_id] = running
        self._sender.open(request.request_id, call.reply_to)
        try:
            self._submit(request)
            output = await running.outcome
        except CoreError as error:
            return encode(GenerateResult(self._process, error=to_wire(self._death() or error)))
        except asyncio.CancelledError:
            self._thread.abort(request.request_id)
            raise
        finally:
            self._sender.close(request.request_id)
            del self._running[request.request_id]
        return encode(GenerateResult(self._process, output))

    async def max_model_len(self) -> int:
        """Tokens that one sequence may have here, prompt and output together."""
        return self._thread.engine.max_model_len

    async def is_ready(self) -> bool:
        """Whether the weights are loaded (or this would not answer) and the engine runs."""
        return self._death() is None

    async def metric_page(self) -> tuple[str, Page]:
        """This replica's name and its metrics."""
        return replica_name("engine"), self._metrics.page()

    def check_health(self) -> None:
        """Raise when the engine's thread has ended, so that Serve replaces this replica."""
        death = self._death()
        if death is not None:
            raise death

    def __del__(self) -> None:
        """Serve calls this before it ends the process."""
        self._thread.stop()
        self._cache.close()
        self._sender.shutdown()

    def _death(self) -> EngineDiedError | None:
        if self._thread.error is None and self._thread.is_alive:
            return None
        return EngineDiedError(f"the engine has stopped: {self._thread.error or 'shut down'}")

    def _submit(self, request: GenerationRequest) -> None:
        self._metrics.requests.submitted(request)
        try:
            self._thread.submit(request)
        except CoreError:
            self._metrics.requests.rejected(request)
            raise

    def _on_step(self, outputs: list[RequestOutput]) -> None:
        """In the engine's thread: send a step's tokens, and hand what has ended to the loop."""
        if self._thread.error is None:
            self._sender.send(outputs)
        self._metrics.requests.observe(outputs)
        ended = []
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is not None:
                running.outputs.append(output)
                if output.finish_reason is not None:
                    ended.append(running)
        if ended:
            self._loop.call_soon_threadsafe(self._resolve, ended)

    def _resolve(self, ended: list[_Running]) -> None:
        death = self._death()
        for running in ended:
            if running.outcome.done():
                continue
            if death is not None and running.outputs[-1].finish_reason is FinishReason.ERROR:
                running.outcome.set_exception(death)
            else:
                running.outcome.set_result(join_outputs(running.outputs))

    def _state(self) -> EngineState:
        """Figures for the metrics, read at each scrape."""
        engine, cache = self._thread.stats(), self._cache.stats
        return EngineState(
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_preemptions=engine.num_preemptions,
            num_prefix_hit_tokens=engine.num_prefix_hit_tokens,
            base_bytes=engine.base_bytes,
            kv_bytes_used=engine.kv_bytes_used,
            kv_bytes_total=engine.kv_bytes_total,
            adapter_slot_bytes=engine.adapter_slot_bytes,
            device_bytes=engine.device_bytes,
            compact_bytes=cache.compact_bytes + cache.bank_bytes,
            factor_bytes_used=cache.used_bytes,
            factor_bytes_budget=cache.budget_bytes,
            num_factor_hits=cache.hits,
            num_factor_misses=cache.misses,
            num_factor_evictions=cache.evictions,
            num_rebuilds=cache.num_rebuilds,
            rebuild_seconds=cache.rebuild_seconds,
        )


def engine_config(settings: Settings) -> EngineConfig:
    """The engine's part of the settings; CPU threads are shared out between engines."""
    num_cores = len(os.sched_getaffinity(0))
    return EngineConfig(
        device=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        vertical=settings.vertical,
        kv_cache_bytes=settings.kv_cache_bytes,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_waiting=settings.max_waiting,
        max_waiting_per_adapter=settings.max_waiting_per_adapter,
        num_threads=settings.num_threads or max(1, num_cores // settings.num_engine_replicas),
    )


def replica_name(kind: str) -> str:
    """`kind` and this replica's rank: the same after a restart, so metrics go on."""
    return f"{kind}-{serve.get_replica_context().rank.rank}"
