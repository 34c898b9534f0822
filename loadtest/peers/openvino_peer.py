"""OpenVINO GenAI in process, in an environment of its own: the base, or plain LoRA adapters.

Without adapters requests join a running batch. With them only generate() applies adapters, one per
call: add_request() takes them without an error and answers from the base. So the requests that
wait for the adapter of the oldest one are run as one call, and the next call begins when it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from loadtest.peers.wire import Answer, Record, Request, answer_of, requests_of, serve, versions

MAX_BATCHED_TOKENS = 2048
TOKENS_PER_BLOCK = 32
KV_TOKENS = 8192


class OpenVinoPeer:
    """A pipeline over an exported model, with the LoRA adapters `numbers` loaded."""

    def __init__(self, model: Path, lora: Path, numbers: list[int], threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = KV_TOKENS // TOKENS_PER_BLOCK
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        scheduler.enable_prefix_caching = False
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "INFERENCE_NUM_THREADS": threads,
        }
        self.adapters = {
            number: genai.Adapter(lora / f"{number:03d}" / "adapter_model.safetensors")
            for number in numbers
        }
        if self.adapters:
            properties["adapters"] = genai.AdapterConfig(list(self.adapters.values()))
        self.pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self.num_requests = 0

    def wave(self, command: Answer) -> Answer:
        """Run {"concurrency", "max_tokens", "requests"}."""
        run = self.run_by_adapter if self.adapters else self.run_joined
        start = time.perf_counter()
        records = run(requests_of(command), command["concurrency"], command["max_tokens"], start)
        return answer_of(records, time.perf_counter() - start)

    def run_joined(
        self, requests: list[Request], concurrency: int, max_tokens: int, start: float
    ) -> list[Record]:
        """A closed loop in one batch that requests join and leave."""
        waiting, records = deque(requests), list[Record]()
        running = list[tuple[Record, Any]]()
        while waiting or running:
            while waiting and len(running) < concurrency:
                request = waiting.popleft()
                records.append(Record(request.index, time.perf_counter() - start))
                running.append((records[-1], self.add(request, max_tokens)))
            self.pipeline.step()
            now = time.perf_counter() - start
            for record, handle in running:
                if handle.can_read():
                    for output in handle.read().values():
                        record.times += [now] * len(output.generated_ids)
                        record.token_ids += output.generated_ids
            running = [
                (record, handle)
                for record, handle in running
                if handle.get_status() == genai.GenerationStatus.RUNNING
            ]
        return records

    def add(self, request: Request, max_tokens: int) -> Any:
        """A handle from which tokens can be read."""
        self.num_requests += 1
        ids = input_of(request)
        return self.pipeline.add_request(self.num_requests, ids, self.config_of(None, max_tokens))

    def run_by_adapter(
        self, requests: list[Request], concurrency: int, max_tokens: int, start: float
    ) -> list[Record]:
        """A closed loop in calls of one adapter each."""
        unsent, records = deque(requests), list[Record]()
        waiting = list[tuple[Request, Record]]()
        while unsent or waiting:
            while unsent and len(waiting) < concurrency:
                request = unsent.popleft()
                records.append(Record(request.index, time.perf_counter() - start))
                waiting.append((request, records[-1]))
            adapter = waiting[0][0].adapter
            group = [pair for pair in waiting if pair[0].adapter == adapter]
            waiting = [pair for pair in waiting if pair[0].adapter != adapter]
            self.generate(group, max_tokens, start)
        return records

    def generate(self, group: list[tuple[Request, Record]], max_tokens: int, start: float) -> None:
        """One call; all of `group` have one adapter, or none."""
        begun = time.perf_counter() - start
        steps = Steps(start) if len(group) == 1 else None
        inputs = [input_of(request) for request, _ in group]
        configs = [self.config_of(request.adapter, max_tokens) for request, _ in group]
        results = self.pipeline.generate(inputs, configs, steps)
        ended = time.perf_counter() - start
        for (_, record), result in zip(group, results, strict=True):
            record.token_ids = list(result.m_generation_ids[0])
            num_tokens = len(record.token_ids)
            if steps is not None and len(steps.times) == num_tokens:
                record.times = steps.times
            else:  # several cannot be streamed: the first token by the pipeline's own clock
                first = begun + result.perf_metrics.get_ttft().mean / 1000
                record.times = np.linspace(first, ended, num_tokens).tolist()

    def config_of(self, adapter: int | None, max_tokens: int) -> Any:
        """Greedy to the last token."""
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = max_tokens, False, True
        if self.adapters:
            chosen = () if adapter is None else (self.adapters[adapter], 1.0)
            config.adapters = genai.AdapterConfig(*chosen)
        return config


class Steps(genai.StreamerBase):  # type: ignore[misc] # the library brings no types
    """Notes when each token is out."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start, self.times = start, list[float]()

    def write(self, token: int | list[int]) -> Any:
        """Called for each token, or for several at once."""
        now = time.perf_counter() - self.start
        self.times += [now] * (len(token) if isinstance(token, list) else 1)
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is held back."""


def input_of(request: Request) -> Any:
    """The prompt as a batch of one."""
    return openvino.Tensor(np.array([request.prompt], dtype=np.int64))


def main() -> None:
    """Load, then serve commands on standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of an exported model")
    parser.add_argument("adapters", type=Path, help="folder with lora/NNN")
    parser.add_argument("--load", type=json.loads, required=True, help="numbers, a JSON list")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    peer = OpenVinoPeer(options.model, options.adapters / "lora", options.load, options.threads)
    serve({"versions": versions("openvino-genai")}, {"wave": peer.wave})


if __name__ == "__main__":
    main()
