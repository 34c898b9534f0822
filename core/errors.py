"""Every error that core raises on purpose, and nothing else.

CoreError
├── UnsupportedModelError      a base that this engine cannot run exactly
├── InvalidRequestError        a generation request with a value out of range
│   └── PromptTooLongError     prompt and completion do not fit the context or the KV cache
├── AdapterUnavailableError    the factors of a digest could not be had
└── EngineOverloadedError      the waiting queue is full; try again later
"""

from __future__ import annotations


class CoreError(Exception):
    """Base of all errors raised by core."""


class UnsupportedModelError(CoreError):
    """The model directory names an architecture or option that is not served exactly."""


class InvalidRequestError(CoreError):
    """A field of a generation request is out of range; `param` names the field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(InvalidRequestError):
    """The prompt, or prompt and completion together, exceed what one sequence may hold."""


class AdapterUnavailableError(CoreError):
    """The factors of an adapter could not be loaded or rebuilt; the message says why."""


class EngineOverloadedError(CoreError):
    """The engine's queue is full. `retry_after_seconds` is a guess when it will not be."""

    def __init__(self, message: str, *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
