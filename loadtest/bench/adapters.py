"""How speed goes with the number of adapters that requests are spread over, in one server.

All adapters are registered first, in steps, which gives their memory. Then waves take turns: the
same prompts, spread over none of them (the base), one, four, … of them. Each wave turns the
prompts by another number of tokens, so that no prefix is found again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

from loadtest.bench.contestants import HttpContestant, WaveResult
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

COUNTS = (0, 1, 4, 16, 64, 1_000, 10_000)
SHORT_COUNTS = (0, 1, 4)
_NUM_JUDGED = 6  # answers of a wave


@dataclass
class CountFigures:
    """Requests over the first `num_adapters` adapters; 0 is the base.

    pss_bytes   what registering that many added to the server's memory
    rates       output tokens a second, one per round
    ttft        seconds to the first token, of all requests of all rounds
    """

    num_adapters: int
    pss_bytes: int | None
    rates: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)


@dataclass
class AdaptersResult:
    """All figures; `factor_bytes` is what one adapter takes while it is used, as LoRA would."""

    counts: list[CountFigures]
    num_clients: int
    num_requests: int
    prompt_tokens: int
    max_tokens: int
    popularity: str
    factor_bytes: int
    pss_end_bytes: int | None = None
    foreign_cores: list[float] = field(default_factory=list)
    exactness: SampledExactness | None = None

    def share(self, figures: CountFigures) -> float:
        """Throughput by that of the base: the median of the rounds' ratios."""
        pairs = zip(figures.rates, self.counts[0].rates, strict=True)
        return median(own / base for own, base in pairs)


class AdaptersBench:
    """One run; all that it starts ends with `stack`. `counts` begin with 0 and rise."""

    def __init__(
        self,
        stack: ExitStack,
        inputs: Inputs,
        sizes: BenchSizes,
        counts: Sequence[int],
        *,
        popularity: tuple[str, Popularity],
        out: Path,
        say: Callable[[str], None],
    ) -> None:
        self._inputs, self._sizes, self._counts, self._say = inputs, sizes, counts, say
        self._popularity_name, popularity_law = popularity
        self._pickers = {num: popularity_law.picker(num) for num in counts if num}
        self._rng = Random(f"{sizes.seed} counts")
        self._variants = Variants(inputs.adapters / "vblora" / "000", shared_bank=False)
        self._sample = Sample(_NUM_JUDGED, sizes.seed)
        self._judge_log = out / "judge_peer.log"
        log = out / "adapters-server.log"
        log.unlink(missing_ok=True)
        self._root = Path(tempfile.mkdtemp(prefix="vbserve-adapters-", dir=out))
        stack.callback(shutil.rmtree, self._root, ignore_errors=True)
        say("starting the server")
        self._server = stack.enter_context(VbserveServer(inputs.base, self._root / "store", log))

    def run(self, num_rounds: int) -> AdaptersResult:
        """Register, then measure `num_rounds` rounds, then judge. Raises BenchError."""
        result = self._registered()
        for number in range(num_rounds):
            for place in turns_of(len(self._counts), number):
                self._measure(result, number, place)
            self._say(f"round {number + 1} of {num_rounds}")
        result.pss_end_bytes = self._server.pss_bytes()
        result.exactness = self._judge()
        return result

    def _registered(self) -> AdaptersResult:
        """Memory after each step; some more adapters come first, with what only the first cost."""
        sizes, extra = self._sizes, self._counts[-1]
        self._register(range(extra, extra + sizes.num_clients))
        self._warm_up(extra)
        before, figures, done = self._server.pss_bytes(), [], 0
        for num in self._counts:
            self._say(f"registering up to {num}")
            self._register(range(done, num))
            done, now = num, self._server.pss_bytes()
            added = None if now is None or before is None else now - before
            figures.append(CountFigures(num, added))
        self._warm_up(None)  # what registering left behind is done meanwhile
        return AdaptersResult(
            figures,
            sizes.num_clients,
            sizes.num_closed,
            sizes.prompt_tokens,
            sizes.max_tokens,
            self._popularity_name,
            self._server.adapter(adapter_id(extra))["factor_bytes"],
        )

    def _warm_up(self, adapter: int | None) -> None:
        num = self._sizes.num_clients
        self._run(_wave(self._prompts(0)[:num], [adapter] * num, num))

    def _register(self, numbers: Sequence[int]) -> None:
        uploads = self._variants.uploads([(n, adapter_id(n)) for n in numbers])
        self._server.upload(upload_body(*upload) for upload in uploads)

    def _measure(self, result: AdaptersResult, number: int, place: int) -> None:
        figures, sizes = result.counts[place], self._sizes
        prompts = [_turned(prompt, place + 1) for prompt in self._prompts(number)]
        adapters = [self._pick(figures.num_adapters) for _ in prompts]
        wave = _wave(prompts, adapters, sizes.num_clients)
        with measured_load() as load:
            answers = self._run(wave)
        self._sample.take(wave.requests, [record.token_ids for record in answers.records])
        num_tokens = sum(record.num_tokens for record in answers.records)
        figures.rates.append(num_tokens / answers.wall_seconds)
        figures.ttft += [record.ttft for record in answers.records]
        result.foreign_cores.append(load.foreign_cores or 0.0)

    def _pick(self, num: int) -> int | None:
        return self._pickers[num].pick(self._rng) if num else None

    def _prompts(self, number: int) -> Sequence[TokenIds]:
        first = number * self._sizes.num_closed
        prompts = self._inputs.prompts[first : first + self._sizes.num_closed]
        if len(prompts) < self._sizes.num_closed:
            raise BenchError("the prompts do not suffice for so many rounds: ask for fewer")
        return prompts

    def _run(self, wave: Wave) -> WaveResult:
        contestant = HttpContestant("adapters", frozenset(), self._server.url)
        return contestant.run(wave, self._sizes.max_tokens)

    def _judge(self) -> SampledExactness:
        self._say(f"judging {len(self._sample.outputs)} of {self._sample.num_answers} answers")
        vblora = self._root / "judged"
        vblora.mkdir()
        write_variants(self._variants, self._sample.adapters, vblora)
        return judge_sample(self._sample, self._inputs.base, vblora, self._judge_log)


def turns_of(num: int, number: int) -> list[int]:
    """Forwards, backwards, then both from the middle on: none is always first or after the same."""
    shift = number // 2 * (num // 2)
    turned = [(place + shift) % num for place in range(num)]
    return turned[:: -1 if number % 2 else 1]


def _turned(prompt: TokenIds, num_tokens: int) -> TokenIds:
    """The same tokens with another beginning."""
    return (*prompt[num_tokens:], *prompt[:num_tokens])


def _wave(prompts: Sequence[TokenIds], adapters: Sequence[int | None], num_clients: int) -> Wave:
    pairs = enumerate(zip(prompts, adapters, strict=True))
    requests = tuple(BenchRequest(index, *pair) for index, pair in pairs)
    return Wave("adapters", num_clients, requests)
