"""What a vertical base's decode costs: `python -m deploy.vertical.speed` (two minutes, two cores).

Engines over one random vertical base of SmolLM2-135M's sizes, factored and expanded, stand side by
side in one process and take turns at the same decode steps; the speed of a step does not depend on
what the weights say. Expanded, the engine is that of a plain Llama of this size.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core import Engine, EngineConfig, GenerationRequest, SamplingParams, load_engine
from core.vertical import VerticalConfig
from deploy.vertical.modules import make_vertical, save_vertical

NUM_LAYERS, NUM_PROMPT, NUM_STEPS = 30, 16, 48
WAYS = ("expanded", "factored")
STREAMS = (1, 4, 16)


def write_random_base(path: Path, chunk_size: int, rank: int, dtype: torch.dtype) -> None:
    """SmolLM2-135M's geometry in chunks of `chunk_size` layers, as a checkpoint in `dtype`."""
    vertical = VerticalConfig(
        (chunk_size,) * (NUM_LAYERS // chunk_size), rank, float(rank), "recursive"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    make_vertical(model, vertical)
    save_vertical(model, vertical, path, dtype)


def seconds_a_step(engine: Engine, num_streams: int, seed: int) -> float:
    """Median time of the decode steps of `num_streams` sequences, after their prompts."""
    rng = random.Random(seed)
    sampling = SamplingParams(temperature=0, max_tokens=NUM_STEPS + 2, ignore_eos=True)
    for number in range(num_streams):
        prompt = tuple(rng.randrange(3, 40_000) for _ in range(NUM_PROMPT))
        engine.add(GenerationRequest(f"{seed}-{number}", prompt, sampling))
    times = []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[-NUM_STEPS:])


def table(engines: dict[str, Engine], num_rounds: int) -> str:
    """Markdown; engines take turns within each round, each cell is the median of its rounds."""
    lines = [f"| | {' | '.join(engines)} |", "|---" * (1 + len(engines)) + "|"]
    weights = [f"{engine.stats().base_bytes / 1e6:.0f} MB" for engine in engines.values()]
    lines.append(f"| weights in memory | {' | '.join(weights)} |")
    for num_streams in STREAMS:
        rounds = [
            [seconds_a_step(engine, num_streams, seed) for engine in engines.values()]
            for seed in range(-1, num_rounds)
        ][1:]
        medians = [statistics.median(found) * 1e3 for found in zip(*rounds, strict=True)]
        cells = " | ".join(f"{median:.2f} ms" for median in medians)
        lines.append(f"| a decode step of {num_streams} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the base, load it in both ways, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunk-size", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="float32", help="of the checkpoint; computed in fp32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    for chunk_size in options.chunk_size:
        with tempfile.TemporaryDirectory(prefix="vbserve-vertical-") as folder:
            write_random_base(Path(folder), chunk_size, options.rank, getattr(torch, options.dtype))
            engines = {
                way: load_engine(
                    folder,
                    EngineConfig(
                        device="cpu",
                        dtype="float32",
                        vertical=way,
                        kv_cache_bytes=1 << 27,
                        enable_prefix_caching=False,
                    ),
                )
                for way in WAYS
            }
        print(f"\nchunks of {chunk_size} layers, rank {options.rank}, {options.dtype}\n")
        print(table(engines, options.rounds))


if __name__ == "__main__":
    main()
