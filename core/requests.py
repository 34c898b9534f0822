"""What goes into the engine and what comes out: plain values, no tensors, no text.

Knows nothing of tokenizers (stop strings are the caller's, who aborts), adapter names or HTTP.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from core.errors import InvalidRequestError

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, per request. `temperature` 0 is greedy.

    seed            same seed and prompt, same tokens, whatever else is in the batch
    top_k           0 keeps the whole vocabulary
    min_p           drops tokens less probable than min_p times the most probable one
    logprobs        number of most probable tokens to report per position, besides the chosen one
    prompt_logprobs the same for the prompt's own tokens (turns prefix reuse off for this request)
    stop_token_ids  end the request as the model's own end-of-sequence does
    ignore_eos      the model's end-of-sequence tokens are tokens like others
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 100)
        _check("top_p", self.top_p, 0, 1, open_low=True)
        _check("top_k", self.top_k, 0)
        _check("min_p", self.min_p, 0, 1)
        _check("max_tokens", self.max_tokens, 0)
        _check("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check("presence_penalty", self.presence_penalty, -2, 2)
        _check("frequency_penalty", self.frequency_penalty, -2, 2)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check(name, value, 0, MAX_LOGPROBS)
        for token_id, bias in self.logit_bias.items():
            _check(f"logit_bias[{token_id}]", bias, -100, 100)


def _check(
    name: str, value: float, low: float, high: float = sys.maxsize, *, open_low: bool = False
) -> None:
    """Raise InvalidRequestError unless low <= value <= high (low < value where `open_low`)."""
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside:  # NaN is not either
        bounds = f"{'(' if open_low else '['}{low}, {high}]"
        raise InvalidRequestError(f"{name} is {value}, must be in {bounds}", param=name)


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to complete. `adapter_digest` None is the base itself.

    The digest is pinned here: whatever happens to names meanwhile, these weights serve it. `model`
    is what the caller calls them, for the caller's own logs and metrics; the engine never reads it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    adapter_digest: str | None = None
    model: str | None = None


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"  # the caller's abort
    ERROR = "error"  # see RequestOutput.error


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, of the model's own distribution (temperature 1).

    `top` maps the most probable token ids to theirs, most probable first; `rank` is the chosen
    token's place among all, 1 for the most probable.
    """

    token_id: int
    logprob: float
    rank: int
    top: Mapping[int, float]


@dataclass(frozen=True)
class RequestTimings:
    """Seconds on time.monotonic()'s clock; None where it has not happened."""

    arrived: float
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """What one step brought for one request.

    token_ids        the new tokens, in order; the stop token itself is included
    logprobs         one entry per new token where asked for, else empty
    prompt_logprobs  given once, with the first output: None for the first token, then one each
    finish_reason    None while the request goes on; the last output of a request has one
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    timings: RequestTimings | None = None
