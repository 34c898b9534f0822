"""PEFT and transformers in process: two ways to serve many adapters, and the judge of exactness.

    mixed    static batches; adapter_names= gives each row its own LoRA
    single   one request at a time, set_adapter() before each: PEFT's plain way

There is no server, so no request joins a running batch. A closed loop of C clients is kept as far
as that allows: request i is sent when request i - C has ended, and waits from then on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LogitsProcessorList

from loadtest.peers.wire import (
    Answer,
    Record,
    Request,
    answer_of,
    batches,
    requests_of,
    serve,
    versions,
)

BASE_ROW = "__base__"


class PeftPeer:
    """The base with the adapters `numbers` loaded as plain LoRA."""

    def __init__(self, base: Path, lora: Path, numbers: list[int]) -> None:
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.base_seconds = time.perf_counter() - start
        self.load_seconds: list[float] = []
        for number in numbers:
            start = time.perf_counter()
            path, name = lora / f"{number:03d}", adapter_name(number)
            if self.load_seconds:
                model.load_adapter(path, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, path, adapter_name=name)
            self.load_seconds.append(time.perf_counter() - start)
        self.model = model.eval()
        self.model.generation_config.eos_token_id = None  # the end of text is a token like others
        self.active: int | None = None

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The base alone; entered outside timing: with many adapters loaded it takes a second."""
        with self.model.disable_adapter():
            yield

    def activate(self, number: int | None) -> None:
        """Make one adapter the active one, unless it is."""
        if number is not None and number != self.active:
            self.model.set_adapter(adapter_name(number))
            self.active = number

    def wave(self, command: Answer) -> Answer:
        """Run {"mode", "concurrency", "max_tokens", "requests"}; base-only waves without LoRA."""
        requests = requests_of(command)
        if all(request.adapter is None for request in requests):
            with self.adapters_off():
                return self.run(requests, command)
        return self.run(requests, command)

    def run(self, requests: list[Request], command: Answer) -> Answer:
        """Batches of the clients' number, or of one; each batch starts when the last has ended."""
        concurrency, is_mixed = command["concurrency"], command["mode"] == "mixed"
        start = time.perf_counter()
        records: list[Record] = []
        for batch in batches(requests, concurrency if is_mixed else 1):
            ids, times = self.generate(batch, command["max_tokens"], is_mixed)
            since = [at - start for at in times]
            for request, row in zip(batch, ids, strict=True):
                before = len(records) - concurrency
                sent = records[before].times[-1] if before >= 0 else 0.0
                records.append(Record(request.index, sent, since, row))
        return answer_of(records, time.perf_counter() - start)

    @torch.inference_mode()
    def generate(
        self, batch: list[Request], max_tokens: int, is_mixed: bool
    ) -> tuple[list[list[int]], list[float]]:
        """Greedy tokens per row, and when each step was done (generate() streams one row only)."""
        times: list[float] = []

        def note(_: Any, scores: torch.Tensor) -> torch.Tensor:
            times.append(time.perf_counter())
            return scores

        ids = torch.tensor([request.prompt for request in batch])
        more: dict[str, Any] = {}
        if is_mixed and any(request.adapter is not None for request in batch):
            more["adapter_names"] = [
                BASE_ROW if request.adapter is None else adapter_name(request.adapter)
                for request in batch
            ]
        elif not is_mixed:
            self.activate(batch[0].adapter)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([note]),
            **more,
        )
        return out[:, ids.shape[1] :].tolist(), times

    def judge(self, command: Answer) -> Answer:
        """Compare {"items": [{"prompt", "adapter", "output"}]} with PEFT's own greedy choice.

        One forward over prompt and output gives PEFT's next token after every prefix. As long as
        the output follows it, the prefixes are those of PEFT's greedy run, so the first difference
        here is the first difference there; what comes after it is not looked at. Per item: place
        of the first difference (None: equal), and there PEFT's token and its lead in logits.
        """
        order = sorted(enumerate(command["items"]), key=lambda pair: pair[1]["adapter"] or -1)
        verdicts: dict[int, Answer] = {}
        base = [pair for pair in order if pair[1]["adapter"] is None]
        with self.adapters_off():
            verdicts.update((place, verdict(self.model, item)) for place, item in base)
        for place, item in order:
            if item["adapter"] is not None:
                self.activate(item["adapter"])
                verdicts[place] = verdict(self.model, item)
        return {"verdicts": [verdicts[place] for place in range(len(order))]}


@torch.inference_mode()
def verdict(model: Any, item: Answer) -> Answer:
    """Judge one item with what is active in `model` now."""
    output = item["output"]
    ids = torch.tensor([item["prompt"] + output[:-1]])
    logits_TV = model(input_ids=ids, logits_to_keep=len(output)).logits[0].float()
    top = logits_TV.topk(2)
    for place, token_id in enumerate(output):
        if token_id != top.indices[place, 0].item():
            lead = (top.values[place, 0] - top.values[place, 1]).item()
            expected = top.indices[place, 0].item()
            return {"first_difference": place, "expected": expected, "lead": lead}
    return {"first_difference": None, "expected": None, "lead": None}


def adapter_name(number: int) -> str:
    """PEFT wants names that do not begin with a digit."""
    return f"a{number}"


def main() -> None:
    """Load, then serve commands on standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapters", type=Path, help="folder with lora/NNN")
    parser.add_argument("--load", type=json.loads, required=True, help="numbers, a JSON list")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    peer = PeftPeer(options.base, options.adapters / "lora", options.load)
    ready = {
        "versions": versions("peft", "transformers", "torch"),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "base_seconds": peer.base_seconds,
        "adapter_seconds_p50": statistics.median(peer.load_seconds),
        "adapter_seconds_max": max(peer.load_seconds),
    }
    serve(ready, {"wave": peer.wave, "judge": peer.judge})


if __name__ == "__main__":
    main()
