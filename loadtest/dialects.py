"""How one kind of server is asked and how its answers read; the client does the rest.

`OPENAI` is /v1/completions. Another server brings a `Dialect` and a `Reply` of its own.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from loadtest.live import LiveCounts
from loadtest.protocol import Completion, body_of
from loadtest.records import RequestRecord, fail
from loadtest.workload import PlannedRequest

_decode = msgspec.json.Decoder(Completion).decode


class Reply(Protocol):
    """Collects the events of one answer into its record. `done` once the answer says its end."""

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        ...

    def take(self, events: list[bytes], now: float) -> None:
        """Account for `events`, which arrived together at `now`. Raises msgspec.DecodeError."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class Dialect(Protocol):
    """How to speak to one kind of server."""

    @property
    def path(self) -> str:
        """Begins with a slash."""
        ...

    @property
    def streams_all_ids(self) -> bool:
        """Whether a streamed answer names every token's id."""
        ...

    @property
    def keeps_connections(self) -> bool:
        """Whether the next request may come over the same connection."""
        ...

    def body(
        self, request: PlannedRequest, *, stream: bool, ignore_eos: bool, token_ids: bool
    ) -> bytes:
        """The JSON body of a greedy request."""
        ...

    def reply(self, record: RequestRecord, live: LiveCounts) -> Reply:
        """A collector for one answer."""
        ...


class OpenAI:
    """POST /v1/completions: this project's server, vLLM and many more."""

    path = "/v1/completions"
    streams_all_ids = True
    keeps_connections = True

    def body(
        self, request: PlannedRequest, *, stream: bool, ignore_eos: bool, token_ids: bool
    ) -> bytes:
        """As `body_of` says."""
        return body_of(
            request.model,
            request.prompt,
            request.max_tokens,
            stream=stream,
            ignore_eos=ignore_eos,
            token_ids=token_ids,
        )

    def reply(self, record: RequestRecord, live: LiveCounts) -> Reply:
        """Reads `Completion`s."""
        return _OpenAIReply(record, live)


OPENAI = OpenAI()


class _OpenAIReply:
    """Collects events into a record; what arrives in one read is one chunk."""

    def __init__(self, record: RequestRecord, live: LiveCounts) -> None:
        self.done = False
        self._record, self._live = record, live
        self._chunk_chars: list[int] = []
        self._completion_tokens: int | None = None
        self._exact = True

    def take(self, events: list[bytes], now: float) -> None:
        """Account for `events`, which arrived together at `now`."""
        record, num_tokens, num_chars = self._record, 0, 0
        for event in events:
            if event == b"[DONE]":
                self.done = True
                continue
            completion = _decode(event)
            if completion.error is not None:
                fail(record, "stream_error", msgspec.json.encode(completion.error).decode())
            for choice in completion.choices:
                num_chars += len(choice.text)
                if choice.token_ids:
                    num_tokens += len(choice.token_ids)
                    record.token_ids += choice.token_ids
                elif choice.text:
                    num_tokens += 1
                    self._exact = False
            if completion.usage is not None:
                record.prompt_tokens = completion.usage.prompt_tokens
                self._completion_tokens = completion.usage.completion_tokens
        if num_tokens:
            record.chunk_times.append(now)
            record.chunk_tokens.append(num_tokens)
            self._chunk_chars.append(num_chars)
            self._live.tokens += num_tokens

    def close(self) -> None:
        """Settle the number of tokens per chunk where the server gave no token ids."""
        record, total = self._record, self._completion_tokens
        if not self._exact and total is not None and total != record.num_tokens:
            self._live.tokens += total - record.num_tokens
            record.chunk_tokens = apportion(total, self._chunk_chars)
            record.estimated = True
        if not record.chunk_tokens and record.error is None:
            fail(record, "no_tokens", "the response ended without a token")


def apportion(total: int, weights: list[int]) -> list[int]:
    """Split `total` tokens over chunks by `weights`, at least one each while there are enough."""
    if total < len(weights):
        return [1] * len(weights)
    spare, weight_sum = total - len(weights), sum(weights) or 1
    shares, carried, given = [], 0, 0
    for weight in weights:
        carried += weight
        upto = spare * carried // weight_sum
        shares.append(1 + upto - given)
        given = upto
    return shares
