"""The demo tasks: same seed same data, splits apart, scorers right on good and bad answers."""

from __future__ import annotations

import random

import pytest

from deploy.demo import scorers, tasks
from deploy.demo.tasks import TASKS, UnknownTaskError, distinct_examples, task_named
from deploy.demo.words import LABELS

NAMES = sorted(TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_examples(name: str) -> None:
    task = task_named(name)
    assert distinct_examples(task, "train", 50, 3) == distinct_examples(task, "train", 50, 3)
    assert distinct_examples(task, "train", 50, 3) != distinct_examples(task, "train", 50, 4)


@pytest.mark.parametrize("name", NAMES)
def test_no_heldout_message_occurs_in_training(name: str) -> None:
    task = task_named(name)
    rng = random.Random(0)
    trained = {task.make(rng, "train").message for _ in range(5_000)}
    assert not trained & {example.message for example in distinct_examples(task, "heldout", 300, 1)}


@pytest.mark.parametrize("name", NAMES)
def test_scorer_accepts_the_answer_and_refuses_every_other_answer(name: str) -> None:
    task = task_named(name)
    answers = sorted({example.answer for example in distinct_examples(task, "heldout", 12, 1)})
    for expected in answers:
        right = [answer for answer in answers if task.same(expected, answer)]
        if name == "text-to-sql":  # two queries may happen to return the same rows
            assert expected in right
        else:
            assert right == [expected]
        assert not task.same(expected, "")
        assert not task.same(expected, "I am sorry, I cannot help with that.")


def test_json_compares_values_not_text() -> None:
    same = task_named("json-extract").same
    expected = '{"name": "Eva", "city": "Rome", "item": "lamps", "quantity": 3}'
    assert same(expected, '```json\n{"quantity":3,"item":"lamps","city":"Rome","name":"Eva"}\n```')
    assert not same(expected, expected.replace("3", '"3"'))
    assert not same(expected, expected.replace(', "quantity": 3', ""))
    assert not same(expected, expected[:-1])
    assert not same(expected, f"Here it is: {expected}")


def test_sql_compares_rows() -> None:
    same = task_named("text-to-sql").same
    expected = "SELECT name FROM employees WHERE city = 'Rome' AND salary > 4000"
    assert same(expected, "select name from employees where salary >= 4001 and city='Rome';")
    assert same(expected, f"```sql\n{expected} ORDER BY name DESC;\n```")
    assert not same(expected, expected.replace("4000", "5000"))
    assert not same(expected, expected.replace("name FROM", "* FROM"))
    assert not same(expected, f"{expected}; SELECT 1")
    assert not same(expected, "The query is: " + expected)


@pytest.mark.parametrize(
    "harm",
    [
        "DROP TABLE employees",
        "ATTACH DATABASE 'stolen.db' AS other",
        "PRAGMA writable_schema = 1",
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT * FROM n",
        "SELECT COUNT(*) FROM employees a, employees b, employees c, employees d",
    ],
)
def test_sql_runs_nothing_but_quick_selects(harm: str) -> None:
    assert scorers._rows(harm) is None


def test_every_expected_query_finds_rows() -> None:
    for example in distinct_examples(task_named("text-to-sql"), "heldout", 200, 1):
        rows = scorers._rows(example.answer)
        assert rows and rows[0][0] is not None, example


def test_sql_order_counts_where_it_is_asked_for() -> None:
    same = task_named("text-to-sql").same
    expected = "SELECT name FROM employees ORDER BY salary DESC LIMIT 8"
    assert same(expected, expected + ";")
    assert not same(expected, f"SELECT * FROM ({expected}) ORDER BY name")


def test_label_must_be_the_only_one_named() -> None:
    same = task_named("classify").same
    assert same("billing/urgent", "The label is Billing/urgent.")
    assert not same("billing/urgent", "billing")
    assert not same("billing/urgent", "billing/normal")
    assert not same("billing/urgent", ", ".join(LABELS))


def test_rewriting_is_compared_word_by_word() -> None:
    same = task_named("formal").same
    expected = "Dear colleague, could you please sign the lease tomorrow? Kind regards."
    assert same(expected, f'"{expected}"\n')
    assert not same(expected, expected.lower())
    assert not same(expected, f"Sure! {expected}")


def test_labels_are_closed() -> None:
    drawn = {
        example.answer for example in distinct_examples(task_named("classify"), "train", 900, 0)
    }
    assert drawn == set(LABELS)


def test_unknown_task_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnknownTaskError, match="'sonnets', choose from classify, formal"):
        task_named("sonnets")


def test_more_examples_than_a_task_has_are_refused() -> None:
    one = tasks.Example("message", "answer")
    only_one = tasks.Task("single", lambda rng, split: one, str.__eq__, "")
    assert distinct_examples(only_one, "train", 1, 0) == [one]
    with pytest.raises(ValueError, match="single has fewer than 2 different train messages"):
        distinct_examples(only_one, "train", 2, 0)
