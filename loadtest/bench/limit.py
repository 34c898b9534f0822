"""The least time that a wave of the base needs on this machine, by its own two speeds.

Each step takes what is longer: its arithmetic at the fastest product of matrices, or its reads at
the fastest sum over memory. A step reads the weights once, in fp32, and each sequence's keys and
values (a server that keeps the weights in fewer bits may pass it where only reading takes time);
only rows that sample a token meet the head. Norms, rotations, softmax and writes count as nothing,
and so do HTTP and scheduling. Knows no adapters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.bench.plan import BenchSizes
from loadtest.bench.processes import run_script

_FLOAT_BYTES = 4
_MEASURE = (1.0, [1024, 2048, 4096], 1 << 30)  # seconds, sides of matrices, bytes of the array
_SHORT_MEASURE = (0.05, [256], 1 << 26)


@dataclass(frozen=True)
class MachineSpeed:
    """The best that was seen, in fp32 and on all threads of the bench."""

    flops_per_second: float
    bytes_per_second: float

    def at_best(self, other: MachineSpeed) -> MachineSpeed:
        """The better of two measurements."""
        return MachineSpeed(
            max(self.flops_per_second, other.flops_per_second),
            max(self.bytes_per_second, other.bytes_per_second),
        )


def measure_speed(threads: int | None, *, short: bool = False) -> MachineSpeed:
    """Measure this machine now; nothing else should run. Raises BenchError."""
    seconds, sides, array_bytes = _SHORT_MEASURE if short else _MEASURE
    flags: list[object] = ["--seconds", seconds, "--sides", sides, "--array-bytes", array_bytes]
    flags += ["--threads", threads] if threads else []
    return MachineSpeed(**json.loads(run_script("machine_speed.py", *flags)))


@dataclass(frozen=True)
class BaseShape:
    """Counts of a Llama in fp32.

    body_weights   matrix elements that every row meets
    head_weights   those of the head
    attention      width of all query heads together, times layers
    kv             width of keys and values together, times layers
    """

    body_weights: int
    head_weights: int
    attention: int
    kv: int


def read_shape(base: Path) -> BaseShape:
    """Count from a Hugging Face folder's config.json."""
    config = json.loads((base / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries = heads * head_dim
    kv = 2 * (config.get("num_key_value_heads") or heads) * head_dim
    per_layer = hidden * (2 * queries + kv + 3 * config["intermediate_size"])
    return BaseShape(
        layers * per_layer, hidden * config["vocab_size"], layers * queries, layers * kv
    )


def step_seconds(
    shape: BaseShape, speed: MachineSpeed, num_sequences: int, new_tokens: int, context: int
) -> float:
    """A step in which each sequence adds `new_tokens` to end at `context`, and samples one."""
    rows = num_sequences * new_tokens
    seen = num_sequences * sum(range(context - new_tokens + 1, context + 1))  # places, over rows
    flops = 2 * rows * shape.body_weights + 2 * num_sequences * shape.head_weights
    flops += 4 * seen * shape.attention
    elements = shape.body_weights + shape.head_weights + num_sequences * context * shape.kv
    return max(flops / speed.flops_per_second, elements * _FLOAT_BYTES / speed.bytes_per_second)


def wave_limit(
    shape: BaseShape, speed: MachineSpeed, num_sequences: int, prompt_tokens: int, max_tokens: int
) -> float:
    """Output tokens a second of requests that start at once: one step for all prompts first."""
    seconds = step_seconds(shape, speed, num_sequences, prompt_tokens, prompt_tokens)
    for context in range(prompt_tokens + 1, prompt_tokens + max_tokens):
        seconds += step_seconds(shape, speed, num_sequences, 1, context)
    return num_sequences * max_tokens / seconds


def limits_of(
    shape: BaseShape, speed: MachineSpeed, sizes: BenchSizes, workloads: Sequence[str]
) -> dict[str, float]:
    """Limits of the workloads that are one wave of the base at once, or one request at a time."""
    num_sequences = {"W1": 1, "W2": sizes.num_clients}
    return {
        name: wave_limit(shape, speed, num, sizes.prompt_tokens, sizes.max_tokens)
        for name, num in num_sequences.items()
        if name in workloads
    }
