"""What training refuses, on purpose."""

from __future__ import annotations

from adapters.errors import AdapterError


class TrainingError(AdapterError):
    """Data or settings that cannot be trained with; the message says what would be right."""
