"""What one request did, as the client saw it. Times are seconds on the run's own clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

DETAIL_CHARS = 300


@dataclass(slots=True)
class RequestRecord:
    """Filled by the client while the request runs; read-only afterwards.

    due            when the request should have been sent; latencies count from here, so a client
                   or server that falls behind cannot hide it (no coordinated omission)
    sent           when it was sent; equals `due` in a closed loop
    chunk_times    arrival of each chunk that brought tokens
    chunk_tokens   number of tokens in each of these chunks
    estimated      the server did not say how many tokens a chunk holds: counts are apportioned
    error          kind of failure, None for success; `detail` says more
    retry_after    seconds that the server asked to wait, where it did
    """

    index: int
    model: str
    due: float
    sent: float
    finished: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    prompt_chars: int | None = None
    estimated: bool = False
    error: str | None = None
    detail: str = ""
    retry_after: float | None = None

    @property
    def num_tokens(self) -> int:
        """Output tokens that arrived."""
        return sum(self.chunk_tokens)

    @property
    def ttft(self) -> float:
        """Seconds from due to the first token; only for requests that brought one."""
        return self.chunk_times[0] - self.due

    @property
    def e2e(self) -> float:
        """Seconds from due to the end of the response."""
        return self.finished - self.due

    @property
    def send_lag(self) -> float:
        """Seconds by which the client itself was late."""
        return self.sent - self.due

    def chunk_gaps(self) -> list[float]:
        """Seconds between chunks, one per chunk after the first: the pauses that a reader sees."""
        return [later - earlier for earlier, later in pairwise(self.chunk_times)]

    def token_gaps(self) -> list[float]:
        """Time between tokens, one per token after the first chunk.

        A chunk of n tokens that arrives t seconds after its predecessor counts as n gaps of t / n:
        the sum stays the decode time and every token weighs the same, however the server groups
        them. Tokens that arrive together with the first one belong to the time to first token.
        """
        gaps: list[float] = []
        for gap, num_tokens in zip(self.chunk_gaps(), self.chunk_tokens[1:], strict=True):
            gaps += [gap / num_tokens] * num_tokens
        return gaps


def fail(record: RequestRecord, kind: str, detail: str) -> None:
    """Note a failure; of a long `detail` its beginning."""
    record.error, record.detail = kind, detail[:DETAIL_CHARS]
