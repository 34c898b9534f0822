"""Random choices of a workload: lengths in tokens, popularity of adapters, arrival times.

Every function takes its generator, so equal seeds give equal workloads.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from loadtest.errors import InvalidWorkloadError

LENGTHS_SYNTAX = "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MAX]"
POPULARITY_SYNTAX = "uniform or zipf:S with S > 0"


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens: fixed (low = high), uniform, or lognormal when `sigma` is set.

    A lognormal draw has median `median` and is cut to [low, high].
    """

    low: int
    high: int
    median: float = 0.0
    sigma: float | None = None

    def draw(self, rng: Random) -> int:
        """One length, at least 1."""
        if self.sigma is None:
            return rng.randint(self.low, self.high)
        drawn = round(rng.lognormvariate(math.log(self.median), self.sigma))
        return min(max(drawn, self.low), self.high)


PROMPT_LENGTHS = Lengths(128, 128)
OUTPUT_LENGTHS = Lengths(64, 64)


def parse_lengths(text: str) -> Lengths:
    """Parse `LENGTHS_SYNTAX`; raises InvalidWorkloadError."""
    kind, *fields = text.strip().split(":")
    try:
        if not fields:
            lengths = Lengths(int(kind), int(kind))
        elif kind == "uniform" and len(fields) == 2:
            lengths = Lengths(int(fields[0]), int(fields[1]))
        elif kind == "lognormal" and len(fields) in (2, 3):
            median, sigma = float(fields[0]), float(fields[1])
            high = int(fields[2]) if len(fields) == 3 else round(median * 16)
            lengths = Lengths(1, high, median, sigma)
        else:
            raise ValueError(kind)
    except ValueError as error:
        raise InvalidWorkloadError(f"lengths {text!r} are not {LENGTHS_SYNTAX}") from error
    _check_lengths(text, lengths)
    return lengths


def _check_lengths(text: str, lengths: Lengths) -> None:
    if lengths.low < 1 or lengths.high < lengths.low:
        raise InvalidWorkloadError(f"lengths {text!r} must be at least 1 token, and LOW <= HIGH")
    if lengths.sigma is not None and (lengths.sigma <= 0 or lengths.median < 1):
        raise InvalidWorkloadError(f"lengths {text!r} need MEDIAN >= 1 and SIGMA > 0")


@dataclass(frozen=True)
class Popularity:
    """How often each of n items is asked for: the k-th has weight 1 / (k + 1) ** exponent."""

    exponent: float = 0.0

    def picker(self, num_items: int) -> Picker:
        """A picker of numbers in [0, num_items); 0 is the most popular one."""
        if num_items < 1:
            raise InvalidWorkloadError("popularity needs at least one adapter, got none")
        weights = (1.0 / (k + 1) ** self.exponent for k in range(num_items))
        return Picker(tuple(itertools.accumulate(weights)))


@dataclass(frozen=True)
class Picker:
    """Draws numbers by their cumulative weights, in O(log n)."""

    cumulative: tuple[float, ...]

    def pick(self, rng: Random) -> int:
        """One number in [0, n)."""
        point = rng.random() * self.cumulative[-1]
        return min(bisect_right(self.cumulative, point), len(self.cumulative) - 1)


UNIFORM = Popularity(0.0)


def parse_popularity(text: str) -> Popularity:
    """Parse `POPULARITY_SYNTAX`; raises InvalidWorkloadError."""
    kind, _, exponent = text.strip().partition(":")
    if kind == "uniform" and not exponent:
        return UNIFORM
    try:
        popularity = Popularity(float(exponent))
    except ValueError:
        popularity = UNIFORM
    if kind != "zipf" or not popularity.exponent > 0 or math.isinf(popularity.exponent):
        raise InvalidWorkloadError(f"popularity {text!r} is not {POPULARITY_SYNTAX}")
    return popularity


def poisson_arrivals(rate: float, rng: Random) -> Iterator[float]:
    """Endless arrival times in seconds from 0, `rate` a second, with exponential gaps."""
    if not (rate > 0 and math.isfinite(rate)):
        raise InvalidWorkloadError(
            f"rate is {rate}, must be a positive number of requests a second"
        )
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at
