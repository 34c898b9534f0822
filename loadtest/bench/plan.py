"""What is measured: sizes, workloads, and which request goes into which wave. Pure values.

All prompts of a run differ between rounds, so that no prefix cache can help anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from loadtest.distributions import Popularity
from loadtest.errors import BenchError

TokenIds = tuple[int, ...]

WORKLOADS = {
    "W1": "one client, base",
    "W1a": "one client, adapters in turn",
    "W2": "all clients at once, base",
    "W3": "the prompts of W2, each with an adapter of its own",
    "W4b": "closed loop, base",
    "W4": "the prompts of W4b, adapters by Zipf's law",
}


@dataclass(frozen=True)
class BenchSizes:
    """How much of everything. Adapters have these sizes of VB-LoRA on all linear layers."""

    num_adapters: int = 64
    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 64
    topk: int = 2
    prompt_tokens: int = 128
    max_tokens: int = 64
    num_clients: int = 16
    num_single: int = 3
    num_closed: int = 64
    zipf: float = 1.0
    num_cold: int = 8
    restart: bool = True
    seed: int = 1


FULL = BenchSizes()
SHORT = BenchSizes(
    num_adapters=6,
    num_vectors=32,
    vector_length=16,
    prompt_tokens=24,
    max_tokens=12,
    num_clients=4,
    num_single=2,
    num_closed=8,
    num_cold=2,
    restart=False,
)


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request; `adapter` is its number, None for the base."""

    index: int
    prompt: TokenIds
    adapter: int | None


@dataclass(frozen=True)
class Wave:
    """Requests that `num_clients` clients work off in a closed loop, in this order."""

    workload: str
    num_clients: int
    requests: tuple[BenchRequest, ...]


@dataclass(frozen=True)
class Plan:
    """All waves: a warm-up, pairs of requests for cold adapters, and rounds of one wave each."""

    sizes: BenchSizes
    warmup: Wave
    cold: tuple[tuple[BenchRequest, BenchRequest], ...]
    rounds: tuple[tuple[Wave, ...], ...]

    @property
    def workloads(self) -> list[str]:
        """Names of the waves of a round."""
        return [wave.workload for wave in self.rounds[0]]

    @property
    def adapters_used(self) -> list[int]:
        """Numbers of the adapters that the rounds ask for."""
        used = {r.adapter for waves in self.rounds for wave in waves for r in wave.requests}
        return sorted(number for number in used if number is not None)


def make_plan(
    prompts: Sequence[TokenIds], sizes: BenchSizes, num_rounds: int, workloads: Sequence[str]
) -> Plan:
    """Deal prompts to waves. Raises BenchError for unknown workloads or too few prompts."""
    unknown = [name for name in workloads if name not in WORKLOADS]
    if unknown or not workloads:
        raise BenchError(f"workloads {unknown} are unknown, there are {', '.join(WORKLOADS)}")
    dealer = _Dealer(iter(enumerate(prompts)), sizes)
    warmup = Wave("warm-up", sizes.num_clients, dealer.deal([None] * sizes.num_clients))
    cold = tuple(dealer.pair(sizes.num_adapters - 1 - n) for n in range(sizes.num_cold))
    rounds = tuple(_round(dealer, workloads) for _ in range(num_rounds))
    return Plan(sizes, warmup, cold, rounds)


class _Dealer:
    """Hands out prompts, each once, and adapters by popularity."""

    def __init__(self, prompts: Iterator[tuple[int, TokenIds]], sizes: BenchSizes) -> None:
        self.sizes, self._prompts = sizes, prompts
        self._rng = Random(f"{sizes.seed} adapters")
        self._ranked = list(range(sizes.num_adapters))
        self._rng.shuffle(self._ranked)  # popularity is not tied to numbers
        self._picker = Popularity(sizes.zipf).picker(sizes.num_adapters)

    def deal(self, adapters: Sequence[int | None]) -> tuple[BenchRequest, ...]:
        """One request with a fresh prompt per adapter."""
        dealt = list(islice(self._prompts, len(adapters)))
        if len(dealt) < len(adapters):
            raise BenchError("the prompts do not suffice for so many rounds: ask for fewer")
        pairs = zip(dealt, adapters, strict=True)
        return tuple(BenchRequest(index, prompt, adapter) for (index, prompt), adapter in pairs)

    def pair(self, adapter: int) -> tuple[BenchRequest, BenchRequest]:
        """Two requests for one adapter."""
        first, second = self.deal([adapter, adapter])
        return first, second

    def popular(self, num: int) -> list[int | None]:
        """Adapters by Zipf's law."""
        return [self._ranked[self._picker.pick(self._rng)] for _ in range(num)]


def _round(dealer: _Dealer, workloads: Sequence[str]) -> tuple[Wave, ...]:
    """The wanted waves of one round; all are made, so that leaving one out changes no other."""
    sizes = dealer.sizes
    num, clients = sizes.num_adapters, sizes.num_clients
    at_once = dealer.deal([None] * clients)
    closed = dealer.deal(dealer.popular(sizes.num_closed))
    waves = (
        Wave("W1", 1, dealer.deal([None] * sizes.num_single)),
        Wave("W1a", 1, dealer.deal([n % num for n in range(sizes.num_single)])),
        Wave("W2", clients, at_once),
        Wave("W3", clients, _with_adapters(at_once, lambda place: place % num)),
        Wave("W4b", clients, _with_adapters(closed, lambda place: None)),
        Wave("W4", clients, closed),
    )
    return tuple(wave for wave in waves if wave.workload in workloads)


def _with_adapters(
    requests: Sequence[BenchRequest], adapter_of: Callable[[int], int | None]
) -> tuple[BenchRequest, ...]:
    return tuple(
        BenchRequest(request.index, request.prompt, adapter_of(place))
        for place, request in enumerate(requests)
    )
