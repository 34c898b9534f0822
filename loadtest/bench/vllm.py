"""vLLM on the CPU: a server without LoRA for the base, one with LoRA for the adapters.

With LoRA on vLLM does not compile its model, which would slow its base down too. Adapters are
registered while it runs. Both cores, tcmalloc and the OpenMP of its wheel, as its log asks for.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import ExitStack
from pathlib import Path

import aiohttp

from loadtest.bench.contestants import VLLM, HttpContestant, SplitContestant, Started
from loadtest.bench.peer_room import PeerRoom
from loadtest.bench.plan import WORKLOADS
from loadtest.bench.server import BASE_NAME, adapter_id
from loadtest.bench.server_process import ServerProcess, free_port
from loadtest.errors import BenchError

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256)  # what it takes as --max-lora-rank
_CACHE_GIB = 1
_READY_SECONDS = 900.0  # its first start compiles
_LIBRARIES = ("tcmalloc/usr/lib/*/libtcmalloc_minimal.so.4", "lib/libiomp5.so")


def start_vllm(stack: ExitStack, room: PeerRoom) -> Started:
    """Both servers, all adapters registered."""
    sizes = room.plan.sizes
    base = stack.enter_context(_server(room, "vllm-base", []))
    rank = next(rank for rank in _LORA_RANKS if rank >= sizes.rank)
    flags = ["--enable-lora", "--max-loras", sizes.num_clients, "--max-lora-rank", rank]
    flags += ["--max-cpu-loras", sizes.num_adapters]
    adapters = stack.enter_context(_server(room, "vllm-lora", flags))
    start = time.perf_counter()
    asyncio.run(_register(adapters.url, room))
    seconds = adapters.ready_seconds + time.perf_counter() - start
    every = frozenset(WORKLOADS)
    contestant = SplitContestant(
        VLLM,
        every,
        base=HttpContestant(VLLM, every, base.url),
        adapters=HttpContestant(VLLM, every, adapters.url),
    )
    return Started(contestant, seconds, adapters.pss_bytes)


def _server(room: PeerRoom, name: str, flags: list[object]) -> ServerProcess:
    home, port, sizes = room.home("vllm"), free_port(), room.plan.sizes
    command = [
        home / "bin" / "python",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        room.inputs.base,
        "--served-model-name",
        BASE_NAME,
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--dtype",
        "float32",
        "--max-model-len",
        2 * (sizes.prompt_tokens + sizes.max_tokens),
        "--max-num-seqs",
        sizes.num_clients,
        "--no-enable-prefix-caching",
        *flags,
    ]
    environment = _environment(home, room.num_threads)
    words = [str(word) for word in command]
    return ServerProcess(name, words, environment, port, "/health", room.log(name), _READY_SECONDS)


def _environment(home: Path, num_threads: int) -> dict[str, str]:
    """Nothing is fetched or sent, no port is open to others, both cores compute."""
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    libraries = [str(path) for pattern in _LIBRARIES for path in sorted(home.glob(pattern))[:1]]
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CACHE_ROOT": str(home / "cache"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": str(_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(num_threads),
        "LD_PRELOAD": ":".join(libraries),
    }


async def _register(url: str, room: PeerRoom) -> None:
    async with aiohttp.ClientSession() as session:
        for number in range(room.plan.sizes.num_adapters):
            folder = (room.inputs.adapters / "lora" / f"{number:03d}").resolve()
            body = {"lora_name": adapter_id(number), "lora_path": str(folder)}
            async with session.post(f"{url}/v1/load_lora_adapter", json=body) as response:
                if response.status != 200:
                    text = (await response.text())[:500]
                    raise BenchError(f"vLLM refused adapter {number}: {response.status} {text}")
