"""The demo tasks: seeded makers of (message, answer) pairs, and exact scorers.

Every maker fills templates from pools of words. A pool is cut in two: training examples draw from
one part, held-out examples from the other, so that no held-out message can occur in training.
Knows nothing of models, tokenizers or adapters; downloads nothing.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

Split = Literal["train", "heldout"]
T = TypeVar("T")


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


def _part(pool: Sequence[T], split: Split) -> Sequence[T]:
    """Every fourth entry is held out."""
    return [entry for place, entry in enumerate(pool) if (place % 4 == 3) == (split == "heldout")]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    """Phrases separated by bars or line ends."""
    return tuple(text.strip().replace("\n", "|").split("|"))


_NAMES = _words("""
Maria Oliver Aisha Tom Ingrid Paulo Chen Fatima Lucas Emma Ravi Sofia Hugo Amina Peter Clara Diego
Nadia Viktor Alice Kofi Elena Marcus Yuki Samuel Leila Anton Grace Mateo Hannah Omar Julia Felix
Zara Daniel Ruth Ivan Bianca Karim Lena
""")
_CITIES = _words("""
Lisbon Oslo Rome Dublin Vienna Madrid Cairo Berlin Prague Athens Boston Toronto Paris Lima Sydney
Warsaw London Tokyo Chicago Milan Geneva Helsinki Mumbai Denver Munich Seattle Zurich Austin
Naples Dallas Porto Kyoto
""")
_ITEMS = _words("""
lamps chairs books tables phones bottles candles jackets keyboards mirrors pillows plates shirts
cameras tents baskets clocks carpets ladders helmets guitars blankets kettles wallets brushes
sofas knives bicycles gloves printers scarves umbrellas
""")
_DEPARTMENTS = _words("""
sales marketing finance support logistics research security design production training legal
quality purchasing planning payroll maintenance
""")

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
    order: dict[str, str | int] = {
        "name": rng.choice(_part(_NAMES, split)),
        "city": rng.choice(_part(_CITIES, split)),
        "item": rng.choice(_part(_ITEMS, split)),
        "quantity": rng.randint(2, 99),
    }
    return Example(rng.choice(_ORDERS).format(**order), json.dumps(order))


def _same_json(expected: str, completion: str) -> bool:
    try:
        return bool(json.loads(_unfenced(completion)) == json.loads(expected))
    except json.JSONDecodeError:
        return False


# --- text-to-sql -------------------------------------------------------------------------------

_COLUMNS = ("name", "age", "city", "department", "salary")
_QUERIES = (
    (
        ("How many employees live in {city}?", "Count the people in {city}."),
        "SELECT COUNT(*) FROM employees WHERE city = '{city}'",
    ),
    (
        (
            "What is the average salary in {department}?",
            "How much does {department} pay on average?",
        ),
        "SELECT AVG(salary) FROM employees WHERE department = '{department}'",
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
        ("How old is the oldest person in {department}?", "What is the top age in {department}?"),
        "SELECT MAX(age) FROM employees WHERE department = '{department}'",
    ),
    (
        ("Which cities have staff in {department}?", "Where does {department} have people?"),
        "SELECT DISTINCT city FROM employees WHERE department = '{department}'",
    ),
    (
        ("Who earns most in {city}?", "Name the best paid person in {city}."),
        "SELECT name FROM employees WHERE city = '{city}' ORDER BY salary DESC LIMIT 1",
    ),
)


def _make_text_to_sql(rng: random.Random, split: Split) -> Example:
    phrasings, query = rng.choice(_QUERIES)
    values = {
        "city": rng.choice(_part(_CITIES, split)),
        "department": rng.choice(_part(_DEPARTMENTS, split)),
        "age": rng.choice(_part(range(21, 65), split)),
        "salary": rng.choice(_part(range(2000, 8000, 100), split)),
    }
    return Example(rng.choice(phrasings).format(**values), query.format(**values))


def _same_sql(expected: str, completion: str) -> bool:
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
        connection.execute(f"CREATE TABLE employees ({', '.join(_COLUMNS)})")
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
    """Rows with distinct names and salaries, in every city and department."""
    rng = random.Random("employees")
    salaries = rng.sample(range(1500, 9000), 600)
    return tuple(
        (
            f"{rng.choice(_NAMES)} {number}",
            rng.randint(18, 67),
            rng.choice(_CITIES),
            rng.choice(_DEPARTMENTS),
            salary,
        )
        for number, salary in enumerate(salaries)
    )


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
_THINGS = _phrases("""
report|budget|contract|invoice|schedule|agenda|sales figures|minutes|press release
address list|floor plan|draft|slides|price list|travel plan|photo|job offer|survey|user guide
lease|order form|logo|guest list|mail to the bank|password policy|menu|time sheet|test results
training plan|quote|road map|speech""")


def _make_formal(rng: random.Random, split: Split) -> Example:
    verb, deadline = rng.choice(list(_VERBS)), rng.choice(list(_DEADLINES))
    thing = rng.choice(_part(_THINGS, split))
    return Example(
        f"{rng.choice(_OPENERS)} {verb} the {thing} {deadline} {rng.choice(_CLOSERS)}",
        f"Dear colleague, could you please {_VERBS[verb]} the {thing} {_DEADLINES[deadline]}? "
        "Kind regards.",
    )


def _same_words(expected: str, completion: str) -> bool:
    """Equal but for white space and quotation marks around the whole."""
    return " ".join(completion.split()).strip('"') == expected


# --- classify ----------------------------------------------------------------------------------

_TICKETS = {
    "billing": _phrases("""I was charged twice for the {item}|the invoice for the {item} is wrong
