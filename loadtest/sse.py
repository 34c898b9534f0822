"""Server-sent events out of raw bytes, cheaply: the client shares the server's cores.

Knows the wire format only (fields `data`, comments, all line ends), nothing of its payload.
"""

from __future__ import annotations


class EventParser:
    """Feed it bytes as they arrive; it gives the `data` of every event that is complete."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def pending(self) -> bool:
        """Whether an event has begun and not ended."""
        return bool(self._rest.strip())

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads that `data` completes, in order; a carriage return never stands inside JSON."""
        data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        return [payload for event in events if (payload := _payload(event))]


def _payload(event: bytes) -> bytes:
    if event.startswith(b"data:") and b"\n" not in event:  # nearly all
        return event[5:].strip()
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)
