"""What crosses the border between ingress and engine replicas, as msgpack: never pickle.

core's own dataclasses travel as they are; core's typed errors travel as `WireError` and are raised
again as themselves. Knows nothing of Ray or of sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from core.errors import (
    AdapterUnavailableError,
    CoreError,
    EngineOverloadedError,
    InvalidRequestError,
    PromptTooLongError,
)
from core.requests import GenerationRequest, RequestOutput
from serving.engine_client import EngineDiedError

_PLAIN_ERRORS: dict[str, type[CoreError]] = {
    error.__name__: error for error in (AdapterUnavailableError, EngineDiedError, CoreError)
}
_PARAM_ERRORS: dict[str, type[InvalidRequestError]] = {
    error.__name__: error for error in (InvalidRequestError, PromptTooLongError)
}


class ReplyAddress(msgspec.Struct, frozen=True):
    """Where an ingress listens for tokens, and the secret that its senders must show."""

    endpoint: str
    secret: str


class GenerateCall(msgspec.Struct, frozen=True):
    """The argument of an engine replica's `generate`."""

    request: GenerationRequest
    reply_to: ReplyAddress


class WireError(msgspec.Struct, frozen=True, omit_defaults=True):
    """A CoreError between processes: its class name and what its constructor takes."""

    kind: str
    message: str
    param: str | None = None
    retry_after_seconds: float = 1.0


class GenerateResult(msgspec.Struct, frozen=True):
    """The whole outcome of one request: all its tokens in one output, or why it was refused.

    `engine` names the process that ran it, a new one after each restart of a replica.
    """

    engine: str
    output: RequestOutput | None = None
    error: WireError | None = None


class SequencedOutput(msgspec.Struct, frozen=True, array_like=True):
    """The `index`-th output of its request, counted from 0."""

    index: int
    output: RequestOutput


class StepFrame(msgspec.Struct, frozen=True, array_like=True):
    """What one step of one engine brought for the requests of one ingress."""

    secret: str
    engine: str
    outputs: tuple[SequencedOutput, ...]


def encode(message: GenerateCall | GenerateResult | StepFrame) -> bytes:
    """Return `message` as msgpack."""
    return msgspec.msgpack.encode(message)


def decode_call(data: bytes) -> GenerateCall:
    """Raises msgspec.ValidationError, or InvalidRequestError for a value out of range."""
    return msgspec.msgpack.decode(data, type=GenerateCall)


def decode_result(data: bytes) -> GenerateResult:
    """Raises msgspec.ValidationError."""
    return msgspec.msgpack.decode(data, type=GenerateResult)


def decode_frame(data: bytes) -> StepFrame:
    """Raises msgspec.MsgspecError for anything that is not a frame."""
    return msgspec.msgpack.decode(data, type=StepFrame)


def to_wire(error: CoreError) -> WireError:
    """Describe `error` so that `from_wire` can raise the same type elsewhere."""
    return WireError(
        kind=type(error).__name__,
        message=str(error),
        param=error.param if isinstance(error, InvalidRequestError) else None,
        retry_after_seconds=(
            error.retry_after_seconds if isinstance(error, EngineOverloadedError) else 1.0
        ),
    )


def from_wire(error: WireError) -> CoreError:
    """Return the exception that `to_wire` described; an unknown kind becomes a CoreError."""
    if error.kind == EngineOverloadedError.__name__:
        return EngineOverloadedError(error.message, retry_after_seconds=error.retry_after_seconds)
    if error.kind in _PARAM_ERRORS:
        return _PARAM_ERRORS[error.kind](error.message, param=error.param)
    return _PLAIN_ERRORS.get(error.kind, CoreError)(error.message)


def join_outputs(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """One output that holds all tokens of `outputs` (at least one, of one request, in order)."""
    prompt_logprobs = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
    return replace(
        outputs[-1],
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        prompt_logprobs=prompt_logprobs[0] if prompt_logprobs else None,
        num_cached_tokens=max(output.num_cached_tokens for output in outputs),
    )
