"""What rounding the base does to answers: `python -m deploy.quality` (four minutes on two cores).

Runs the engine in fp32 and in each way that `--quantize` names, on the same tokens, and prints a
table. The text is Python's own language reference, which every Python ships (`pydoc_data.topics`);
the held-out messages are the demo adapters' (`deploy/demo/README.md`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from adapters import AdapterStore, FactorCache
from core import LLM, EngineConfig, SamplingParams, read_base_info
from core.perplexity import perplexity, read_tokens, spread_windows
from deploy.demo.evaluate import HERE, MAX_TOKENS
from deploy.demo.tasks import TASKS
from serving.default_base import ensure_default_base

WINDOW = 512
PROMPT, NUM_GREEDY = 128, 64  # tokens given, tokens completed
FACTOR_CACHE_BYTES = 1 << 29


@dataclass(frozen=True)
class Quality:
    """What one engine makes of the text and of the held-out messages.

    logprobs    of each token of each window but the first
    best        the most probable token at each of those places
    completed   greedy tokens after the beginning of each window
    accuracies  by task, of the base with that task's adapter
    """

    base_bytes: int
    logprobs: list[float]
    best: list[int]
    completed: list[list[int]]
    accuracies: dict[str, float]

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return perplexity(self.logprobs)


def windows_of_text(llm: LLM, count: int) -> list[list[int]]:
    """`count` windows of WINDOW tokens, spread evenly over the text."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = llm.tokenizer(text, verbose=False).input_ids
    return spread_windows(tokens, count, WINDOW)


def measure(llm: LLM, windows: Sequence[list[int]], digests: Mapping[str, str]) -> Quality:
    """Everything about one engine."""
    read = read_tokens(llm, windows)
    greedy = SamplingParams(temperature=0, max_tokens=NUM_GREEDY, ignore_eos=True)
    done = llm.generate([window[:PROMPT] for window in windows], greedy)
    return Quality(
        llm.engine.stats().base_bytes,
        [place.logprob for place in read],
        [next(iter(place.top)) for place in read],
        [completion.token_ids for completion in done],
        {name: accuracy(llm, name, digest) for name, digest in digests.items()},
    )


def accuracy(llm: LLM, task_name: str, digest: str) -> float:
    """Share of the task's held-out messages that the adapter answers rightly."""
    lines = (HERE / "heldout" / f"{task_name}.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    done = llm.generate([example["prompt"] for example in examples], greedy, adapters=digest)
    same = TASKS[task_name].same
    right = [
        same(example["expected"], completion.text.strip())
        for example, completion in zip(examples, done, strict=True)
    ]
    return sum(right) / len(right)


def table(plain: Quality, others: Mapping[str, Quality]) -> str:
    """Markdown; agreement is with `plain`."""
    every = [plain, *others.values()]
    rows = [
        ["", "fp32", *others],
        ["---"] * (1 + len(every)),
        ["bytes of the base", *(f"{each.base_bytes / 1e6:.0f} MB" for each in every)],
        [
            f"perplexity, {len(plain.best):,} tokens",
            *(f"{each.perplexity:.3f}" for each in every),
        ],
        ["same most probable token", "", *(f"{agreement(plain, o):.1%}" for o in every[1:])],
        [
            f"greedy tokens before the first other one, of {NUM_GREEDY}",
            "",
            *(f"{mean_prefix(plain, other):.1f}" for other in every[1:]),
        ],
        *(
            [f"`{name}`, held out", *(f"{each.accuracies[name]:.1%}" for each in every)]
            for name in plain.accuracies
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def agreement(plain: Quality, other: Quality) -> float:
    """Share of places where the most probable token is the same."""
    return sum(a == b for a, b in zip(plain.best, other.best, strict=True)) / len(plain.best)


def mean_prefix(plain: Quality, other: Quality) -> float:
    """Greedy tokens that are the same before the first that is not, on average."""
    pairs = list(zip(plain.completed, other.completed, strict=True))
    return sum(num_equal(a, b) for a, b in pairs) / len(pairs)


def num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning of two equally long sequences."""
    pairs = enumerate(zip(first, second, strict=True))
    return next((place for place, (a, b) in pairs if a != b), len(first))


def main() -> None:
    """Measure the engines, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="a local copy of the default base")
    parser.add_argument("--quantize", nargs="+", default=["int8", "int8-weights"])
    parser.add_argument("--windows", type=int, default=64, help=f"of {WINDOW} tokens each")
    options = parser.parse_args()
    base = options.base or ensure_default_base()
    with tempfile.TemporaryDirectory(prefix="vbserve-quality-") as root:
        store = AdapterStore.open(Path(root), read_base_info(base))
        digests = {
            name: store.add(name, HERE / "adapters" / name).record.digest for name in sorted(TASKS)
        }
        found = {}
        for quantize in ("none", *options.quantize):
            config = EngineConfig(device="cpu", dtype="float32", quantize=quantize)
            with closing(FactorCache(store.load, budget_bytes=FACTOR_CACHE_BYTES)) as cache:
                llm = LLM(base, config, factor_source=cache)
                found[quantize] = measure(llm, windows_of_text(llm, options.windows), digests)
            del llm
    print(f"Python {sys.version.split()[0]}, {base.name}\n")
    print(table(found.pop("none"), found))


if __name__ == "__main__":
    main()
