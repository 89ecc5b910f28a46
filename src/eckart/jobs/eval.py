"""`eckart eval MODEL DATA [--against OTHER]`: metrics with intervals, and comparison of two models.

All of DATA is used, or the held-out part if data.eval is given. Bits per byte can be compared
between tokenizers, losses and perplexities cannot. With --against both models get the same
tokens: the difference of their losses is paired by row, and the drift is the KL divergence
between their predictions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from eckart.errors import FileError, UsageError
from eckart.io.data import Data
from eckart.io.heads import names_of
from eckart.io.models import load_tokenizer
from eckart.io.opening import Opened, open_model
from eckart.io.tasks import TASKS
from eckart.jobs.finetune import require_weights
from eckart.jobs.measuring import intervals
from eckart.jobs.measuring.scores import Scores, joined, score
from eckart.jobs.settings import settle
from eckart.jobs.settings.config import Job
from eckart.jobs.training import held_out, modality, prepare
from eckart.jobs.training.classes import open_to_measure, require_task
from eckart.jobs.training.outcome import shown
from eckart.jobs.training.screen import Screen, amount
from eckart.jobs.training.train import size_line
from eckart.report.text import aligned

ASKED = ("prompt+completion", "instruction", "messages")  # formats where a whole answer counts
NEEDS_SCIPY = "no intervals without scipy: type pip install 'eckart[claims]'"


def run(job: Job) -> dict[str, Any]:
    """Evaluate, and print the table. Returns the --json document."""
    begun, screen = time.monotonic(), Screen(quiet=job.flags.json)
    other_name: str | None = job.options.get("against")
    require_weights(job)
    labels, task = modality.labels_of(job), modality.task_of(job)
    require_task(job)
    reader = modality.reader_of(job)
    if other_name and TASKS[task].sees == "text":
        require_same_tokens(job.model or "", reader, other_name)
    opened = open_for(job.model or "", job, task, labels, reader)
    screen.line("model", described(opened), shown(job.model or ""))
    other = open_for(other_name, job, task, labels, reader) if other_name else None
    if other_name and other:
        require_same_classes(opened.model, other.model)
        screen.line("against", described(other), shown(other_name))
    modality.require_fit(job, reader, opened.model)

    job = modality.settled(job, opened.model, prepare.device())
    data = read_rows(job, reader, opened.model)
    job = settle.metrics(job, metrics_of(data))
    name, _, summary = data.summary.partition(": ")
    screen.line("data", summary, name)
    size = job.train.batch_size
    by_source = {
        name: score(
            opened.model,
            rows,
            data.collate,
            other.model if other else None,
            None if size == "auto" else int(size),
            data.lengths(rows),
            shifted=data.task == "causal",
        )
        for name, rows in data.evaluation.items()
    }
    found = tables(by_source, data, job.eval.metrics)
    rows, tokens = len(found["all"].scores.loss), int(found["all"].scores.count.sum())
    unit = TASKS[data.task].labels
    if intervals.available():
        screen.line("rows", f"{rows:,} with {tokens:,} {unit}; [95 % interval over rows]")
    else:
        screen.warn(NEEDS_SCIPY)
    if rows < intervals.FEW:
        screen.warn(f"{rows} rows are few: the intervals are too narrow")
    print_tables(screen, found)
    return {
        "command": "eval",
        "exit": 0,
        "model": job.model,
        "against": other_name,
        "format": data.format,
        "rows": rows,
        "tokens": tokens,
        "seconds": time.monotonic() - begun,
        "eval": {
            **found["all"].document(),
            "sources": {name: t.document() for name, t in found.items() if name != "all"},
        },
        "warnings": list(screen.warnings),
    }


def described(opened: Opened) -> str:
    """`46.8 K parameters, fp32, lora on m`."""
    carried = f", {opened.handle.weights.slug} on {shown(opened.base)}" if opened.handle else ""
    return size_line(opened) + carried


# --- what is measured ----------------------------------------------------------------------


def require_same_tokens(model: str, tokenizer: Any, other: str) -> None:
    """Raise UsageError unless both models have the same tokenizer."""
    theirs = load_tokenizer(other)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            "these two have different tokenizers",
            [(model, f"{len(tokenizer):,} tokens"), (other, f"{len(theirs):,} tokens")],
            "Type eckart eval for each, and compare bits per byte.",
        )


def open_for(source: str, job: Job, task: str, labels: tuple[str, ...], reader: Any) -> Opened:
    """Open a model to evaluate, with a classification head if the data has labels."""
    precision: Any = job.choices["precision"].method
    dtype = getattr(torch, precision.dtype) if precision is not None else None
    opened = (
        open_to_measure(source, task, labels, reader, dtype, job.train.seed)
        if labels
        else open_model(source, dtype)
    )
    opened.model.to(prepare.device()).eval()
    return opened


def require_same_classes(model: Any, other: Any) -> None:
    """Raise FileError if two models number their classes differently."""
    if names_of(model) != names_of(other):
        facts = [(side, ", ".join(names_of(one))) for side, one in
                 (("model", model), ("against", other))]  # fmt: skip
        raise FileError(
            "these two know other classes", facts, "Type eckart eval for each, and compare."
        )


def read_rows(job: Job, reader: modality.Reader, model: Any) -> Data:
    """All rows of DATA, or the held-out part if data.eval is given; one example per row."""
    data = modality.read_to_measure(job, reader, model)
    if not data.evaluation:
        raise UsageError(
            "nothing is held out",
            [(f"data.eval = {job.data.eval}", "command line or file")],
            "Leave data.eval out to measure on all rows.",
        )
    return data


# --- what is said of it --------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """The results of one source, or of all; `bytes` is the text that its labels encode."""

    scores: Scores
    bytes: float
    unit: str  # what a label belongs to: a token, a tag or a row
    metrics: Sequence[str]  # besides the loss and the drift

    @cached_property
    def numbers(self) -> dict[str, tuple[float, tuple[float, float]]]:
        """name -> (value, interval), in the order of the table's columns."""
        s, ones = self.scores, np.ones_like(self.scores.loss)
        found = {"loss": mean_and_interval(s.loss, s.count)}
        loss, (low, high) = found["loss"]
        if self.unit == "token":
            exp = held_out.perplexity
            found["perplexity"] = exp(loss), (exp(low), exp(high))
            if self.bytes:
                per_byte = s.count.sum() / self.bytes / math.log(2)
                found["bits_per_byte"] = loss * per_byte, (low * per_byte, high * per_byte)
        found["accuracy"] = mean_and_interval(s.right, s.count)
        found["exact_match"] = mean_and_interval(s.exact, ones)
        if len(s.other):
            found["other_loss"] = mean_and_interval(s.other, s.count)
            found["difference"] = mean_and_interval(s.loss - s.other, s.count)
            found["kl"] = mean_and_interval(s.kl, s.count)
            found["same_first_choice"] = mean_and_interval(s.same, s.count)
        told = ("loss", *self.metrics)
        return {n: number for n, number in found.items() if n in told or n not in HEADS}

    def document(self) -> dict[str, Any]:
        """The results for --json."""
        values = {name: value for name, (value, _) in self.numbers.items()}
        ends = {
            name: list(both) for name, (_, both) in self.numbers.items() if math.isfinite(both[0])
        }
        return {**values, "intervals": ends, "rows": len(self.scores.loss)}


