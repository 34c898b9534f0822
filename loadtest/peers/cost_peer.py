"""This project's engine, step by step: how long a decode step takes with given sequences.

Prompts are computed before, by requests of one token each, and found again in the prefix cache;
so all sequences begin to decode within a few steps of each other.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from core.engine_config import EngineConfig
from core.kv_storage import bytes_per_token
from core.model_config import read_model_config
from loadtest.peers.engine_peer import POLL_SECONDS, EnginePeer
from loadtest.peers.wire import Answer, Record, Request, requests_of, serve, versions

SETTLING_STEPS = 2
SLACK_TOKENS = 64  # some begin some steps earlier than others


class CostPeer:
    """Decode steps of an engine."""

    def __init__(self, peer: EnginePeer) -> None:
        self.peer, self.engine = peer, peer.engine

    def decode(self, command: Answer) -> Answer:
        """Seconds of "num_steps" steps in which each of "requests" decodes, and their tokens."""
        requests, num_steps = requests_of(command), command["num_steps"]
        self.start(requests, 1)
        while self.engine.has_work:
            self.step({})
        records = self.start(requests, SLACK_TOKENS + num_steps)
        while not all(record.token_ids for record in records.values()):
            self.step(records)
        for _ in range(SETTLING_STEPS):
            self.step(records)
        seconds = [self.step(records, len(requests)) for _ in range(num_steps)]
        for request_id in records:
            self.engine.abort(request_id)
        by_index = {record.index: record.token_ids for record in records.values()}
        outputs = [by_index[request.index] for request in requests]
        return {"step_seconds": seconds, "token_ids": outputs}

    def start(self, requests: list[Request], max_tokens: int) -> dict[str, Record]:
        """Queue all; their records by id."""
        records: dict[str, Record] = {}
        self.peer.num_waves += 1
        for request in requests:
            self.peer.add(request, max_tokens, records, 0.0)
        return records

    def step(self, records: dict[str, Record], num_tokens: int | None = None) -> float:
        """One step's seconds; it must bring `num_tokens` tokens where that is said."""
        num_steps, start = self.engine.num_steps, time.perf_counter()
        outputs = self.engine.step()
        seconds = time.perf_counter() - start
        if self.engine.num_steps == num_steps:
            time.sleep(POLL_SECONDS)  # waits for factors
        failed = next((output.error for output in outputs if output.error), None)
        if failed or num_tokens not in (None, sum(len(o.token_ids) for o in outputs)):
            raise SystemExit(failed or f"a step brought {len(outputs)} outputs, not {num_tokens}")
        for output in outputs:
            if output.request_id in records:
                records[output.request_id].token_ids += output.token_ids
        return seconds


def main() -> None:
    """Load, then serve commands on standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("vblora", type=Path, help="folder with NNN")
    parser.add_argument("--load", type=json.loads, required=True, help="numbers, a JSON list")
    parser.add_argument("--kv-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    kv_bytes = options.kv_tokens * bytes_per_token(read_model_config(options.base), torch.float32)
    config = EngineConfig(num_threads=options.threads, device="cpu", kv_cache_bytes=kv_bytes)
    with tempfile.TemporaryDirectory(prefix="vbserve-bench-") as root:
        peer = CostPeer(EnginePeer(options.base, options.vblora, options.load, config, Path(root)))
        ready = {"versions": versions("torch"), "threads": torch.get_num_threads()}
        serve(ready, {"decode": peer.decode})


if __name__ == "__main__":
    main()
