"""`eckart eval MODEL DATA [--against OTHER]`: how good, how sure, and how far from another.

All of DATA is measured, unless data.eval names the share that a training held out. Bits per
byte compare models with different tokenizers, which losses and perplexities do not. With
--against both models see the same tokens: the difference of their losses is paired, and the
drift says how far MODEL's words are from OTHER's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from eckart.errors import FileError, UsageError
from eckart.io.models import load_tokenizer, recognise
from eckart.io.opening import ADAPTERS, Opened, open_model
from eckart.io.text import Data, read
from eckart.jobs import intervals, prepare, settle
from eckart.jobs.config import Job
from eckart.jobs.finetune import labelled, require_language, require_weights
from eckart.jobs.outcome import shown
from eckart.jobs.scores import Scores, joined, score
from eckart.jobs.screen import Screen, amount

ASKED = ("prompt+completion", "instruction", "messages")  # formats where a whole answer counts
NEEDS_SCIPY = "no intervals without scipy: type pip install 'eckart[claims]'"


def run(job: Job) -> dict[str, Any]:
    """Everything from a job to the printed table; the object of --json."""
    begun, screen = time.monotonic(), Screen(quiet=job.flags.json)
    other_name: str | None = job.options.get("against")
    require_weights(job)
    tokenizer = load_tokenizer(job.model or "")
    if other_name:
        require_same_tokens(job.model or "", tokenizer, other_name)
    labels, task = prepare.labels_of(job), prepare.task_of(job)
    if not labels:
        require_language(job, task)
    opened = open_for(job.model or "", job, task, labels, tokenizer)
    screen.line("model", described(opened), shown(job.model or ""))
    other = open_for(other_name, job, task, labels, tokenizer) if other_name else None
    if other_name and other:
        screen.line("against", described(other), shown(other_name))
    prepare.require_fit(tokenizer, opened.model)

    job = settle.seq_len(job, prepare.context_of(opened.model), prepare.device())
    data = read_rows(job, tokenizer)
    screen.line("data", data.summary)
    size = job.train.batch_size
    by_source = {
        name: score(
            opened.model,
            list(rows),
            data.collate,
            other.model if other else None,
            None if size == "auto" else int(size),
            classes_of(opened.model, labels),
            shifted=data.task == "causal",
        )
        for name, rows in data.evaluation.items()
    }
    found = tables(by_source, data)
    rows, tokens = len(found["all"].scores.loss), int(found["all"].scores.count.sum())
    unit = {"classification": "labels", "tagging": "tags"}.get(data.task, "tokens")
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
    count = sum(p.numel() for p in opened.model.parameters())
    dtype = str(next(opened.model.parameters()).dtype).removeprefix("torch.")
    carried = f", {opened.handle.weights.slug} on {shown(opened.base)}" if opened.handle else ""
    return f"{amount(count)} parameters, {dtype}{carried}"


# --- what is measured ----------------------------------------------------------------------


def require_same_tokens(model: str, tokenizer: Any, other: str) -> None:
    """Raise UsageError unless both models read text as the same tokens."""
    theirs = load_tokenizer(other)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            "these two have different tokenizers",
            [(model, f"{len(tokenizer):,} tokens"), (other, f"{len(theirs):,} tokens")],
            "Type eckart eval for each, and compare bits per byte.",
        )


def open_for(source: str, job: Job, task: str, labels: tuple[str, ...], tokenizer: Any) -> Opened:
    """A model to measure, with its head for classes where the data has labels."""
    precision: Any = job.choices["precision"].method
    dtype = getattr(torch, precision.dtype) if precision is not None else None
    opened = (
        open_classifier(source, task, labels, tokenizer, dtype, job.train.seed)
        if labels
        else open_model(source, dtype)
    )
    opened.model.to(prepare.device()).eval()
    return opened


def open_classifier(
    source: str,
    task: str,
    labels: tuple[str, ...],
    tokenizer: Any,
    dtype: torch.dtype | None,
    seed: int,
) -> Opened:
    """A classifier or tagger. Raises FileError where the model has no head for these classes."""
    from eckart.io.models import load_model

    found = recognise(source)
    if found.kind == "run":
        return open_classifier(f"{found.path}/final", task, labels, tokenizer, dtype, seed)
    if found.kind not in ADAPTERS:
        model = load_model(source, dtype, task, seed)
        classes_of(model, labels)
        return Opened(model, None, source)
    if not found.base:
        raise FileError("the adapter names no base", [(found.path, "")])
    # An adapter's file has the head's weights, and no names: they are the data's, in its order.
    head = labelled(labels, tokenizer)
    model = load_model(found.base, dtype, task, seed, **head)
    handle = ADAPTERS[found.kind](model, found.path)
    if not handle.also_train:
        raise FileError(
            "the adapter has no head for classes",
            [(found.path, f"{handle.weights.slug} alone"), ("labels", ", ".join(labels))],
            "Measure it on text, or fine-tune it on labelled rows first.",
        )
    return Opened(model, handle, found.base)


def classes_of(model: Any, labels: tuple[str, ...]) -> list[int]:
    """The model's number for each class of the data. FileError for one that it does not know."""
    if not labels:
        return []
    known: Mapping[str, int] = model.config.label2id or {}
    unknown = [name for name in labels if name not in known]
    if unknown:
        raise FileError(
            "the model has no such class",
            [("in the data", ", ".join(unknown)), ("in the model", ", ".join(known))],
            "Fine-tune it on these labels first: eckart finetune MODEL DATA",
        )
    return [known[name] for name in labels]


