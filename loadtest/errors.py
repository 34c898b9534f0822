"""Every error that loadtest raises on purpose.

LoadtestError
├── InvalidWorkloadError   a length, popularity or workload file that makes no workload
├── ServerUnreachableError no server, or one that does not speak /v1/models
└── BenchError             a part of the bench that cannot run
"""

from __future__ import annotations


class LoadtestError(Exception):
    """Base of all errors raised by loadtest."""


class InvalidWorkloadError(LoadtestError):
    """A workload cannot be made of what was asked for; the message names value and remedy."""


class ServerUnreachableError(LoadtestError):
    """The server cannot be asked for its models; the message says what was tried."""


class BenchError(LoadtestError):
    """A server, peer or preparation of the bench failed; the message carries its last output."""
