"""What several rooms' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def default_base() -> Path:
    """The embedded default base: fetched and converted on the first run, then from the cache."""
    from serving.default_base import ensure_default_base

    return ensure_default_base()
