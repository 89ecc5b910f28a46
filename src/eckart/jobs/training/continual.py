"""Continual-learning metrics of a sequence of tasks: R[t, j] is the score on task j after task t.

    transfer     mean over j > 0 of the mean over t < j of R[t, j]: tasks not yet trained on
    average      mean over all t, j
    last         mean over j of R[N-1, j]
    forgetting   mean over j < N-1 of the best of R[t, j] less R[N-1, j]

The first three as CoDyRA reports them (Lu et al. 2024, section 5). Scores are accuracies, or
losses in nats, with the sign of forgetting changed so that a positive one is always worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eckart.jobs.training.screen import Screen

Scores = Mapping[str, Mapping[str, Any]]  # task -> what was measured on it


def quantity(measured: Sequence[Scores]) -> str:
    """The metric that all tasks share: accuracy if all have it, else the loss."""
    every = all("accuracy" in found for scores in measured for found in scores.values())
    return "accuracy" if every else "loss"


def summary(before: Scores, after: Sequence[Scores]) -> dict[str, Any]:
    """The metrics above, from the scores of all tasks after each; {} without held-out rows.

    With one task there is nothing to transfer to and nothing to forget: both are None.
    """
    if not after or not all(found for scores in [before, *after] for found in scores.values()):
        return {}
    key = quantity([before, *after])
    tasks = list(before)
    R = [[float(scores[task][key]) for task in tasks] for scores in after]
    N = len(tasks)
    unseen = [mean([R[t][j] for t in range(j)]) for j in range(1, N)]
    best = max if key == "accuracy" else min
    sign = 1 if key == "accuracy" else -1
    lost = [sign * (best(row[j] for row in R) - R[-1][j]) for j in range(N - 1)]
    return {
        "quantity": key,
        "tasks": tasks,
        "before": [float(before[task][key]) for task in tasks],
        "after": R,
        "transfer": mean(unseen) if unseen else None,
        "average": mean([score for row in R for score in row]),
        "last": mean(R[-1]),
        "forgetting": mean(lost) if lost else None,
    }


def overall(by_task: Scores) -> dict[str, Any]:
    """All tasks' scores as one set of metrics, in the form of a run without tasks.

    One task's are returned as they are. Several are averaged, with each task's under `tasks`.
    """
    if len(by_task) == 1:
        return dict(next(iter(by_task.values())))
    if not all(by_task.values()):
        return {}
    keys = ("loss", "accuracy") if quantity([by_task]) == "accuracy" else ("loss",)
    means = {key: mean([float(found[key]) for found in by_task.values()]) for key in keys}
    return {**means, "tasks": dict(by_task)}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def show(screen: Screen, found: Mapping[str, Any]) -> None:
    """Print R with a row per trained task and a column per task, and the four metrics."""
    tasks: list[str] = found["tasks"]
    widths = [max(len(task), 7) for task in tasks]
    head = "   ".join(f"{task:>{w}}" for task, w in zip(tasks, widths, strict=True))
    label = max(len(f"after {task}") for task in tasks)
    rows = [f"{found['quantity']:<{label}}   {head}"]
    names = ["before", *(f"after {task}" for task in tasks)]
    for name, scores in zip(names, [found["before"], *found["after"]], strict=True):
        row = "   ".join(f"{score:>{w}.3f}" for score, w in zip(scores, widths, strict=True))
        rows.append(f"{name:<{label}}   {row}")
    screen.line("tasks", "\n".join(rows), result=True)
    told = {key: found[key] for key in ("transfer", "average", "last", "forgetting")}
    words = [f"{key} {value:.3f}" for key, value in told.items() if value is not None]
    screen.line("stream", ", ".join(words), result=True)