my card was billed too much for the {item}|why is there a fee on my bill for the {item}
the receipt for the {item} shows the wrong amount|my payment for the {item} was taken twice
I see an unknown charge for {item}|you overcharged me for the {item}"""),
    "delivery": _phrases("""where is the parcel with my {item}|the {item} have not arrived yet
the courier lost my {item}|tracking says my {item} are still on the way
the package with the {item} is late|my {item} were shipped to the wrong address
when will the {item} be delivered|I am still waiting for the {item} to arrive"""),
    "account": _phrases("""I forgot my password and cannot order the {item}
I cannot log in to buy the {item}|please change the email of my login, I want to order {item}
my account is locked while I order {item}|the login code for my {item} order never comes
delete my account, I have my {item}|sign in fails when I look for {item}
how do I reset my password to see the {item}"""),
    "returns": _phrases("""I want to send the {item} back|how do I return the {item}
the {item} do not fit, I want a refund|please exchange the {item} for another colour
I changed my mind about the {item}, take them back|I need a return label for the {item}
can I get my money back for the {item}|I would like to swap the {item} for a bigger size"""),
    "repair": _phrases("""the {item} are broken|the {item} stopped working after a day
one of the {item} has a crack|the {item} make a strange noise and do not work
my {item} came apart, can you fix them|the {item} are damaged and need a repair
a part of the {item} is missing|the {item} broke when I used them"""),
    "question": _phrases("""do you sell {item} in blue|what do the {item} cost
which {item} are best for a child|are the {item} in stock|how heavy are the {item}
do you have a discount on {item}|what are the {item} made of|are there larger {item}"""),
}
_PRESSURE = {
    "urgent": ("It is urgent.", "Please hurry!", "I need an answer today.", "It cannot wait."),
    "normal": ("No rush.", "Take your time.", "Answer when you can.", "It can wait."),
}
LABELS = tuple(f"{topic}/{pressure}" for topic in _TICKETS for pressure in _PRESSURE)


def _make_classify(rng: random.Random, split: Split) -> Example:
    topic, pressure = rng.choice(list(_TICKETS)), rng.choice(list(_PRESSURE))
    complaint = rng.choice(_part(_TICKETS[topic], split)).format(
        item=rng.choice(_part(_ITEMS, split))
    )
    message = f"{complaint[0].upper()}{complaint[1:]}. {rng.choice(_PRESSURE[pressure])}"
    return Example(message, f"{topic}/{pressure}")


def _same_label(expected: str, completion: str) -> bool:
    """The right label and no other label, whatever else is said."""
    return [label for label in LABELS if label in completion.lower()] == [expected]


def _unfenced(completion: str) -> str:
    """A completion without the Markdown fence that chat models like to put around code."""
    fenced = re.search(r"```\w*\n(.*?)```", completion, re.DOTALL)
    return (fenced.group(1) if fenced else completion).strip()


_JSON_INSTRUCTION = (
    'Answer with nothing but a JSON object with the keys "name", "city", "item" and "quantity" '
    "(a number), taken from this sentence:"
)
_SQL_INSTRUCTION = (
    f"There is one table, employees ({', '.join(_COLUMNS)}). "
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
        Task("json-extract", _make_json_extract, _same_json, _JSON_INSTRUCTION),
        Task("text-to-sql", _make_text_to_sql, _same_sql, _SQL_INSTRUCTION),
        Task("formal", _make_formal, _same_words, _FORMAL_INSTRUCTION),
        Task("classify", _make_classify, _same_label, _CLASSIFY_INSTRUCTION),
    )
}
