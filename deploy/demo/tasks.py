"""The demo tasks: seeded makers of (message, answer) pairs.

Every maker fills templates from the pools in words.py. A pool is cut in two: training examples draw
from one part, held-out examples from the other, so that no held-out message occurs in training.
Knows nothing of models, tokenizers or adapters; downloads nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from deploy.demo.scorers import COLUMNS, same_json, same_label, same_sql, same_words
from deploy.demo.words import (
    CITIES,
    DEPARTMENTS,
    DOCUMENTS,
    ITEMS,
    LABELS,
    MORE_CITIES,
    MORE_ITEMS,
    MORE_NAMES,
    NAMES,
    PRESSURES,
    TICKETS,
    Split,
    part,
)


@dataclass(frozen=True)
class Example:
    """One user message and the one right answer."""

    message: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A task that an adapter learns.

    make         draws one example of a split
    same         whether a completion says what the expected answer says: (expected, completion)
    instruction  what an untrained model is told before the message, for a fair comparison
    """

    name: str
    make: Callable[[random.Random, Split], Example]
    same: Callable[[str, str], bool]
    instruction: str


class UnknownTaskError(ValueError):
    """No task of this name; the message lists those that exist."""


def task_named(name: str) -> Task:
    """The task of this name; UnknownTaskError otherwise."""
    if name not in TASKS:
        raise UnknownTaskError(f"unknown task {name!r}, choose from {', '.join(sorted(TASKS))}")
    return TASKS[name]


def distinct_examples(task: Task, split: Split, count: int, seed: int) -> list[Example]:
    """`count` examples with different messages, the same ones for the same seed."""
    rng = random.Random(f"{task.name}/{split}/{seed}")
    found: dict[str, Example] = {}
    for _ in range(100 * count):
        example = task.make(rng, split)
        found.setdefault(example.message, example)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{task.name} has fewer than {count} different {split} messages")


# --- json-extract ------------------------------------------------------------------------------

_ORDERS = (
    "{name} from {city} ordered {quantity} {item}.",
    "{quantity} {item} were shipped to {name} in {city}.",
    "In {city}, {name} bought {quantity} {item}.",
    "Please send {quantity} {item} to {name} in {city}.",
    "{name} would like {quantity} {item} delivered to {city}.",
    "The {quantity} {item} that {name} wants go to {city}.",
)


def _make_json_extract(rng: random.Random, split: Split) -> Example:
    # A held-out message has a new person. Cities and goods are known ones: this small a base does
    # not copy unseen words reliably into quotation marks, where they are spelt in other tokens.
    order: dict[str, str | int] = {
        "name": rng.choice(part(NAMES + MORE_NAMES, split)),
        "city": rng.choice(part(CITIES + MORE_CITIES, "train")),
        "item": rng.choice(part(ITEMS + MORE_ITEMS, "train")),
        "quantity": rng.randint(2, 99),
    }
    return Example(rng.choice(_ORDERS).format(**order), json.dumps(order))


# --- text-to-sql -------------------------------------------------------------------------------

_QUERIES = (
    (
        (
            "How many people in {city} are older than {age}?",
            "Count the people over {age} in {city}.",
        ),
        "SELECT COUNT(*) FROM employees WHERE city = '{city}' AND age > {age}",
    ),
    (
        (
            "What do people over {age} in {department} earn on average?",
            "What is the average salary in {department} above the age of {age}?",
        ),
        "SELECT AVG(salary) FROM employees WHERE department = '{department}' AND age > {age}",
    ),
    (
        ("Who is older than {age}?", "Name everyone above the age of {age}."),
        "SELECT name FROM employees WHERE age > {age}",
    ),
    (
        ("Who in {city} earns more than {salary}?", "Which people in {city} make over {salary}?"),
        "SELECT name FROM employees WHERE city = '{city}' AND salary > {salary}",
    ),
    (
        (
            "Which cities have {department} staff paid over {salary}?",
            "Where does {department} pay somebody more than {salary}?",
        ),
        "SELECT DISTINCT city FROM employees WHERE department = '{department}' "
        "AND salary > {salary}",
    ),
    (
        (
            "Name the {limit} best paid people in {city}.",
            "Who are the top {limit} earners in {city}?",
        ),
        "SELECT name FROM employees WHERE city = '{city}' ORDER BY salary DESC LIMIT {limit}",
    ),
)


