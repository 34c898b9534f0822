"""Every error that adapters raises on purpose, and nothing else.

AdapterError
├── MalformedAdapterError      the files contradict themselves, the config or the base
├── UnsupportedAdapterError    a feature that is not served exactly (`feature` names it)
├── AdapterTooLargeError       a file, a rank or the store's contents exceed a limit
├── InvalidAdapterIdError      the id cannot name an adapter
├── UnknownAdapterError        no adapter has this id or digest
├── AdapterExistsError         the id names other content, and replacing was not asked for
├── WrongBaseError             the adapter was registered for another base
└── StoreCorruptedError        what lies in the store is not what was written there
"""

from __future__ import annotations


class AdapterError(Exception):
    """Base of all errors raised by adapters."""


class MalformedAdapterError(AdapterError):
    """The adapter contradicts itself or the base; the message says what is wrong and where."""


class UnsupportedAdapterError(AdapterError):
    """The adapter uses a feature that is not served exactly; `feature` is its name in PEFT."""

    def __init__(self, message: str, *, feature: str) -> None:
        super().__init__(message)
        self.feature = feature


class AdapterTooLargeError(AdapterError):
    """A limit was exceeded; the message names the limit, its value and the actual value."""


class InvalidAdapterIdError(AdapterError):
    """The id is malformed or reserved; the message says what an id may be."""


class UnknownAdapterError(AdapterError):
    """The store has no adapter under this id or digest."""


class AdapterExistsError(AdapterError):
    """The id already names other content; replacing it has to be asked for."""


class WrongBaseError(AdapterError):
    """The adapter was registered for a base with another fingerprint."""


class StoreCorruptedError(AdapterError):
    """A blob or a manifest is missing, unreadable, or does not have the content of its digest."""
