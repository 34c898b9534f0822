"""The contestants of one bench as running processes: start, take turns, judge; all end together."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from loadtest.bench.contestants import (
    OURS_ENGINE,
    OURS_HTTP,
    PEFT_MIXED,
    PEFT_SINGLE,
    Contestant,
    ScriptContestant,
    Started,
)
from loadtest.bench.exactness import Judge, Output
from loadtest.bench.inputs import Inputs
from loadtest.bench.lifecycle import Lifecycle, open_server
from loadtest.bench.machine import measured_load
from loadtest.bench.peer_room import PeerRoom
from loadtest.bench.peers import Peer, start_warm
from loadtest.bench.plan import WORKLOADS, Plan, Wave
from loadtest.bench.processes import ScriptPeer
from loadtest.bench.reach import Reach
from loadtest.bench.results import RoundResult
from loadtest.bench.server import VbserveServer

OWN_PARTS = ("peft", "engine", "http")


class Session:
    """What runs during a bench; all of it ends with `stack`."""

    def __init__(
        self,
        stack: ExitStack,
        plan: Plan,
        inputs: Inputs,
        out: Path,
        threads: int | None,
        say: Callable[[str], None],
    ) -> None:
        self._stack, self._plan, self._inputs, self._out = stack, plan, inputs, out
        self._threads, self._say = threads, say
        self._server: VbserveServer | None = None
        self._started: dict[str, Started] = {}
        self.lifecycle: Lifecycle | None = None

    def start(self, parts: Sequence[str], peers: Sequence[Peer]) -> list[Contestant]:
        """Start and warm the wanted contestants, and the judge."""
        contestants: list[Contestant] = []
        if "http" in parts:  # first, while nothing else takes memory
            self._say("starting vbserve, registering adapters")
            contestants.append(self._start_server())
        if "engine" in parts:
            self._say("starting the engine alone")
            engine = self._script("engine_peer.py")
            contestants.append(ScriptContestant(OURS_ENGINE, frozenset(WORKLOADS), engine, {}))
        self._say("starting PEFT")
        self.peft = self._script("peft_peer.py")
        if "peft" in parts:
            contestants += self._peft_contestants()
        for contestant in contestants:
            contestant.run(self._plan.warmup, self._plan.sizes.max_tokens)
        return contestants + self._start_peers(peers)

    def _start_peers(self, peers: Sequence[Peer]) -> list[Contestant]:
        room = PeerRoom(self._inputs, self._plan, self._out, self._threads)
        for peer in peers:
            self._say(f"starting {peer.name}")
            self._started[peer.name] = start_warm(peer, self._stack, room)
        return [started.contestant for started in self._started.values()]

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
        self._server, contestant, self.lifecycle = open_server(
            self._stack,
            lambda: VbserveServer(self._inputs.base, registry, log, flags),
            self._plan,
            self._inputs.adapters / "vblora",
        )
        return contestant

    def _script(self, name: str) -> ScriptPeer:
        load = self._plan.adapters_used or [0]
        arguments = [self._inputs.base, self._inputs.adapters, "--load", load]
        if self._threads:
            arguments += ["--threads", self._threads]
        log = self._out / f"{Path(name).stem}.log"
        return self._stack.enter_context(ScriptPeer(name, arguments, log))

    def take_turns(self, contestants: Sequence[Contestant]) -> list[RoundResult]:
        """Every wave by every contestant in turn; each round begins with another of them."""
        turns = (
            (contestant, wave, number)
            for number, waves in enumerate(self._plan.rounds)
            for wave in waves
            for contestant in _rotated(contestants, number)
            if wave.workload in contestant.workloads
        )
        return [self._measure(contestant, wave, number) for contestant, wave, number in turns]

    def _measure(self, contestant: Contestant, wave: Wave, number: int) -> RoundResult:
        with measured_load() as load:
            result = contestant.run(wave, self._plan.sizes.max_tokens)
        one = RoundResult(contestant.name, wave.workload, number, result, load)
        others = f", others use {load.foreign_cores} cores" if load.foreign_cores else ""
        self._say(
            f"round {number + 1} of {len(self._plan.rounds)}, {wave.workload}, "
            f"{contestant.name}: {one.tokens_per_second:.1f} tok/s{others}"
        )
        return one

    def judged(self, results: list[RoundResult]) -> list[RoundResult]:
        """The same results with a verdict per request."""
        self._say("judging exactness")
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

    def reach(self) -> dict[str, Reach]:
        """Start and memory of every server, by contestant; after everything was used."""
        found = {}
        if self.lifecycle is not None and self._server is not None:
            self.lifecycle.pss_end_bytes = self._server.pss_bytes()
            seconds = self.lifecycle.again_ready_seconds
            found[OURS_HTTP] = Reach(seconds, self.lifecycle.pss_end_bytes)
        for name, started in self._started.items():
            found[name] = Reach(started.start_seconds, started.pss_bytes())
        return found


def _rotated(contestants: Sequence[Contestant], number: int) -> list[Contestant]:
    shift = number % len(contestants)
    return [*contestants[shift:], *contestants[:shift]]
