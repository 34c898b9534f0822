"""`deploy/` is no installed package: put the repository's root where its scripts expect it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