def mean_and_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, tuple[float, float]]:
    """A ratio of sums over rows, and its interval; NaN bounds without scipy."""
    ends = intervals.interval(sums, counts) if intervals.available() else (math.nan, math.nan)
    return float(sums.sum() / counts.sum()), ends


def metrics_of(data: Data) -> tuple[str, ...]:
    """The metrics for this data: those of training, token accuracy, and exact answers."""
    asked = any(form in ASKED for form in data.format.split(", "))
    answers = ("exact_match",) if asked else ()
    return tuple(dict.fromkeys((*held_out.names(data), "accuracy", *answers)))


def tables(by_source: Mapping[str, Scores], data: Data, metrics: Sequence[str]) -> dict[str, Table]:
    """A table for each source; `all` comes last."""
    unit = TASKS[data.task].unit

    def table(names: list[str]) -> Table:
        text = sum(by_source[n].count.sum() * data.bytes_per_token.get(n, 0.0) for n in names)
        return Table(joined([by_source[n] for n in names]), text, unit, metrics)

    return {**{name: table([name]) for name in by_source}, "all": table(list(by_source))}


HEADS = {
    "loss": "loss",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "accuracy": "accuracy",
    "exact_match": "exact",
}
SHARES = ("accuracy", "exact_match", "same_first_choice")


def print_tables(screen: Screen, found: Mapping[str, Table]) -> None:
    """Print the table by source, and the comparison with another model."""
    shown_rows = {n: t for n, t in found.items() if n != "all" or len(found) > 2}
    heads = [name for name in HEADS if name in found["all"].numbers]
    cells = [["", *(HEADS[h] for h in heads), "rows"]]
    for name, table in shown_rows.items():
        numbers = [said(h, *table.numbers[h]) for h in heads]
        cells.append([name, *numbers, f"{len(table.scores.loss):,}"])
    screen.line("eval", aligned(cells), result=True)
    numbers_of_all = found["all"].numbers
    if "kl" not in numbers_of_all:
        return
    unit = f"a {found['all'].unit}"
    for label, text in (
        ("against", f"loss {said('loss', *numbers_of_all['other_loss'])}"),
        ("change", f"loss {said('loss', *numbers_of_all['difference'], sign='+')} nats {unit}"),
        (
            "drift",
            f"KL {said('kl', *numbers_of_all['kl'])} nats {unit}; the same first choice at "
            f"{said('same_first_choice', *numbers_of_all['same_first_choice'])}",
        ),
    ):
        screen.line(label, text, result=True)


def said(name: str, value: float, ends: tuple[float, float], sign: str = "") -> str:
    """`2.310 [2.25, 2.37]`, or `61.0 % [58, 64]`."""
    if name in SHARES:
        text = f"{100 * value:.1f} %"
        spread = f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
    elif name == "perplexity":  # its interval is the loss' own
        return f"{value:.4g}" if value < 1e4 else amount(value)
    else:
        digits = f"{sign}.2e" if 0 < abs(value) < 1e-3 else f"{sign}.3f"
        text = format(value, digits)
        spread = f" [{ends[0]:{digits}}, {ends[1]:{digits}}]"
    return text + (spread if math.isfinite(ends[0]) else "")
