"""Progress of a running bench: a table of results and the estimated time left.

On a terminal the table is updated in place; in a pipe each finished run is a line on stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from eckart.jobs.lab.candidates import on_validation
from eckart.jobs.lab.comparison import Record, as_loss
from eckart.jobs.lab.runner import Quantities
from eckart.jobs.training.screen import clock


class ProgressTable:
    """Shows finished runs, unless `quiet`. Seeds from `first` on are test seeds."""

    def __init__(self, records: Sequence[Record], options: Any, first: int, quiet: bool):
        self.quiet, self.first, self.seeds = quiet, first, options.seeds
        self.metric = options.metric
        self.found: dict[str, list[tuple[Any, Quantities]]] = {r.name: [] for r in records}
        # most searches need two points beyond the window
        rates = min(options.purse, options.window + 2)
        self.records, self.searches = records, len(records) * rates * options.choose
        self.done, self.remaining, self.begun = 0, 0, time.monotonic()
        shown = not quiet and sys.stderr.isatty()
        self.live = Live(console=Console(stderr=True), auto_refresh=False) if shown else None

    def __enter__(self) -> ProgressTable:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *fault: object) -> None:
        if self.live:
            self.live.stop()

    def ended(self, trial: Any, quantities: Quantities, done: int, total: int) -> None:
        """Record and show a finished run: the `done`-th of `total`."""
        self.done += 1
        self.remaining = total - done
        if trial.seed < self.first:  # further rounds will come
            searched = done + sum(len(by) for r in self.records for by in r.scores.values())
            self.remaining = max(self.remaining, self.searches - searched)
            self.remaining += len(self.records) * self.seeds
        if trial.lr:
            self.found[trial.name].append((trial, quantities))
        if self.live:
            self.live.update(self.table(), refresh=True)
        elif not self.quiet:
            line = (
                f" {done}/{total}  {trial.described}  {self.seen(trial, quantities)}  {self.left()}"
            )
            print(line, file=sys.stderr, flush=True)

    def seen(self, trial: Any, quantities: Quantities) -> str:
        """The metric of a run: on validation rows during the search, else on test rows."""
        choosing = trial.lr and trial.seed < self.first
        name, said = (on_validation(self.metric), "held out") if choosing else (self.metric, "test")
        said += "" if self.metric == "loss" else f" {self.metric}"
        return f"{said} {quantities[name]:.4f}" + (
            " diverged" if quantities.get("diverged") else ""
        )

    def left(self) -> str:
        """The estimated time left, in words."""
        pace = (time.monotonic() - self.begun) / self.done
        return f"about {clock(pace * self.remaining)} left"

    def table(self) -> Any:
        """The runs since the program started, by method."""
        table = Table(title=f"{self.done} done, {self.left()}", title_justify="left")
        held_out, test = f"best {self.metric} held out", f"test {self.metric}"
        for name in ("method", "rates tried", held_out, "at lr", "seeds", test):
            table.add_column(name)
        for name, runs in self.found.items():
            chosen = [(q[on_validation(self.metric)], t.lr) for t, q in runs if t.seed < self.first]
            tests = [q[self.metric] for t, q in runs if t.seed >= self.first]
            top = min(chosen, key=lambda run: as_loss(self.metric, run[0]), default=None)
            table.add_row(
                name,
                str(len({lr for _, lr in chosen})),
                f"{top[0]:.4f}" if top else "",
                f"{top[1]:.2g}" if top else "",
                f"{len(tests)}/{self.seeds}",
                f"{sum(tests) / len(tests):.4f}" if tests else "",
            )
        return table
