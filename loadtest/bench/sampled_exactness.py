"""Exactness where judging every answer would take longer than measuring: a sample of each wave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from loadtest.bench.exactness import Judge, Output
from loadtest.bench.plan import BenchRequest
from loadtest.bench.processes import ScriptPeer
from loadtest.bench.variants import Variants
from loadtest.errors import BenchError


class Sample:
    """Answers to judge: up to `per_wave` of each wave, of as many adapters as it has."""

    def __init__(self, per_wave: int, seed: int) -> None:
        self._per_wave, self._rng = per_wave, Random(f"{seed} sample")
        self.num_answers = 0
        self.outputs: list[Output] = []

    @property
    def adapters(self) -> list[int]:
        """Numbers of the adapters whose answers were taken."""
        numbers = {output.request.adapter for output in self.outputs}
        return sorted(number for number in numbers if number is not None)

    def take(self, requests: Sequence[BenchRequest], answers: Sequence[Sequence[int]]) -> None:
        """Choose among a wave's answers, which stand in the order of its requests."""
        self.num_answers += len(requests)
        for place in self._chosen(requests):
            self.outputs.append(Output(requests[place], tuple(answers[place])))

    def _chosen(self, requests: Sequence[BenchRequest]) -> list[int]:
        first, again, seen = list[int](), list[int](), set[int | None]()
        for place in self._rng.sample(range(len(requests)), len(requests)):
            adapter = requests[place].adapter
            (again if adapter in seen else first).append(place)
            seen.add(adapter)
        return [*first, *again][: self._per_wave]


@dataclass(frozen=True)
class SampledExactness:
    """How many answers were given, judged, equal to PEFT's, and undecided by PEFT itself."""

    num_answers: int
    num_judged: int
    num_equal: int
    num_ties: int
    num_adapters: int

    @property
    def share(self) -> float | None:
        """Of the decided ones; None without any."""
        decided = self.num_judged - self.num_ties
        return self.num_equal / decided if decided else None

    def words(self) -> str:
        """For a page."""
        share = "-" if self.share is None else f"{self.share:.3f}"
        ties = f", {self.num_ties} ties set aside" if self.num_ties else ""
        return (
            f"{share} of {self.num_judged:,} answers that were judged, over {self.num_adapters:,} "
            f"adapters and the base, of {self.num_answers:,} given{ties}"
        )

    def refuse_inexact(self) -> None:
        """Raise BenchError unless all are equal."""
        if self.share is not None and self.share < 1.0:
            raise BenchError(f"answers differ from PEFT's: exact {self.words()}")


def judge_sample(sample: Sample, base: Path, vblora: Path, log: Path) -> SampledExactness:
    """Judge by PEFT's VB-LoRA directories in `vblora`. Raises BenchError."""
    with ScriptPeer("judge_peer.py", [base, vblora], log) as peer:
        verdicts = Judge(peer, vblora / "verdicts.json", str(base)).judge(sample.outputs)
    return SampledExactness(
        sample.num_answers,
        len(verdicts),
        verdicts.count("equal"),
        verdicts.count("tie"),
        len(sample.adapters),
    )


def write_variants(variants: Variants, numbers: Iterable[int], vblora: Path) -> None:
    """Write variants as PEFT directories, for the judge."""
    for number in numbers:
        folder = vblora / f"{number:03d}"
        folder.mkdir(parents=True)
        for name, content in variants.files(number).items():
            (folder / name).write_bytes(content)
