"""Waiting sequences, first come first served per adapter and fair between adapters.

Fairness is by tokens: of the adapters that have someone waiting, the one that was served the
fewest tokens is next (virtual token counters, arXiv 2401.00588). Who comes back from idleness
starts at the least count of those that are busy, so idle time saves up nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from core.errors import EngineOverloadedError
from core.sequence import Sequence

Digest = str | None


class WaitingQueue:
    """One queue per digest (None is the base), bounded per digest and in all."""

    def __init__(self, max_waiting: int, max_waiting_per_adapter: int) -> None:
        self._max_waiting, self._max_per_adapter = max_waiting, max_waiting_per_adapter
        self._queues: dict[Digest, deque[Sequence]] = {}
        self._served: dict[Digest, int] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for queue in self._queues.values() for seq in queue)

    def check_room(self, digest: Digest, coming: int = 0, coming_same: int = 0) -> None:
        """Raise EngineOverloadedError where one more would be too many. Any thread may ask.

        `coming` requests are on their way into the queue already, `coming_same` of this digest.
        """
        if self._size + coming >= self._max_waiting:
            raise EngineOverloadedError(
                f"{self._size + coming} requests wait, the limit is {self._max_waiting}"
            )
        waiting = len(self._queues.get(digest, ())) + coming_same
        if waiting >= self._max_per_adapter:
            raise EngineOverloadedError(
                f"{waiting} requests wait for this model, the limit is {self._max_per_adapter}"
            )

    def push(self, seq: Sequence, busy: set[Digest]) -> None:
        """Append; `busy` are the digests with a running sequence."""
        self._lift(seq.digest, busy)
        self._queues.setdefault(seq.digest, deque()).append(seq)
        self._size += 1

    def push_front(self, seq: Sequence) -> None:
        """Put back a preempted sequence: it goes on first."""
        self._queues.setdefault(seq.digest, deque()).appendleft(seq)
        self._size += 1

    def heads(self) -> list[Sequence]:
        """The first of each queue: preempted ones, then the least served digest (ties: arrival)."""

        def order(seq: Sequence) -> tuple[bool, int, float]:
            return seq.num_preemptions == 0, self._served.get(seq.digest, 0), seq.arrived

        return sorted((queue[0] for queue in self._queues.values()), key=order)

    def of(self, digest: Digest) -> list[Sequence]:
        """All that wait under `digest`, in order."""
        return list(self._queues.get(digest, ()))

    def remove(self, seq: Sequence) -> None:
        """Take `seq` out, wherever it stands."""
        queue = self._queues[seq.digest]
        queue.remove(seq)
        self._size -= 1
        if not queue:
            del self._queues[seq.digest]

    def count_served(self, digest: Digest, num_tokens: int) -> None:
        """Account `num_tokens` computed tokens."""
        self._served[digest] = self._served.get(digest, 0) + num_tokens

    def forget_idle(self, busy: set[Digest]) -> None:
        """Drop the counters of digests that neither run nor wait, so that they stay bounded."""
        for digest in self._served.keys() - busy - self._queues.keys():
            del self._served[digest]

    def _lift(self, digest: Digest, busy: set[Digest]) -> None:
        if digest in self._queues or digest in busy:
            return
        active = (busy | self._queues.keys()) & self._served.keys()
        floor = min((self._served[other] for other in active), default=0)
        self._served[digest] = max(self._served.get(digest, 0), floor)
