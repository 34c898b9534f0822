"""Other servers as contestants: which there are, which of them are installed, and how to install.

Each lives in an environment of its own under OUT/peers, where peers/install.sh puts it, and is no
dependency of this project. What is not installed does not take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.bench.contestants import LLAMA_F32, LLAMA_Q8, OPENVINO, VLLM, Started
from loadtest.bench.llamacpp import start_llamacpp
from loadtest.bench.openvino import start_openvino
from loadtest.bench.peer_room import PeerRoom
from loadtest.bench.plan import Wave
from loadtest.bench.vllm import start_vllm
from loadtest.errors import BenchError

_INSTALLED = "installed.txt"  # written last by install.sh: `package version`


@dataclass(frozen=True)
class Peer:
    """`part` is its name on the command line, `home` that of its environment."""

    part: str
    name: str
    home: str
    start: Callable[[ExitStack, PeerRoom], Started]

    def version(self, homes: Path) -> tuple[str, str] | None:
        """Package and version that are installed under `homes`; None if it is not there."""
        try:
            package, version = (homes / self.home / _INSTALLED).read_text().split()
        except (OSError, ValueError):
            return None
        return package, version


PEERS = (
    Peer("vllm", VLLM, "vllm", start_vllm),
    Peer(
        "llamacpp-f32",
        LLAMA_F32,
        "llamacpp",
        lambda stack, room: start_llamacpp(stack, room, "f32"),
    ),
    Peer(
        "llamacpp-q8", LLAMA_Q8, "llamacpp", lambda stack, room: start_llamacpp(stack, room, "q8_0")
    ),
    Peer("openvino", OPENVINO, "openvino", start_openvino),
)


def chosen_peers(parts: Sequence[str], homes: Path, *, is_short: bool) -> list[Peer]:
    """The named ones; of nothing named all that are installed, but none in the short mode.

    Raises BenchError for a named one that is not installed.
    """
    named = [peer for peer in PEERS if peer.part in parts]
    missing = missing_peers(named, homes)
    if missing:
        raise BenchError(f"{hint(missing)}")
    if parts or is_short:
        return named
    return [peer for peer in PEERS if peer.version(homes)]


def missing_peers(peers: Iterable[Peer], homes: Path) -> list[Peer]:
    """Those that are not installed."""
    return [peer for peer in peers if peer.version(homes) is None]


def hint(missing: Sequence[Peer]) -> str:
    """How to install what is missing, in one sentence."""
    names = ", ".join(peer.name for peer in missing)
    homes = " ".join(dict.fromkeys(peer.home for peer in missing))
    return f'not installed: {names}; to install: make peers ARGS="{homes}"'


def versions(peers: Iterable[Peer], homes: Path) -> dict[str, str]:
    """Installed versions by package."""
    return dict(found for peer in peers if (found := peer.version(homes)))


def start_warm(peer: Peer, stack: ExitStack, room: PeerRoom) -> Started:
    """Start a peer and send it requests for the base and for an adapter."""
    started = peer.start(stack, room)
    plan = room.plan
    one = [replace(plan.cold[0][0], adapter=adapter) for adapter in plan.adapters_used[:1]]
    for wave in (plan.warmup, *(Wave("warm-up", 1, (request,)) for request in one)):
        started.contestant.run(wave, plan.sizes.max_tokens)
    return started
