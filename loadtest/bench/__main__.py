"""The bench's command line: prepare, start contestants, take turns, judge, write the report."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import click
import msgspec

from loadtest.bench.charts import write_chart
from loadtest.bench.contestants import (
    OURS_ENGINE,
    PEFT_MIXED,
    PEFT_SINGLE,
    Contestant,
    ScriptContestant,
)
from loadtest.bench.exactness import Judge, Output
from loadtest.bench.inputs import Inputs, default_base, prepare, tiny_base
from loadtest.bench.lifecycle import Lifecycle, open_server
from loadtest.bench.machine import describe_machine, measured_load
from loadtest.bench.markdown import Report, markdown, ratios
from loadtest.bench.plan import FULL, SHORT, WORKLOADS, Plan, Wave, make_plan
from loadtest.bench.processes import ScriptPeer
from loadtest.bench.results import RoundResult, cells_of
from loadtest.bench.server import VbserveServer
from loadtest.errors import BenchError, LoadtestError

_PARTS = ("peft", "engine", "http")
_SHORT_WORKLOADS = ("W2", "W3")


@click.command()
@click.option("--short", is_flag=True, help="Tiny sizes: does it run, and is it exact?")
@click.option("--rounds", type=click.IntRange(min=1), help="[default: 5; short: 1]")
@click.option("--workloads", help=f"Some of {','.join(WORKLOADS)}. [default: all; short: W2,W3]")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(_PARTS),
    help="Measure only this; may be repeated. PEFT judges in any case.",
)
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A Hugging Face folder. [default: the project's default base]",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of each contestant.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="bench-out",
    show_default=True,
)
def main(**options: Any) -> None:
    """Compare this project's server and engine with plain PEFT, and write BENCH.md.

    Fails when something cannot run or an answer of ours is not exact, never on a time.
    """
    signal.signal(signal.SIGTERM, _leave)
    try:
        bench(**options)
    except LoadtestError as error:
        raise click.ClickException(str(error)) from error


def bench(
    *,
    short: bool,
    rounds: int | None,
    workloads: str | None,
    parts: Sequence[str],
    base: Path | None,
    threads: int | None,
    out: Path,
) -> None:
    """Run the bench with the command's options. Raises LoadtestError."""
    sizes = SHORT if short else FULL
    names = workloads.split(",") if workloads else _SHORT_WORKLOADS if short else tuple(WORKLOADS)
    num_rounds = rounds or (1 if short else 5)
    cache = out / "cache"
    _say("preparing base, adapters and prompts")
    inputs = prepare(base or (tiny_base(cache) if short else default_base()), sizes, cache)
    plan = make_plan(inputs.prompts, sizes, num_rounds, names)
    with ExitStack() as stack:
        bench_run = _Bench(stack, plan, inputs, out, threads)
        contestants = bench_run.start(parts or _PARTS)
        results = _take_turns(contestants, plan)
        results = bench_run.judged(results)
        bench_run.note_memory()
    report = Report(
        conditions={
            "date": datetime.now(UTC).date().isoformat(),
            **describe_machine(),
            "threads": bench_run.peft.ready["threads"],
            "versions": {**bench_run.peft.ready["versions"], "vbserve": version("vbserve")},
        },
        sizes=sizes,
        num_rounds=num_rounds,
        cells=cells_of(results),
        rounds=results,
        lifecycle=bench_run.lifecycle,
    )
    _write(out, report)
    _refuse_inexact(report)


