"""Thousands of adapters in one server: what each costs, and what they cost those that run.

Two servers take turns: one without any adapter, one with all of them. Adapters are made while they
are uploaded, so their number is not bounded by a disk full of PEFT files.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

from loadtest.bench.contestants import HttpContestant
from loadtest.bench.inputs import Inputs
from loadtest.bench.machine import measured_load
from loadtest.bench.plan import BenchRequest, BenchSizes, TokenIds, Wave
from loadtest.bench.sampled_exactness import (
    Sample,
    SampledExactness,
    judge_sample,
    write_variants,
)
from loadtest.bench.server import VbserveServer, adapter_id, upload_body
from loadtest.bench.variants import Variants
from loadtest.distributions import Popularity
from loadtest.errors import BenchError
from loadtest.stats import Distribution, distribution

_NONE_WORKLOADS = frozenset[str]()


@dataclass(frozen=True)
class ScaleSizes:
    """How much of everything, beside the sizes of the workloads.

    num_few        adapters of the workload that all are compared with
    num_ends       registrations at either end, and while streams run
    long_tokens    output of the streams that run while adapters are registered
    num_judged     answers of each wave that are compared with PEFT's
    beside_empty   whether there is a server without adapters, else the full one stands in for it
    """

    num_adapters: int = 10_000
    num_few: int = 64
    num_ends: int = 100
    long_tokens: int = 256
    num_judged: int = 8
    beside_empty: bool = True


SCALE_SHORT = ScaleSizes(
    num_adapters=8, num_few=3, num_ends=3, long_tokens=24, num_judged=3, beside_empty=False
)


@dataclass
class ScaleResult:
    """Figures of one run; rates are output tokens a second, one per round.

    registration      seconds of POST /v1/adapters: the first, the last, and those under load
    pss, store        bytes that `num_adapters` adapters added to the server's memory, to its disk
    lora_bytes        one adapter's expanded factors: what LoRA of the same rank takes in fp32
    base_without, base_with   the base alone: a server without adapters, this one with all
    zipf_few, zipf_all        adapters by Zipf's law, over `num_few` and over all
    quiet, registering        running streams of the base, without and beside registrations
    exactness                 of a sample of all answers, once judged
    """

    num_adapters: int
    num_few: int
    num_clients: int
    shared_bank: bool
    first_registrations: Distribution
    last_registrations: Distribution
    registrations_under_load: Distribution
    pss_bytes: int | None
    store_bytes: int
    lora_bytes: int
    base_without: list[float] = field(default_factory=list)
    base_with: list[float] = field(default_factory=list)
    zipf_few: list[float] = field(default_factory=list)
    zipf_all: list[float] = field(default_factory=list)
    quiet: list[float] = field(default_factory=list)
    registering: list[float] = field(default_factory=list)
    foreign_cores: list[float] = field(default_factory=list)
    exactness: SampledExactness | None = None

    def ratio(self, ours: Sequence[float], other: Sequence[float]) -> float:
        """The median over the rounds of the ratio within a round."""
        return median(a / b for a, b in zip(ours, other, strict=True))


class ScaleBench:
    """One run; all that it starts ends with `stack`."""

    def __init__(
        self,
        stack: ExitStack,
        inputs: Inputs,
        sizes: BenchSizes,
        scale: ScaleSizes,
        *,
        shared_bank: bool,
        out: Path,
        say: Callable[[str], None],
    ) -> None:
        if scale.num_adapters < 2 * scale.num_ends:
            least = 2 * scale.num_ends
            raise BenchError(f"{scale.num_adapters} adapters are too few, at least {least}")
        self._stack, self._sizes, self._scale, self._say = stack, sizes, scale, say
        self._num, self._shared_bank = scale.num_adapters, shared_bank
        self._base = inputs.base
        self._variants = Variants(inputs.adapters / "vblora" / "000", shared_bank=shared_bank)
        self._prompts = iter(enumerate(inputs.prompts))
        self._rng = Random(f"{sizes.seed} scale")
        self._sample = Sample(scale.num_judged, sizes.seed)
        self._out, self._log = out, out / "scale-server.log"
        self._log.unlink(missing_ok=True)
        self._root = Path(tempfile.mkdtemp(prefix="vbserve-scale-", dir=out))
        stack.callback(shutil.rmtree, self._root, ignore_errors=True)
        self._full = self._server("full")
        self._empty = self._server("empty") if scale.beside_empty else self._full
        self._loads: list[float] = []
        self._next_new = self._num

    def run(self, num_rounds: int) -> ScaleResult:
        """Register, then measure `num_rounds` rounds. Raises BenchError."""
        for server in (self._empty, self._full):
            self._rate(server, self._wave([None] * self._sizes.num_clients))
        result = self._register_all()
        for number in range(num_rounds):
            self._round(result, number)
            self._say(f"round {number + 1} of {num_rounds}")
        result.foreign_cores = self._loads
        result.exactness = self._judge()
        return result

    def _server(self, name: str) -> VbserveServer:
        self._say(f"starting the {name} server")
        return self._stack.enter_context(VbserveServer(self._base, self._root / name, self._log))

    def _judge(self) -> SampledExactness:
        self._say(f"judging {len(self._sample.outputs)} of {self._sample.num_answers} answers")
        vblora = self._root / "judged"
        vblora.mkdir()
        write_variants(self._variants, self._sample.adapters, vblora)
        return judge_sample(self._sample, self._base, vblora, self._out / "judge_peer.log")

    def _register_all(self) -> ScaleResult:
        before = self._full.pss_bytes()
        self._say(f"registering {self._num} adapters")
        seconds = self._full.upload(self._uploads(range(self._num)))
        after = self._full.pss_bytes()
        return ScaleResult(
            self._num,
            self._scale.num_few,
            self._sizes.num_clients,
            self._shared_bank,
            distribution(seconds[: self._scale.num_ends]),
            distribution(seconds[-self._scale.num_ends :]),
            distribution(self._register_beside_streams()[1]),
            None if before is None or after is None else after - before,
            sum(file.stat().st_size for file in (self._root / "full").rglob("*") if file.is_file()),
            self._full.adapter(adapter_id(0))["factor_bytes"],
        )

    def _uploads(self, numbers: Sequence[int]) -> Iterator[bytes]:
        uploads = self._variants.uploads([(n, adapter_id(n)) for n in numbers])
        return (upload_body(*upload) for upload in uploads)

    def _round(self, result: ScaleResult, number: int) -> None:
        base = self._wave([None] * self._sizes.num_closed)
        few, everyone = (self._wave(self._popular(num)) for num in (self._scale.num_few, self._num))
        turns: list[Callable[[], None]] = [
            lambda: result.base_without.append(self._rate(self._empty, base)),
            lambda: result.base_with.append(self._rate(self._full, base)),
            lambda: result.zipf_few.append(self._rate(self._full, few)),
            lambda: result.zipf_all.append(self._rate(self._full, everyone)),
            lambda: result.quiet.append(
                self._rate(self._full, self._streams(), self._scale.long_tokens)
            ),
            lambda: result.registering.append(self._register_beside_streams()[0]),
        ]
        for turn in turns[:: -1 if number % 2 else 1]:
            turn()

    def _register_beside_streams(self) -> tuple[float, list[float]]:
        """Rate of running streams while adapters are registered, and the registrations' seconds."""
        seconds: list[float] = []
        num = self._scale.num_ends
        first, self._next_new = self._next_new, self._next_new + num
        new = list(self._uploads(range(first, first + num)))  # made before the clock runs
        registrar = threading.Thread(target=lambda: seconds.extend(self._full.upload(new)))
        registrar.start()
        rate = self._rate(self._full, self._streams(), self._scale.long_tokens)
        registrar.join()
        if len(seconds) != num:
            raise BenchError("adapters could not be registered beside running streams")
        return rate, seconds

    def _streams(self) -> Wave:
        return self._wave([None] * self._sizes.num_clients)

    def _popular(self, num: int) -> list[int | None]:
        picker = Popularity(self._sizes.zipf).picker(num)
        return [picker.pick(self._rng) for _ in range(self._sizes.num_closed)]

    def _wave(self, adapters: Sequence[int | None]) -> Wave:
        return Wave(
            "scale",
            self._sizes.num_clients,
            tuple(BenchRequest(*self._next_prompt(), adapter) for adapter in adapters),
        )

    def _next_prompt(self) -> tuple[int, TokenIds]:
        prompt = next(self._prompts, None)
        if prompt is None:
            raise BenchError("the prompts do not suffice for so many rounds: ask for fewer")
        return prompt

    def _rate(self, server: VbserveServer, wave: Wave, max_tokens: int | None = None) -> float:
        contestant = HttpContestant("scale", _NONE_WORKLOADS, server.url)
        with measured_load() as load:
            result = contestant.run(wave, max_tokens or self._sizes.max_tokens)
        self._loads.append(load.foreign_cores or 0.0)
        self._sample.take(wave.requests, [record.token_ids for record in result.records])
        return sum(record.num_tokens for record in result.records) / result.wall_seconds
