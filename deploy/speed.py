"""What rounding the base brings: `python -m deploy.speed` (two minutes on two cores).

Engines in fp32 and in each way that `--quantize` names stand side by side in one process and take
turns at the same work: prompts of random tokens, by the base or by the demo adapters in turn, all
at once. Prints a table of output tokens a second, prefill included; each is the median of its
rounds.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from adapters import AdapterStore, FactorCache
from core import LLM, EngineConfig, SamplingParams, read_base_info
from deploy.demo.evaluate import HERE
from deploy.demo.tasks import TASKS
from serving.default_base import ensure_default_base

NUM_PROMPT, NUM_OUTPUT = 128, 64
STREAMS = (1, 16)
FACTOR_CACHE_BYTES = 1 << 29
KV_CACHE_BYTES = 1 << 28


def tokens_a_second(llm: LLM, digests: Sequence[str | None], seed: int) -> float:
    """One wave: a prompt for each of `digests`."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, 40_000) for _ in range(NUM_PROMPT)] for _ in digests]
    sampling = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, sampling, adapters=digests)
    return len(prompts) * NUM_OUTPUT / (time.perf_counter() - start)


def table(llms: dict[str, LLM], digests: Sequence[str], num_rounds: int) -> str:
    """Markdown; each row's engines take turns within each round."""
    lines = [f"| | {' | '.join(llms)} |", "|---" * (1 + len(llms)) + "|"]
    for num_streams in STREAMS:
        for label, cycle in (("base", [None]), ("adapters", digests)):
            work = list(itertools.islice(itertools.cycle(cycle), num_streams))
            for llm in llms.values():
                tokens_a_second(llm, work, seed=-1)
            rounds = [
                [tokens_a_second(llm, work, seed) for llm in llms.values()]
                for seed in range(num_rounds)
            ]
            medians = [f"{statistics.median(found):.0f}" for found in zip(*rounds, strict=True)]
            lines.append(f"| {num_streams} at once, {label} | {' | '.join(medians)} |")
    return "\n".join(lines)


def main() -> None:
    """Load all engines, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="a local copy of the default base")
    parser.add_argument("--quantize", nargs="+", default=["int8", "int8-weights"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    base = options.base or ensure_default_base()
    with tempfile.TemporaryDirectory(prefix="vbserve-speed-") as root:
        store = AdapterStore.open(Path(root), read_base_info(base))
        digests = [
            store.add(name, HERE / "adapters" / name).record.digest for name in sorted(TASKS)
        ]
        with closing(FactorCache(store.load, budget_bytes=FACTOR_CACHE_BYTES)) as cache:
            llms = {
                "fp32" if quantize == "none" else quantize: LLM(
                    base,
                    EngineConfig(
                        device="cpu",
                        dtype="float32",
                        quantize=quantize,
                        kv_cache_bytes=KV_CACHE_BYTES,
                        enable_prefix_caching=False,
                    ),
                    factor_source=cache,
                )
                for quantize in ("none", *options.quantize)
            }
            print(table(llms, digests, options.rounds))


if __name__ == "__main__":
    main()
