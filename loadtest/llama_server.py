"""llama.cpp's llama-server as a dialect: POST /completion, whose events carry token ids.

A token that ends inside a UTF-8 character is counted in a later event but its id is not streamed;
without streaming all ids come. An absent or empty `lora` list would mean every loaded adapter at
once, so the base is asked for by adapter 0 at scale 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from loadtest.dialects import Reply
from loadtest.live import LiveCounts
from loadtest.records import RequestRecord, fail
from loadtest.workload import PlannedRequest

_NO_ADAPTER = {"id": 0, "scale": 0.0}


class _Part(msgspec.Struct):
    """One event, or the whole answer; the counts are totals so far."""

    tokens: list[int] = []
    stop: bool = False
    tokens_predicted: int = 0
    tokens_evaluated: int | None = None
    error: object = None


_decode = msgspec.json.Decoder(_Part).decode


@dataclass(frozen=True)
class LlamaServer:
    """`adapters` maps a model's name to its place among the adapters that the server loaded."""

    adapters: Mapping[str, int] = field(default_factory=dict)
    path: str = "/completion"
    streams_all_ids: bool = False
    keeps_connections: bool = False  # it closes one after a stream without saying so

    def body(
        self, request: PlannedRequest, *, stream: bool, ignore_eos: bool, token_ids: bool
    ) -> bytes:
        """Other names than those of `adapters` are the base."""
        place = self.adapters.get(request.model)
        lora = _NO_ADAPTER if place is None else {"id": place, "scale": 1.0}
        body = {
            "prompt": request.prompt,
            "n_predict": request.max_tokens,
            "temperature": 0,
            "stream": stream,
            "ignore_eos": ignore_eos,
            "return_tokens": token_ids,
            "cache_prompt": False,
            "lora": [lora],
        }
        return msgspec.json.encode(body)

    def reply(self, record: RequestRecord, live: LiveCounts) -> Reply:
        """Reads `_Part`s."""
        return _LlamaReply(record, live)


class _LlamaReply:
    """Counts by the server's totals, so tokens without an id are counted too."""

    def __init__(self, record: RequestRecord, live: LiveCounts) -> None:
        self.done = False
        self._record, self._live = record, live
        self._total = 0

    def take(self, events: list[bytes], now: float) -> None:
        """Account for `events`, which arrived together at `now`."""
        record, before = self._record, self._total
        for event in events:
            part = _decode(event)
            if part.error is not None:
                fail(record, "stream_error", msgspec.json.encode(part.error).decode())
                self.done = True
                continue
            record.token_ids += part.tokens
            record.prompt_tokens = part.tokens_evaluated
            self._total = max(self._total, part.tokens_predicted)
            self.done = self.done or part.stop
        if self._total > before:
            record.chunk_times.append(now)
            record.chunk_tokens.append(self._total - before)
            self._live.tokens += self._total - before

    def close(self) -> None:
        """Nothing to settle."""
        if not self._record.chunk_tokens and self._record.error is None:
            fail(self._record, "no_tokens", "the response ended without a token")