def _make_text_to_sql(rng: random.Random, split: Split) -> Example:
    # A held-out question has a new number; the cities and departments of a database are given.
    phrasings, query = rng.choice(_QUERIES)
    values = {
        "city": rng.choice(CITIES),
        "department": rng.choice(DEPARTMENTS),
        "age": rng.choice(part(range(20, 60), split)),
        "salary": rng.choice(part(range(2000, 8000, 100), split)),
        "limit": rng.choice(part(range(2, 42), split)),
    }
    return Example(rng.choice(phrasings).format(**values), query.format(**values))


# --- formal ------------------------------------------------------------------------------------

_OPENERS = ("yo", "hey", "hi there", "ok so", "listen", "psst")
_CLOSERS = ("thx", "cheers", "pls", "ta", "k?", "ok?")
_VERBS = {
    "gimme": "give me",
    "send me": "send me",
    "shoot me": "send me",
    "check": "check",
    "have a look at": "check",
    "fix": "correct",
    "sort out": "correct",
    "sign": "sign",
}
_DEADLINES = {
    "asap": "at your earliest convenience",
    "right now": "at your earliest convenience",
    "tmrw": "tomorrow",
    "tonite": "this evening",
    "by fri": "by Friday",
    "by mon": "by Monday",
    "whenever": "when it suits you",
}


def _make_formal(rng: random.Random, split: Split) -> Example:
    verb, deadline = rng.choice(list(_VERBS)), rng.choice(list(_DEADLINES))
    thing = rng.choice(part(DOCUMENTS, split))
    return Example(
        f"{rng.choice(_OPENERS)} {verb} the {thing} {deadline} {rng.choice(_CLOSERS)}",
        f"Dear colleague, could you please {_VERBS[verb]} the {thing} {_DEADLINES[deadline]}? "
        "Kind regards.",
    )


# --- classify ----------------------------------------------------------------------------------


def _make_classify(rng: random.Random, split: Split) -> Example:
    topic, pressure = rng.choice(list(TICKETS)), rng.choice(list(PRESSURES))
    complaint = rng.choice(TICKETS[topic]).format(item=rng.choice(part(ITEMS, split)))
    message = f"{complaint[0].upper()}{complaint[1:]}. {rng.choice(PRESSURES[pressure])}"
    return Example(message, f"{topic}/{pressure}")


_JSON_INSTRUCTION = (
    'Answer with nothing but a JSON object with the keys "name", "city", "item" and "quantity" '
    "(a number), taken from this sentence:"
)
_SQL_INSTRUCTION = (
    f"There is one table, employees ({', '.join(COLUMNS)}). "
    "Answer with nothing but one SQL query for this question:"
)
_FORMAL_INSTRUCTION = (
    "Rewrite this request in the form 'Dear colleague, could you please ...? Kind regards.' "
    "and answer with nothing else:"
)
_CLASSIFY_INSTRUCTION = (
    f"Which of these labels fits the message? {', '.join(LABELS)}. "
    "Answer with one label and nothing else. The message:"
)

TASKS = {
    task.name: task
    for task in (
        Task("json-extract", _make_json_extract, same_json, _JSON_INSTRUCTION),
        Task("text-to-sql", _make_text_to_sql, same_sql, _SQL_INSTRUCTION),
        Task("formal", _make_formal, same_words, _FORMAL_INSTRUCTION),
        Task("classify", _make_classify, same_label, _CLASSIFY_INSTRUCTION),
    )
}
