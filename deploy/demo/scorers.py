"""Exact scorers of the demo tasks: whether a completion says what the expected answer says.

They forgive form (white space, a Markdown fence, words around a label), never content, so that a
chat model without an adapter is not failed for its manners.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
from functools import cache

from deploy.demo.words import CITIES, DEPARTMENTS, LABELS, NAMES

COLUMNS = ("name", "age", "city", "department", "salary")


def same_json(expected: str, completion: str) -> bool:
    """The same JSON value: keys, values and types."""
    try:
        return bool(json.loads(_unfenced(completion)) == json.loads(expected))
    except json.JSONDecodeError:
        return False


def same_sql(expected: str, completion: str) -> bool:
    """Whether both queries return the same rows of a filled table, in any order unless asked."""
    wanted, got = _rows(expected), _rows(_unfenced(completion))
    if wanted is None or got is None:
        return False
    if "ORDER BY" not in expected:
        wanted, got = sorted(wanted, key=repr), sorted(got, key=repr)
    return wanted == got


def _rows(query: str) -> list[tuple[object, ...]] | None:
    """The rows that a query returns; None where it is no valid, quick SELECT."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute(f"CREATE TABLE employees ({', '.join(COLUMNS)})")
        connection.executemany("INSERT INTO employees VALUES (?, ?, ?, ?, ?)", _employees())
        connection.set_authorizer(_only_select)
        connection.set_progress_handler(lambda: 1, 10_000_000)  # virtual machine steps, then stop
        return connection.execute(query).fetchall()
    except (sqlite3.Error, sqlite3.Warning):
        return None
    finally:
        connection.close()


def _only_select(action: int, *_: object) -> int:
    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
    return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY


@cache
def _employees() -> tuple[tuple[str, int, str, str, int], ...]:
    """Enough rows with distinct salaries to tell queries apart, some in every city."""
    rng = random.Random("employees")
    return tuple(
        (
            f"{rng.choice(NAMES)} {number}",
            rng.randint(18, 67),
            rng.choice(CITIES),
            rng.choice(DEPARTMENTS),
            salary,
        )
        for number, salary in enumerate(rng.sample(range(1500, 9000), 3000))
    )


def same_words(expected: str, completion: str) -> bool:
    """Equal but for white space and quotation marks around the whole."""
    return " ".join(completion.split()).strip('"') == expected


def same_label(expected: str, completion: str) -> bool:
    """The right label and no other label, whatever else is said."""
    return [label for label in LABELS if label in completion.lower()] == [expected]


def _unfenced(completion: str) -> str:
    """A completion without the Markdown fence that chat models like to put around code."""
    fenced = re.search(r"```\w*\n(.*?)```", completion, re.DOTALL)
    return (fenced.group(1) if fenced else completion).strip()
