"""This project's engine without HTTP and Ray: what the server could reach at best.

The same closed loop as over HTTP: a request is added when one of its client's has ended.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import deque
from pathlib import Path

import torch

from adapters.factor_cache import FactorCache
from adapters.store import AdapterStore
from core.engine_config import EngineConfig
from core.loading import load_engine
from core.model_config import read_base_info
from core.requests import FinishReason, GenerationRequest, SamplingParams
from loadtest.peers.wire import Answer, Record, Request, answer_of, requests_of, serve, versions

FACTOR_CACHE_BYTES = 1 << 30
POLL_SECONDS = 0.001


class EnginePeer:
    """An engine with the VB-LoRA adapters `numbers` in a store of its own."""

    def __init__(
        self, base: Path, vblora: Path, numbers: list[int], config: EngineConfig, root: Path
    ) -> None:
        store = AdapterStore.open(root, read_base_info(base))
        self.digests = {
            number: store.add(f"adapter-{number:03d}", vblora / f"{number:03d}").record.digest
            for number in numbers
        }
        cache = FactorCache(
            store.load,
            budget_bytes=FACTOR_CACHE_BYTES,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        self.engine = load_engine(base, config, cache)
        self.num_waves = 0

    def wave(self, command: Answer) -> Answer:
        """Run {"concurrency", "max_tokens", "requests"}."""
        self.num_waves += 1
        start = time.perf_counter()
        waiting = deque(requests_of(command))
        records: dict[str, Record] = {}
        for _ in range(min(command["concurrency"], len(waiting))):
            self.add(waiting.popleft(), command["max_tokens"], records, start)
        while self.engine.has_work:
            num_steps = self.engine.num_steps
            outputs = self.engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise SystemExit(f"request {output.request_id} failed: {output.error}")
                record = records[output.request_id]
                record.times += [now] * len(output.token_ids)
                record.token_ids += output.token_ids
                if output.finish_reason is not None and waiting:
                    self.add(waiting.popleft(), command["max_tokens"], records, start)
            if self.engine.num_steps == num_steps:
                time.sleep(POLL_SECONDS)  # waits for factors
        return answer_of(list(records.values()), time.perf_counter() - start)

    def add(
        self, request: Request, max_tokens: int, records: dict[str, Record], start: float
    ) -> None:
        """Queue one request."""
        request_id = f"{self.num_waves}-{request.index}"
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        digest = None if request.adapter is None else self.digests[request.adapter]
        self.engine.add(GenerationRequest(request_id, tuple(request.prompt), sampling, digest))
        records[request_id] = Record(request.index, time.perf_counter() - start)


def main() -> None:
    """Load, then serve commands on standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapters", type=Path, help="folder with vblora/NNN")
    parser.add_argument("--load", type=json.loads, required=True, help="numbers, a JSON list")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vbserve-bench-") as root:
        vblora = options.adapters / "vblora"
        config = EngineConfig(num_threads=options.threads, device="cpu")
        peer = EnginePeer(options.base, vblora, options.load, config, Path(root))
        ready = {"versions": versions("torch"), "threads": torch.get_num_threads()}
        serve(ready, {"wave": peer.wave})


if __name__ == "__main__":
    main()
