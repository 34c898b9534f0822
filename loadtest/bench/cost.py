"""How the cost of a decode step grows: with sequences, with their context, with the rank.

Measured on the bare engine in a process of its own, all points in turns. Each sequence has an
adapter of its own, or none has one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from loadtest.bench.inputs import Inputs
from loadtest.bench.limit import MachineSpeed, read_shape, step_seconds
from loadtest.bench.machine import measured_load
from loadtest.bench.plan import BenchRequest, BenchSizes, TokenIds
from loadtest.bench.processes import ScriptPeer
from loadtest.bench.sampled_exactness import (
    Sample,
    SampledExactness,
    judge_sample,
    write_variants,
)
from loadtest.bench.variants import Variants

_SLACK_TOKENS = 128  # of KV cache for each sequence, beside its prompt
_NUM_JUDGED = 2  # answers of a point and round


@dataclass(frozen=True)
class CostSizes:
    """`num_sequences`, `context` and the bench's rank hold where they are not what varies."""

    sequences: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    num_sequences: int = 8
    context: int = 128
    num_steps: int = 16


COST_SHORT = CostSizes((1, 4), (32, 64), (2, 4), num_sequences=2, context=32, num_steps=3)


@dataclass(frozen=True)
class Point:
    """One state of the engine. `rank` is None where no sequence has an adapter."""

    num_sequences: int
    context: int
    rank: int | None


@dataclass
class CostResult:
    """Seconds of a decode step by point, one median per round; `limits` as in limit.py."""

    sizes: CostSizes
    rank: int
    seconds: dict[Point, list[float]]
    limits: dict[Point, float]
    speed: MachineSpeed
    foreign_cores: list[float] = field(default_factory=list)
    exactness: SampledExactness | None = None

    def at(self, num_sequences: int, context: int, rank: int | None) -> float:
        """The median over the rounds."""
        return median(self.seconds[Point(num_sequences, context, rank)])


def points_of(sizes: CostSizes, rank: int) -> list[Point]:
    """Every point once: both curves by sequences and by contexts, one by ranks."""
    found = [Point(num, sizes.context, r) for num in sizes.sequences for r in (None, rank)]
    found += [Point(sizes.num_sequences, c, r) for c in sizes.contexts for r in (None, rank)]
    found += [Point(sizes.num_sequences, sizes.context, r) for r in (None, *sizes.ranks)]
    return list(dict.fromkeys(found))


class CostBench:
    """One run; all that it starts ends with `stack`."""

    def __init__(
        self,
        stack: ExitStack,
        inputs: Inputs,
        bench_sizes: BenchSizes,
        sizes: CostSizes,
        *,
        threads: int | None,
        out: Path,
        say: Callable[[str], None],
    ) -> None:
        self._inputs, self._bench_sizes, self._sizes, self._say = inputs, bench_sizes, sizes, say
        self._points = points_of(sizes, bench_sizes.rank)
        self._tokens = tuple(token for prompt in inputs.prompts for token in prompt)
        self._sample = Sample(_NUM_JUDGED, bench_sizes.seed)
        self._out = out
        self._vblora = Path(tempfile.mkdtemp(prefix="vbserve-cost-", dir=out))
        stack.callback(shutil.rmtree, self._vblora, ignore_errors=True)
        self._numbers = self._collect_adapters()
        say("starting the engine")
        load = [number for numbers in self._numbers.values() for number in numbers]
        arguments = [inputs.base, self._vblora, "--load", load, "--kv-tokens", self._kv_tokens()]
        arguments += ["--threads", threads] if threads else []
        self._engine = stack.enter_context(
            ScriptPeer("cost_peer.py", arguments, out / "cost_peer.log")
        )

    def run(self, num_rounds: int, speed: MachineSpeed) -> CostResult:
        """Measure all points in each round. Raises BenchError."""
        limits = {point: self._limit(point, speed) for point in self._points}
        rank, seconds = self._bench_sizes.rank, {point: list[float]() for point in self._points}
        result = CostResult(self._sizes, rank, seconds, limits, speed)
        for number in range(num_rounds):
            for point in self._points[:: -1 if number % 2 else 1]:
                result.seconds[point].append(self._measure(point, result))
            self._say(f"round {number + 1} of {num_rounds}")
        self._say(f"judging {len(self._sample.outputs)} of {self._sample.num_answers} answers")
        log = self._out / "judge_peer.log"
        result.exactness = judge_sample(self._sample, self._inputs.base, self._vblora, log)
        return result

    def _collect_adapters(self) -> dict[int, list[int]]:
        """Numbers by rank: the bench's own adapters, and variants of one in each other rank."""
        own, sizes = self._bench_sizes, self._sizes
        source = (self._inputs.adapters / "vblora").resolve()
        found = {own.rank: list(range(own.num_adapters))}
        for name in (f"{number:03d}" for number in found[own.rank]):
            (self._vblora / name).symlink_to(source / name)
        first = own.num_adapters
        for rank in (rank for rank in sizes.ranks if rank != own.rank):
            found[rank] = list(range(first, first + sizes.num_sequences))
            variants = Variants(source / "000", shared_bank=False, rank=rank)
            write_variants(variants, found[rank], self._vblora)
            first += sizes.num_sequences
        return found

    def _measure(self, point: Point, result: CostResult) -> float:
        requests = self._requests(point)
        with measured_load() as load:
            answer = self._engine.ask(
                do="decode",
                num_steps=self._sizes.num_steps,
                requests=[asdict(request) for request in requests],
            )
        result.foreign_cores.append(load.foreign_cores or 0.0)
        self._sample.take(requests, answer["token_ids"])
        seconds: list[float] = answer["step_seconds"]
        return median(seconds)

    def _requests(self, point: Point) -> list[BenchRequest]:
        numbers = None if point.rank is None else self._numbers[point.rank]
        return [
            BenchRequest(n, self._prompt(n, point.context), None if numbers is None else numbers[n])
            for n in range(point.num_sequences)
        ]

    def _prompt(self, sequence: int, context: int) -> TokenIds:
        """Text from another place for each sequence; a longer context continues a shorter one."""
        longest = max(*self._sizes.contexts, self._sizes.context)
        stride = (len(self._tokens) - longest) // max(self._sizes.sequences)
        return self._tokens[sequence * stride : sequence * stride + context]

    def _kv_tokens(self) -> int:
        """Enough to keep every prompt."""
        longest: dict[tuple[int, int | None], int] = {}
        for point in self._points:
            for sequence in range(point.num_sequences):
                key = sequence, point.rank
                longest[key] = max(longest.get(key, 0), point.context + _SLACK_TOKENS)
        return sum(longest.values())

    def _limit(self, point: Point, speed: MachineSpeed) -> float:
        """Of the base's step; an adapter's own arithmetic and reads are not counted."""
        shape, middle = read_shape(self._inputs.base), point.context + self._sizes.num_steps // 2
        return step_seconds(shape, speed, point.num_sequences, 1, middle)
