"""OpenVINO GenAI in process: a pipeline without adapters for the base, one with them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from loadtest.bench.contestants import OPENVINO, ScriptContestant, SplitContestant, Started
from loadtest.bench.inputs import make_once
from loadtest.bench.peer_room import PeerRoom
from loadtest.bench.plan import WORKLOADS
from loadtest.bench.processes import ScriptPeer, run_command


def start_openvino(stack: ExitStack, room: PeerRoom) -> Started:
    """Both processes; the model is exported at the first time."""
    model, every = _exported(room), frozenset(WORKLOADS)
    base = stack.enter_context(_script(room, model, "openvino-base", []))
    numbers = room.plan.adapters_used or [0]
    adapters = stack.enter_context(_script(room, model, "openvino-lora", numbers))
    contestant = SplitContestant(
        OPENVINO,
        every,
        base=ScriptContestant(OPENVINO, every, base, {}),
        adapters=ScriptContestant(OPENVINO, every, adapters, {}),
    )
    return Started(contestant, adapters.ready_seconds, adapters.pss_bytes)


def _script(room: PeerRoom, model: Path, name: str, numbers: list[int]) -> ScriptPeer:
    arguments = [model, room.inputs.adapters, "--load", numbers, "--threads", room.num_threads]
    python = room.home("openvino") / "bin" / "python"
    return ScriptPeer("openvino_peer.py", arguments, room.log(name), python=python)


def _exported(room: PeerRoom) -> Path:
    """The base as OpenVINO's own exporter writes it, in fp32."""
    program = room.home("openvino") / "bin" / "optimum-cli"

    def make(partial: Path) -> None:
        flags = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
        command = [program, "export", "openvino", "--model", room.inputs.base, *flags, partial]
        run_command(command, {**os.environ, "HF_HUB_OFFLINE": "1"})

    model = room.cached("openvino")
    make_once(model, make)
    return model
