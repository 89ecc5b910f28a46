"""The numbers of a stream of tasks, by hand."""

import pytest

from eckart.jobs.training.continual import show, summary
from eckart.jobs.training.screen import Screen

BEFORE = {"a": {"accuracy": 0.2}, "b": {"accuracy": 0.3}, "c": {"accuracy": 0.1}}
AFTER = [
    {"a": {"accuracy": 0.9}, "b": {"accuracy": 0.2}, "c": {"accuracy": 0.0}},
    {"a": {"accuracy": 0.7}, "b": {"accuracy": 0.8}, "c": {"accuracy": 0.2}},
    {"a": {"accuracy": 0.8}, "b": {"accuracy": 0.6}, "c": {"accuracy": 1.0}},
]


def losses(scores):
    return {task: {"loss": 1 - found["accuracy"]} for task, found in scores.items()}


def test_the_four_numbers():
    found = summary(BEFORE, AFTER)
    assert found["transfer"] == pytest.approx((0.2 + (0.0 + 0.2) / 2) / 2)  # a true 0 counts
    assert found["average"] == pytest.approx((1.1 + 1.7 + 2.4) / 9)
    assert found["last"] == pytest.approx(2.4 / 3)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.8) + (0.8 - 0.6)) / 2)


def test_forgetting_is_positive_for_losses_too():
    found = summary(losses(BEFORE), [losses(row) for row in AFTER])
    assert found["quantity"] == "loss"
    assert found["forgetting"] == pytest.approx(0.15)
    assert found["last"] == pytest.approx(1 - 2.4 / 3)


def test_one_task_has_nothing_to_forget_and_nothing_held_out_gives_nothing():
    one = summary({"a": {"loss": 2.0}}, [{"a": {"loss": 1.0}}])
    assert (one["transfer"], one["forgetting"], one["last"]) == (None, None, 1.0)
    assert summary({"a": {}}, [{"a": {}}]) == {}


def test_the_table_has_a_row_for_each_task(capsys):
    show(Screen(), summary(BEFORE, AFTER))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tasks", "accuracy", "a", "b", "c"]
    assert lines[2].split() == ["after", "a", "0.900", "0.200", "0.000"]
    assert lines[-1].split()[:3] == ["stream", "transfer", "0.150,"]
