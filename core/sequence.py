"""One request inside the engine. Data only: the scheduler alone changes status, pages and lease.

Knows nothing of tensors.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from enum import Enum, auto

from core.factors import FactorLease
from core.kv_cache import PageHash
from core.requests import GenerationRequest, RequestTimings, TokenLogprobs


class Status(Enum):
    """Where a sequence stands; FINISHED is final."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """A request's tokens and what they occupy.

    token_ids          prompt and output; the engine's update appends
    num_computed       leading tokens whose keys and values are in `pages`; the scheduler's
    pages              KV pages in order; the scheduler's
    page_hashes        hashes of the leading full pages of `token_ids`; the scheduler's
    num_published      leading pages that are published; the scheduler's
    lease              on the adapter's factors from admission to the end; the scheduler's
    prompt_logprobs    filled by the engine's update while the prompt is computed
    """

    request: GenerationRequest
    arrived: float
    token_ids: list[int]
    seed: int
    status: Status = Status.WAITING
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_hashes: list[PageHash] = field(default_factory=list)
    num_published: int = 0
    lease: FactorLease | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    scheduled: float | None = None
    first_token: float | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @classmethod
    def start(cls, request: GenerationRequest, arrived: float) -> Sequence:
        """A waiting sequence; without a seed it gets a random one of its own."""
        seed = request.sampling.seed
        return cls(
            request,
            arrived,
            list(request.prompt_token_ids),
            secrets.randbits(63) if seed is None else seed,
        )

    @property
    def digest(self) -> str | None:
        """The adapter's digest, None for the base."""
        return self.request.adapter_digest

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose keys and values are still missing; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    def timings(self, finished: float | None) -> RequestTimings:
        """When what happened, on time.monotonic()'s clock."""
        return RequestTimings(self.arrived, self.scheduled, self.first_token, finished)


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` tokens of `seq` from `start` on, to be computed in one step."""

    seq: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether the step brings the token after the sequence's last one."""
        return self.end == len(self.seq.token_ids)
