"""The demo tasks' table and scorers, from `deploy/demo`, which is no installed package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT))

from deploy.demo.tasks import task_named  # noqa: E402

DEMO = _ROOT / "deploy" / "demo"
HELDOUT = DEMO / "heldout"
_FILE = DEMO / "results.json"
RESULTS: dict[str, Any] = json.loads(_FILE.read_text())["tasks"] if _FILE.is_file() else {}


def is_right(task: str, expected: str, answer: str) -> bool:
    """Whether the task's own scorer takes `answer` for the expected one."""
    return task_named(task).same(expected, answer.strip())
