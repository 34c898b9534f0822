"""What is asked of the server, in which order and when: planned requests, endless or from a file.

Knows nothing of HTTP. Each kind of choice has its own random stream, so that changing the lengths
leaves models and arrival times as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import msgspec

from loadtest.distributions import (
    OUTPUT_LENGTHS,
    PROMPT_LENGTHS,
    UNIFORM,
    Lengths,
    Popularity,
    poisson_arrivals,
)
from loadtest.errors import InvalidWorkloadError
from loadtest.prompts import TextPrompts

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to come. `due` is in seconds after the start; None in a closed loop."""

    index: int
    model: str
    prompt: Prompt
    max_tokens: int
    due: float | None = None


@dataclass(frozen=True)
class WorkloadSpec:
    """Everything random of a workload.

    base_share   share of requests, 0 to 1, that go to `base_model`; 1 without adapters
    rate         requests a second of an open loop; None for a closed loop
    """

    base_model: str
    adapters: tuple[str, ...] = ()
    popularity: Popularity = UNIFORM
    base_share: float = 0.0
    prompt_lengths: Lengths = PROMPT_LENGTHS
    output_lengths: Lengths = OUTPUT_LENGTHS
    rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.base_share <= 1:
            raise InvalidWorkloadError(f"base share is {self.base_share}, must be in [0, 1]")


def planned_requests(spec: WorkloadSpec, prompts: TextPrompts) -> Iterator[PlannedRequest]:
    """Endless requests as `spec` says; equal specs and prompts give equal requests."""
    models = _models(spec)
    lengths, texts = Random(f"{spec.seed} lengths"), Random(f"{spec.seed} texts")
    arrivals = _arrivals(spec)
    index = 0
    while True:
        prompt = prompts.cut(spec.prompt_lengths.draw(lengths), texts)
        max_tokens = spec.output_lengths.draw(lengths)
        yield PlannedRequest(index, next(models), prompt, max_tokens, next(arrivals))
        index += 1


def _models(spec: WorkloadSpec) -> Iterator[str]:
    rng = Random(f"{spec.seed} models")
    ranked = list(spec.adapters)
    rng.shuffle(ranked)  # popularity is not tied to names
    picker = spec.popularity.picker(len(ranked)) if ranked else None
    while True:
        to_base = rng.random() < spec.base_share
        yield spec.base_model if picker is None or to_base else ranked[picker.pick(rng)]


def _arrivals(spec: WorkloadSpec) -> Iterator[float | None]:
    if spec.rate is not None:
        yield from poisson_arrivals(spec.rate, Random(f"{spec.seed} arrivals"))
    while True:
        yield None


class _FileRequest(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    prompt: str | list[int]
    max_tokens: int
    at: float | None = None


def read_workload_file(path: Path) -> list[PlannedRequest]:
    """Read a JSON list of {"model", "prompt" (text or token ids), "max_tokens", "at" (seconds)}.

    `at` stands in all of them (an open loop) or in none. Raises InvalidWorkloadError.
    """
    try:
        rows = msgspec.json.decode(path.read_bytes(), type=list[_FileRequest])
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidWorkloadError(f"workload file {path}: {error}") from error
    if not rows:
        raise InvalidWorkloadError(f"workload file {path} holds no request")
    if len({row.at is None for row in rows}) > 1:
        raise InvalidWorkloadError(
            f'workload file {path}: "at" must stand in all requests or in none'
        )
    rows.sort(key=lambda row: row.at or 0.0)
    return [
        PlannedRequest(index, row.model, _prompt(row.prompt), row.max_tokens, row.at)
        for index, row in enumerate(rows)
    ]


def _prompt(prompt: str | Sequence[int]) -> Prompt:
    return prompt if isinstance(prompt, str) else tuple(prompt)