class _Bench:
    """What runs during a bench; all of it ends with `stack`."""

    def __init__(
        self, stack: ExitStack, plan: Plan, inputs: Inputs, out: Path, threads: int | None
    ) -> None:
        self._stack, self._plan, self._inputs, self._out = stack, plan, inputs, out
        self._threads = threads
        self._server: VbserveServer | None = None
        self.lifecycle: Lifecycle | None = None

    def start(self, parts: Sequence[str]) -> list[Contestant]:
        """Start and warm the wanted contestants, and the judge."""
        contestants: list[Contestant] = []
        if "http" in parts:  # first, while nothing else takes memory
            _say("starting vbserve, registering adapters")
            contestants.append(self._start_server())
        if "engine" in parts:
            _say("starting the engine alone")
            engine = self._script("engine_peer.py")
            contestants.append(ScriptContestant(OURS_ENGINE, frozenset(WORKLOADS), engine, {}))
        _say("starting PEFT")
        self.peft = self._script("peft_peer.py")
        if "peft" in parts:
            contestants += self._peft_contestants()
        for contestant in contestants:
            contestant.run(self._plan.warmup, self._plan.sizes.max_tokens)
        return contestants

    def _peft_contestants(self) -> list[Contestant]:
        """Batches where there is something to batch; a single stream its own, faster way."""
        batched, single = frozenset(("W2", "W3", "W4b", "W4")), frozenset(("W1", "W1a"))
        return [
            ScriptContestant(PEFT_MIXED, batched, self.peft, {"mode": "mixed"}),
            ScriptContestant(PEFT_SINGLE, single, self.peft, {"mode": "single"}),
        ]

    def _start_server(self) -> Contestant:
        registry = Path(tempfile.mkdtemp(prefix="vbserve-bench-"))
        self._stack.callback(shutil.rmtree, registry, ignore_errors=True)
        log = self._out / "server.log"
        log.unlink(missing_ok=True)
        flags = ["--num-threads", str(self._threads)] if self._threads else []
        contestant, self.lifecycle = open_server(
            self._stack,
            lambda: VbserveServer(self._inputs.base, registry, log, flags),
            self._plan,
            self._inputs.adapters / "vblora",
        )
        self._server = contestant.server
        return contestant

    def _script(self, name: str) -> ScriptPeer:
        load = self._plan.adapters_used or [0]
        arguments = [self._inputs.base, self._inputs.adapters, "--load", load]
        if self._threads:
            arguments += ["--threads", self._threads]
        log = self._out / f"{Path(name).stem}.log"
        return self._stack.enter_context(ScriptPeer(name, arguments, log))

    def judged(self, results: list[RoundResult]) -> list[RoundResult]:
        """The same results with a verdict per request."""
        _say("judging exactness")
        judge = Judge(self.peft, self._out / "cache" / "verdicts.json", self._inputs.context)
        waves = {
            (number, wave.workload): wave
            for number, waves in enumerate(self._plan.rounds)
            for wave in waves
        }
        outputs = [
            [
                Output(request, tuple(record.token_ids))
                for request, record in zip(
                    waves[one.round, one.workload].requests, one.result.records, strict=True
                )
            ]
            for one in results
        ]
        verdicts = iter(judge.judge([output for wave in outputs for output in wave]))
        return [
            replace(one, verdicts=tuple(next(verdicts) for _ in wave))
            for one, wave in zip(results, outputs, strict=True)
        ]

    def note_memory(self) -> None:
        """After everything was used."""
        if self.lifecycle is not None and self._server is not None:
            self.lifecycle.pss_end_bytes = self._server.pss_bytes()


def _take_turns(contestants: Sequence[Contestant], plan: Plan) -> list[RoundResult]:
    """Every wave by every contestant, one after the other; each round begins with another one."""
    turns = (
        (contestant, wave, number)
        for number, waves in enumerate(plan.rounds)
        for wave in waves
        for contestant in _rotated(contestants, number)
        if wave.workload in contestant.workloads
    )
    return [_measure(contestant, wave, number, plan) for contestant, wave, number in turns]


def _rotated(contestants: Sequence[Contestant], number: int) -> list[Contestant]:
    shift = number % len(contestants)
    return [*contestants[shift:], *contestants[:shift]]


def _measure(contestant: Contestant, wave: Wave, number: int, plan: Plan) -> RoundResult:
    with measured_load() as load:
        result = contestant.run(wave, plan.sizes.max_tokens)
    one = RoundResult(contestant.name, wave.workload, number, result, load)
    others = f", others use {load.foreign_cores} cores" if load.foreign_cores else ""
    _say(
        f"round {number + 1} of {len(plan.rounds)}, {wave.workload}, {contestant.name}: "
        f"{one.tokens_per_second:.1f} tok/s{others}"
    )
    return one


def _write(out: Path, report: Report) -> None:
    page = markdown(report)
    (out / "BENCH.md").write_text(page)
    write_chart(out / "bench.png", report)
    rows = [
        {
            "contestant": one.contestant,
            "workload": one.workload,
            "round": one.round,
            "tokens_per_second": one.tokens_per_second,
            "wall_seconds": one.result.wall_seconds,
            "verdicts": one.verdicts,
            "load": one.load,
        }
        for one in report.rounds
    ]
    content = {
        "conditions": report.conditions,
        "sizes": asdict(report.sizes),
        "cells": list(report.cells.values()),
        "ratios": ratios(report.cells),
        "lifecycle": report.lifecycle,
        "rounds": rows,
    }
    encoded = msgspec.json.format(msgspec.json.encode(content), indent=1)
    (out / "bench.json").write_bytes(encoded + b"\n")
    click.echo(page)


def _refuse_inexact(report: Report) -> None:
    """PEFT itself included: where it disagrees with its own judgement, the judge is broken."""
    bad = [
        f"{cell.contestant} on {cell.workload}: {cell.exact:.3f}"
        for cell in report.cells.values()
        if cell.exact is not None and cell.exact < 1.0
    ]
    if bad:
        raise BenchError("answers differ from PEFT's: " + "; ".join(bad))


def _leave(number: int, frame: FrameType | None) -> None:
    """End as an exception does, so that no server or peer is left behind."""
    sys.exit(128 + number)


def _say(message: str) -> None:
    click.echo(message, err=True)


if __name__ == "__main__":
    main()
