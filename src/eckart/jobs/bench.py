"""`eckart bench MODEL DATA --methods a,b,c`: compares methods on one model and data set.

1 equal purses   every candidate, the plain baseline among them, is given the same grid of
                 learning rates in half-decades, longer where its best lies at an edge
2 selection      by held-out loss, or a metric, on the selection's seeds; no test row is read
3 report         at the best rate on other seeds, on test rows, all paired by the data's order
4 verdicts       intervals of paired differences, Holm's correction, a margin; "no difference
                 seen" is a normal answer

    OUT/run.json results.jsonl table.csv bench.json    the same bytes after any interruption
    OUT/costs.json report.html                         and what depends on the machine
    OUT/trials/                                        a file for each run that has ended
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from eckart.errors import UsageError, did_you_mean
from eckart.io.run import Run
from eckart.jobs.lab import lengths, matching
from eckart.jobs.lab.candidates import (
    BenchTrial,
    Candidate,
    on_validation,
    parse_candidates,
    split,
    starts_at_random,
    with_absolute_paths,
    workload,
)
from eckart.jobs.lab.comparison import Record, as_loss, ranking, table
from eckart.jobs.lab.lengths import Length
from eckart.jobs.lab.progress import ProgressTable
from eckart.jobs.lab.runner import Quantities, Runner, resumable
from eckart.jobs.lab.sweep import Plan, lr_at, next_points, next_sampled
from eckart.jobs.lab.tables import as_text, write
from eckart.jobs.lab.verdicts import number
from eckart.jobs.settings import settle
from eckart.jobs.settings.emit import flow, plain
from eckart.jobs.settings.job import Job
from eckart.jobs.settings.refuse import PER_CANDIDATE, is_among
from eckart.jobs.training import held_out, outcome, prepare
from eckart.jobs.training.screen import Screen
from eckart.recipe.groups import default_lr

HELD_OUT = 0.1  # unless data.eval says otherwise: half to choose by, half to report on
FEWEST = 4  # held-out rows
CHOICES = {"match": get_args(matching.Match), "sampler": ("grid", "tpe")}


@dataclass(frozen=True)
class Options:
    """The options of `eckart bench`."""

    methods: str = ""
    window: int = 5
    purse: int = 9
    choose: int = 2
    seeds: int = 5
    metric: str = "loss"
    margin: float | None = None
    budget: str = ""
    match: matching.Match = "none"
    sampler: str = "grid"
    processes: int = 1
    ray: bool = False

    @classmethod
    def of(cls, job: Job) -> Self:
        """The given options, over those of the resumed bench."""
        typed = {name: value for name, value in job.options.items() if value is not None}
        begun: dict[str, Any] = {}
        if job.flags.resume:
            file = Path(job.flags.resume) / "run.json"
            begun = json.loads(file.read_bytes()).get("options", {}) if file.is_file() else {}
        found = cls(**{**begun, **typed})
        for name, least in (("window", 1), ("choose", 1), ("seeds", 2), ("processes", 1)):
            if getattr(found, name) < least:
                raise UsageError(
                    f"--{name} is too small",
                    [(f"--{name} {getattr(found, name)}", f"at least {least}")],
                    f"Leave it out for {cls.__dataclass_fields__[name].default}.",
                )
        if found.purse < found.window:
            raise UsageError(
                "--purse is smaller than --window",
                [
                    ("--purse", f"{found.purse} rates at most"),
                    ("--window", f"{found.window} first"),
                ],
                f"Type --window {found.purse}, or a larger purse.",
            )
        for name, known in CHOICES.items():
            if getattr(found, name) not in known:
                said = f"--{name} {getattr(found, name)}"
                raise UsageError(f"{said} is unknown", fix=f"Choices: {', '.join(known)}.")
        if found.match == "memory" and found.budget.startswith("bytes"):
            raise UsageError(
                "memory is made equal twice",
                [("--match memory", "by each method's size"), ("--budget", "by rows in a batch")],
                "Type --budget steps=300, or leave --match out.",
            )
        return found


def run(job: Job) -> dict[str, Any]:
    """Run the whole comparison. Returns the --json document."""
    options = Options.of(job)
    job, screen = begin(job)
    entered = parse_candidates(options.methods, job)
    others = ", ".join(c.name for c in entered[1:])
    screen.line("compare", f"{others} against {entered[0].name}")
    shared = workload(entered[0].job)
    count, kept = len(shared.data.train), held_out_rows(shared.data)
    screen.line("data", f"{count:,} rows; {kept:,} held out, half to choose by")
    job = with_metrics(job, options.metric, held_out.names(shared.data))
    job = settle.horizon(job, count, entered[0].recipe)
    rows = settle.rows_per_step(job, count)
    entered = matching.matched(entered, options.match, rows)
    if options.match != "none":
        screen.line("matched", matching.summary(entered, options.match, rows))
    with open_run(job, options) as run, resumable(f"eckart bench --resume {run.folder}"):
        planned = lengths.plan(job, entered, options.budget, run.folder / "pace.json")
        document = compare(job, options, entered, planned, run, screen)
        write(run, document)
        run.record(recipe={c.name: outcome.recipe_of(c.job) for c in entered})
    tell(screen, document)
    return document


def begin(job: Job) -> tuple[Job, Screen]:
    """Check the job before anything is loaded, and decide its `auto` keys."""
    outcome.refuse_early(job)
    for key in job.given:
        if is_among(tuple(key.split(".")), PER_CANDIDATE):
            raise UsageError(
                "every method has its own choices",
                [(key, "belongs to all of them here")],
                "Write fields after the method: --methods lora:rank=4,dora. "
                "Learning rates are searched.",
            )
    if "data.eval" not in job.given:
        job = job.settle("data.eval", HELD_OUT, "half to choose by, half to report on")
    if starts_at_random(job) and job.train.steps == "auto" and not job.train.epochs:
        job = job.settle("train.steps", 300, "enough to tell methods apart")
    return settle.precision(job, prepare.device()), Screen(quiet=job.flags.json)


def held_out_rows(data: Any) -> int:
    """The number of held-out rows. UsageError if too few to both select and report on."""
    rows = sum(len(part) for part in data.evaluation.values())
    if rows < FEWEST:
        raise UsageError(
            "too few rows are held out",
            [("data.eval", f"{rows} rows; half choose the learning rate, half report")],
            "Type data.eval=0.3, or name a file of its own: data.eval=[held_out.jsonl]",
        )
    return rows


def with_metrics(job: Job, metric: str, known: tuple[str, ...]) -> Job:
    """The job with the metrics of test rows: the verdicts' metric, and those not given by the loss.

    UsageError for a metric that this data does not have.
    """
    if metric not in known:
        raise UsageError(
            f"no metric of this data is called {metric}",
            [(f"--metric {metric}", f"known here: {', '.join(known)}")],
            did_you_mean(metric, known, "Leave it out for the loss."),
        )
    own = tuple(name for name in known if name not in held_out.FOLLOWING)
    chosen = own if job.eval.metrics == "auto" else settle.metrics(job, known).eval.metrics
    return job.settle(
        "eval.metrics", tuple(dict.fromkeys((metric, "loss", *chosen))), "beside the metric"
    )


def open_run(job: Job, options: Options) -> Run:
    """The bench's folder, new or resumed."""
    if job.flags.resume:
        found = Run.resume(job.flags.resume)
    else:
        found = Run.create(job.out, job.flags.overwrite)
    found.write_config(job.dump())
    found.record(command="bench", options=options.__dict__, seed=job.train.seed)
    return found


