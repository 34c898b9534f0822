"""llama.cpp's llama-server, with the base as GGUF and all adapters loaded at its start.

Its cache of keys and values stays as it is by default (16 bit).
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from loadtest.bench.contestants import LLAMA_F32, LLAMA_Q8, HttpContestant, Started
from loadtest.bench.inputs import make_once
from loadtest.bench.peer_room import PeerRoom
from loadtest.bench.plan import WORKLOADS
from loadtest.bench.processes import run_command, run_script
from loadtest.bench.server import adapter_id
from loadtest.bench.server_process import ServerProcess, free_port
from loadtest.llama_server import LlamaServer

_NAMES = {"f32": LLAMA_F32, "q8_0": LLAMA_Q8}


def start_llamacpp(stack: ExitStack, room: PeerRoom, weights: Literal["f32", "q8_0"]) -> Started:
    """One server for base and adapters."""
    programs, name = room.home("llamacpp") / "build" / "bin", f"llamacpp-{weights}"
    folder, port, sizes = _gguf_folder(room, programs), free_port(), room.plan.sizes
    adapters = sorted((folder / "lora").glob("*.gguf"))
    command = [
        programs / "llama-server",
        "--model",
        folder / f"base-{weights}.gguf",
        "--lora",
        ",".join(map(str, adapters)),
        "--lora-init-without-apply",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--parallel",
        sizes.num_clients,
        "--ctx-size",
        sizes.num_clients * 2 * (sizes.prompt_tokens + sizes.max_tokens),
        "--threads",
        room.num_threads,
        "--threads-batch",
        room.num_threads,
        "--cache-ram",
        0,
    ]
    words, log = [str(word) for word in command], room.log(name)
    server = stack.enter_context(ServerProcess(name, words, dict(os.environ), port, "/health", log))
    places = {adapter_id(int(path.stem)): place for place, path in enumerate(adapters)}
    contestant = HttpContestant(
        _NAMES[weights], frozenset(WORKLOADS), server.url, LlamaServer(places)
    )
    return Started(contestant, server.ready_seconds, server.pss_bytes)


def _gguf_folder(room: PeerRoom, programs: Path) -> Path:
    def make(partial: Path) -> None:
        run_script("make_gguf.py", room.inputs.base, room.inputs.adapters, partial)
        files = (partial / "base-f32.gguf", partial / "base-q8_0.gguf")
        run_command([programs / "llama-quantize", *files, "Q8_0"])

    folder = room.cached("gguf")
    make_once(folder, make)
    return folder
