"""What the bench's scripts share: JSON lines on standard input and output, and batches.

Everything that libraries print goes to standard error, so standard output has answers only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Answer = dict[str, Any]


@dataclass
class Request:
    """One request of a wave. `adapter` is its number, None for the base."""

    index: int
    prompt: list[int]
    adapter: int | None


@dataclass
class Record:
    """What one request did; seconds since the wave's start. One token per entry of `times`."""

    index: int
    sent: float
    times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


def serve(ready: Answer, commands: dict[str, Callable[[Answer], Answer]]) -> None:
    """Say `ready`, then answer each line {"do": name, …} by `commands[name]`, until input ends."""
    answers = os.fdopen(_claim_stdout(), "w")
    _say(answers, ready)
    for line in sys.stdin:
        command = json.loads(line)
        _say(answers, commands[command["do"]](command))


def _claim_stdout() -> int:
    """The real standard output; what others print goes to standard error from now on."""
    sys.stdout.flush()
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


def _say(stream: Any, answer: Answer) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def requests_of(command: Answer) -> list[Request]:
    """The requests of a {"do": "wave"} command."""
    return [Request(**row) for row in command["requests"]]


def answer_of(records: list[Record], wall_seconds: float) -> Answer:
    """The answer to a {"do": "wave"} command."""
    return {"wall_seconds": wall_seconds, "records": [vars(record) for record in records]}


def batches(requests: list[Request], size: int) -> Iterator[list[Request]]:
    """Cut into static batches in the order given."""
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def versions(*packages: str) -> dict[str, str]:
    """Installed versions by name."""
    from importlib.metadata import version

    return {name: version(name) for name in packages}