# --- the comparison ------------------------------------------------------------------------


def compare(
    job: Job,
    options: Options,
    entered: Sequence[Candidate],
    planned: Mapping[str, Length],
    run: Run,
    screen: Screen,
) -> dict[str, Any]:
    """Search, report, judge."""
    shared = workload(entered[0].job)
    content = shared.content
    scratch = starts_at_random(job)
    records = [Record(c.name, default_lr(c.recipe, scratch)) for c in entered]
    jobs = {c.name: with_absolute_paths(c.job) if options.ray else c.job for c in entered}

    def trial(name: str, seed: int, lr: float) -> BenchTrial:
        length = planned[name]
        place = str(run.folder / "trials")
        return BenchTrial(name, jobs[name], seed, lr, length.steps, length.rows, content, place)

    progress = ProgressTable(records, options, job.train.seed + options.choose, screen.quiet)
    at_once = lengths.concurrency(1 if options.ray else options.processes, entered, planned)
    if at_once.reason:
        screen.line("at once", f"{at_once.count}, not {options.processes}: {at_once.reason}")
    with progress, closing(Runner(at_once.count, progress.ended, options.ray)) as trials:
        start = trials({"untouched": trial(entered[0].name, 0, 0.0)})["untouched"]
        search(records, options, job.train.seed, trial, trials)
        report(records, options, job, trial, trials)
    rows = table(
        records, None if scratch else start[options.metric], options.margin, options.metric
    )
    return {
        "run": str(run.folder),
        "command": "bench",
        "exit": 0,
        "baseline": entered[0].name,
        "metric": options.metric,
        "untouched": {name: number(start[name]) for name in job.eval.metrics},
        "margin": options.margin,
        "methods": [
            row
            | {"recipe": outcome.recipe_of(c.job)}
            | {"costs": costs(r, planned[r.name], shared.data)}
            for row, r, c in zip(rows, records, entered, strict=True)
        ],
        "ranking": ranking(records, options.metric),
        "held_fixed": held_fixed(job, options, planned, records)
        | {
            "tokens in a row": str(shared.data.seq_len),
            "test rows": str(sum(len(rows) for rows in split(shared.data.evaluation)[1].values())),
            "model and data, as a hash": content,
        },
        "repeat": repeat(job, options),
        "warnings": screen.warnings,
    }