def read_rows(job: Job, tokenizer: Any) -> Data:
    """All rows of DATA, or what data.eval holds out of it; one example a row."""
    entries, seq_len = prepare.entries(job), int(job.data.seq_len)
    how: dict[str, Any] = {
        "packing": False,
        "format": job.data.format,
        "task": prepare.task_of(job),
    }
    if "data.eval" in job.given:
        held = list(job.data.eval) if isinstance(job.data.eval, tuple) else job.data.eval
        data = read(entries, tokenizer, seq_len, eval=held, **how)
    else:
        data = read([], tokenizer, seq_len, eval=entries, **how)
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
    """The numbers of one source, or of all; `bytes` of text its labels stand for."""

    scores: Scores
    bytes: float
    unit: str  # what has a label: a token, a tag or a whole row
    asked: bool  # is a row a question with one answer?

    @cached_property
    def numbers(self) -> dict[str, tuple[float, tuple[float, float]]]:
        """name -> (value, interval), in the order of the table's columns."""
        s, ones = self.scores, np.ones_like(self.scores.loss)
        found = {"loss": mean_and_interval(s.loss, s.count)}
        loss, (low, high) = found["loss"]
        if self.unit == "token":
            found["perplexity"] = exp(loss), (exp(low), exp(high))
            if self.bytes:
                per_byte = s.count.sum() / self.bytes / math.log(2)
                found["bits_per_byte"] = loss * per_byte, (low * per_byte, high * per_byte)
        found["accuracy"] = mean_and_interval(s.right, s.count)
        if self.asked:
            found["exact_match"] = mean_and_interval(s.exact, ones)
        if len(s.other):
            found["other_loss"] = mean_and_interval(s.other, s.count)
            found["difference"] = mean_and_interval(s.loss - s.other, s.count)
            found["kl"] = mean_and_interval(s.kl, s.count)
            found["same_first_choice"] = mean_and_interval(s.same, s.count)
        return found

    def document(self) -> dict[str, Any]:
        """The same for --json."""
        values = {name: value for name, (value, _) in self.numbers.items()}
        ends = {
            name: list(both) for name, (_, both) in self.numbers.items() if math.isfinite(both[0])
        }
        return {**values, "intervals": ends, "rows": len(self.scores.loss)}


def mean_and_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, tuple[float, float]]:
    """A ratio of sums over rows, and its interval; NaN ends without scipy."""
    ends = intervals.interval(sums, counts) if intervals.available() else (math.nan, math.nan)
    return float(sums.sum() / counts.sum()), ends


def exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # e^709 is the largest double


def tables(by_source: Mapping[str, Scores], data: Data) -> dict[str, Table]:
    """A table for each source; `all` comes last."""
    unit = {"classification": "row", "tagging": "tag"}.get(data.task, "token")
    asked = any(form in ASKED for form in data.format.split(", "))

    def table(names: list[str]) -> Table:
        text = sum(by_source[n].count.sum() * data.bytes_per_token.get(n, 0.0) for n in names)
        return Table(joined([by_source[n] for n in names]), text, unit, asked)

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
    """The table by source, and the lines against another model."""
    shown_rows = {n: t for n, t in found.items() if n != "all" or len(found) > 2}
    heads = [name for name in HEADS if name in found["all"].numbers]
    cells = [["", *(HEADS[h] for h in heads), "rows"]]
    for name, table in shown_rows.items():
        numbers = [said(h, *table.numbers[h]) for h in heads]
        cells.append([name, *numbers, f"{len(table.scores.loss):,}"])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for i, row in enumerate(cells):
        line = "   ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True))
        screen.line("eval" if i == 0 else "", line, result=True)
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