def search(
    records: Sequence[Record], options: Options, seed: int, trial: Any, trials: Runner
) -> None:
    """Search every candidate's learning rate; the next points of all run together."""
    plan = Plan(options.window, options.purse, share=1.0)
    seeds = range(seed, seed + options.choose)

    def points(r: Record) -> Sequence[float]:
        if options.sampler == "tpe":
            return next_sampled(r.means, plan, seed)
        return next_points({}, r.means, plan)[1]

    while True:
        asked = {
            (i, j, s): trial(r.name, s, lr_at(r.start, j))
            for i, r in enumerate(records)
            for j in points(r)
            for s in seeds
        }
        if not asked:
            return
        for (i, j, s), quantities in trials(asked).items():
            records[i].scores.setdefault(j, {})[s] = validation(quantities, options.metric)


def report(
    records: Sequence[Record], options: Options, job: Job, trial: Any, trials: Runner
) -> None:
    """Train every candidate at its best rate, on seeds that were not used to select it."""
    first = job.train.seed + options.choose
    asked = {
        (i, s): trial(r.name, s, r.lr)
        for s in range(first, first + options.seeds)
        for i, r in enumerate(records)
    }
    for (i, s), quantities in trials(asked).items():
        for name in job.eval.metrics:
            records[i].test.setdefault(name, {})[s] = as_loss(name, quantities[name])
        for name in ("seconds", "peak_bytes", "parameters", "state_bytes"):
            mine = records[i].costs
            mine[name] = mine.get(name, 0.0) + quantities[name] / options.seeds


def validation(quantities: Quantities, metric: str) -> float:
    """The score by which a rate is selected; lower is better."""
    if quantities["diverged"]:
        return math.inf
    return as_loss(metric, quantities[on_validation(metric)])


def costs(r: Record, length: Length, data: Any) -> dict[str, Any]:
    """The four budgets of one run, whichever of them was the limit."""
    return {
        "steps": length.steps,
        "tokens": round(length.steps * length.rows * data.tokens_in_a_row),
        "seconds": r.costs["seconds"],
        "peak_bytes": int(r.costs["peak_bytes"]),
        "state_bytes": int(r.costs["state_bytes"]),
        "trained_parameters": int(r.costs["parameters"]),
    }


def made_equal(options: Options, records: Sequence[Record]) -> str:
    """What was made equal between candidates, and which ones differ."""
    reached = {r.name: r.costs[matching.REACHED[options.match][0]] for r in records}
    said = matching.outcome(options.match, reached)
    return said + ("; peak bytes, by rows" if options.budget.startswith("bytes") else "")


def held_fixed(
    job: Job, options: Options, planned: Mapping[str, Length], records: Sequence[Record]
) -> dict[str, str]:
    """The settings that all candidates share, and what was made equal."""
    steps = {planned[r.name].steps for r in records}
    rows = {planned[r.name].rows for r in records}
    return {
        "model": str(job.model),
        "data": ", ".join(s.path for s in job.data.train),
        "rates and verdicts by": options.metric,
        "budget": options.budget or "steps",
        "matched": made_equal(options, records),
        "steps": " to ".join(str(s) for s in sorted(steps)[:: max(1, len(steps) - 1)]),
        "rows in a batch": " to ".join(str(s) for s in sorted(rows)[:: max(1, len(rows) - 1)]),
        "schedule": f"{job.train.schedule}, warm-up {job.train.warmup:g}",
        "clip": str(job.train.clip),
        "precision": "fp32",
        "data order and initial values": "by seed, the same for all",
    }


def repeat(job: Job, options: Options) -> str:
    """The command that repeats the comparison."""
    default = Options()
    flags = [
        word
        for name, value in options.__dict__.items()
        if name not in ("methods", "processes", "ray") and value != getattr(default, name)
        for word in (f"--{name}", str(value))
    ]
    sources = plain(job.data.train)
    alone = len(sources) == 1 and isinstance(sources[0], str)
    data = sources[0] if alone else f"data={flow(sources)}"
    given = sorted(job.given.items())  # a resumed job has them in another order
    keys = [f"{k}={flow(plain(v))}" for k, v in given if k not in ("model", "data.train", "out")]
    words = [str(job.model), data, "--methods", options.methods, *flags, *keys]
    return f"eckart bench {shlex.join(words)}"


# --- what is said --------------------------------------------------------------------------


def tell(screen: Screen, document: Mapping[str, Any]) -> None:
    """Print the table to stdout."""
    if screen.quiet:
        return
    print(as_text(document))
    folder = outcome.shown(document["run"])
    screen.line("done", f"{folder}/report.html   {folder}/table.csv", result=True)
