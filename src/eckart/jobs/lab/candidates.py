"""The candidates of a bench, and one training run of a candidate.

    lora   dora+lora-pro   lora:rank=4   dense+fira:rank=8:every=50

Methods joined by + form one recipe; a method's fields follow its name after colons. All
candidates share the job's data, batch size, schedule and steps, and differ in the recipe.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import has_magic
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.claims import Task
from eckart.errors import UsageError
from eckart.io.heads import outside
from eckart.io.models import config_of, recognise
from eckart.io.packing import order
from eckart.io.presets import build_model
from eckart.io.text import Data
from eckart.jobs import finetune, pretrain
from eckart.jobs.lab.bare_loop import TaskLab
from eckart.jobs.lab.tasks import digest, warm_cosine
from eckart.jobs.lab.trials import described, own_source, source_of_rooms
from eckart.jobs.measuring.devices import on_device
from eckart.jobs.settings import settle
from eckart.jobs.settings.config import build, refuse_unknown, suited
from eckart.jobs.settings.job import Choice, Job
from eckart.jobs.settings.merge import Given
from eckart.jobs.settings.words import read_words
from eckart.jobs.training import classes, modality, prepare
from eckart.jobs.training.held_out import from_sums, names, summed
from eckart.recipe import Recipe, registry
from eckart.recipe.fingerprint import fingerprint
from eckart.recipe.registry import DEFAULTS, FULL

PLACE = "--methods"
TURNS = 16  # blocks of held-out rows, alternating between validation and test
EVALUATED = 16  # rows in an evaluation batch at least: without gradients memory is no limit
RECIPE_AXES = ("weights", "update", "precision", "attention")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A named recipe, held as the job that trains it."""

    name: str
    job: Job

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe()


def parse_candidates(text: str, job: Job) -> list[Candidate]:
    """Parse `--methods`: the baseline first, then the named candidates, without duplicates."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(
            "nothing to compare     --methods", fix="Type for example --methods lora,dora"
        )
    found = [parse_candidate(name, job) for name in dict.fromkeys([baseline_of(job), *names])]
    seen: dict[Recipe, str] = {}
    for one in found:
        if one.recipe in seen:
            raise UsageError(
                "two methods are the same recipe",
                [(one.name, seen[one.recipe])],
                "Leave one of them out.",
            )
        seen[one.recipe] = one.name
    return found


def baseline_of(job: Job) -> str:
    """The baseline's name: full training for random weights, else the default adapter."""
    return FULL if starts_at_random(job) else DEFAULTS["weights"]


def starts_at_random(job: Job) -> bool:
    """Is MODEL a configuration or preset without weights?"""
    return recognise(job.model or "").kind in ("preset", "config")


def parse_candidate(name: str, job: Job) -> Candidate:
    """Parse one entry of `--methods`.

    Raises UsageError for unknown methods or fields, two methods on one axis, or a recipe whose
    parts cannot combine.
    """
    given: Given = {}
    entries: dict[tuple[str, ...], Any] = {}
    for part in name.split("+"):
        slug, *fields = part.strip().split(":")
        entry = registry.find(slug, place=PLACE)
        if entry.axis not in (*RECIPE_AXES, "objective"):
            raise UsageError(
                f"{entry.name} trains nothing     {PLACE}", [(entry.name, f"a {entry.axis} method")]
            )
        key = (entry.axis, entry.name) if entry.axis == "objective" else (entry.axis,)
        if key in entries:
            raise UsageError(
                f"two choices for one axis     {PLACE}", [(name, f"{entry.axis} has one place")]
            )
        entries[key] = entry
        for setting in read_words([f"{'.'.join(key)}.{field}" for field in fields]):
            given[setting.key] = dataclasses.replace(setting, place=f"{PLACE} {name}")
    if ("weights",) not in entries:
        update = entries.get(("update",))
        whole = starts_at_random(job) or (update is not None and update.wants == "matrices")
        entries["weights",] = registry.find(FULL if whole else DEFAULTS["weights"])
    entries.setdefault(("update",), registry.find(DEFAULTS["update"]))
    refuse_unknown(given, entries)
    chosen = {key: Choice(e.name, build(e, given, key)) for key, e in entries.items()}
    choices = {axis: chosen.get((axis,), choice) for axis, choice in job.choices.items()}
    choices["weights"] = suited(choices, {k[1] for k in given if k[0] == "weights"}, {})
    objectives = tuple(c for key, c in chosen.items() if key[0] == "objective")
    mine = dataclasses.replace(job, choices=choices, objectives=objectives or job.objectives)
    mine.recipe()
    weights: Any = choices["weights"].method
    if weights.stages:
        raise UsageError(
            f"{weights.slug} trains in stages     {PLACE}",
            [(name, ", ".join(stage.name for stage in weights.stages))],
            "A bench compares trainings of one stage.",
        )
    return Candidate(name, mine)


def with_absolute_paths(job: Job) -> Job:
    """The job with absolute paths: workers of a cluster run in other working directories."""

    def whole(path: str) -> str:
        here = Path(path).expanduser()
        return str(here.absolute()) if here.exists() or has_magic(path) else path

    data, tokenizer = job.data, job.data.tokenizer
    data = dataclasses.replace(
        data,
        train=tuple(dataclasses.replace(s, path=whole(s.path)) for s in data.train),
        eval=tuple(map(whole, data.eval)) if isinstance(data.eval, tuple) else data.eval,
        tokenizer=tokenizer and whole(tokenizer),
    )
    return dataclasses.replace(job, model=job.model and whole(job.model), data=data)


# --- model and data ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Workload:
    """The model and the data that all candidates share."""

    model: nn.Module
    data: Data
    vocab: int | None  # vocabulary size, for a preset that has none

    @property
    def content(self) -> str:
        """A hash of the weights and of the rows as they were read and split."""
        data = self.data
        rows = [len(data.train), *((name, len(part)) for name, part in data.evaluation.items())]
        return digest([fingerprint(self.model), data.sha256, data.summary, data.seq_len, rows])


_workloads: dict[str, Workload] = {}


def workload(job: Job) -> Workload:
    """The model and the data of a job, cached per process for the last job."""
    key = repr((job.model, job.data))
    if key not in _workloads:
        _workloads.clear()
        _workloads[key] = read_workload(job)
    return _workloads[key]


def read_workload(job: Job) -> Workload:
    """Load MODEL and DATA. All candidates train in fp32, so that precision is no difference."""
    place = prepare.device()
    if starts_at_random(job):
        shape = pretrain.shape_of(job)
        reader = pretrain.tokenizer_for(job, shape)
        vocab = len(reader) if recognise(shape).kind == "preset" else None
        model: Any = build_model(config_of(shape, vocab), seed=0)
    else:
        classes.require_task(job)
        vocab, reader = None, modality.reader_of(job)
        opened = finetune.open_base(job, reader)
        if opened.handle is not None:
            raise UsageError(
                "a bench starts from a model, not from an adapter",
                [(str(job.model), "an adapter")],
                f"Merge it first: eckart convert {job.model} --to dense -o MERGED",
            )
        model = opened.model
    modality.require_fit(job, reader, model)
    job = modality.settled(job, model, place)
    data = modality.read_data(job, reader, model)
    return Workload(model.float().to(place), data, vocab)


class UserLab(TaskLab):
    """A `TaskLab` on the user's model and data."""

    def __init__(self, job: Job, seed: int, lr: float, steps: int, rows: int):
        self.job, self.workload, self.rows = job, workload(job), rows
        self.task = Task(steps=steps, batch_size=rows, clip=job.train.clip)
        self.seed, self.lr, self.steps = seed, lr, steps

    def model(self) -> nn.Module:
        if starts_at_random(self.job):
            shape = config_of(pretrain.shape_of(self.job), self.workload.vocab)
            return build_model(shape, seed=self.seed).to(prepare.device()).train()
        return copy.deepcopy(self.workload.model).train()

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        """Modules trained in full beside the adapter: the classification head, if there is one."""
        return tuple(outside(model)) if self.workload.data.labels else ()

    def batch(self, step: int) -> dict[str, Any]:
        n = len(self.workload.data.train)
        places = range(step * self.rows, (step + 1) * self.rows)
        return self.collated([int(shuffled(n, self.seed, p // n)[p % n]) for p in places])

    def batches(self, count: int) -> list[Any]:
        n = len(self.workload.data.train)
        chosen = order(n, self.seed, -1).tolist()
        groups = [chosen[i * self.rows : (i + 1) * self.rows] for i in range(count)]
        return [self.collated(group) for group in groups if group]

    def collated(self, indices: Sequence[int]) -> dict[str, Any]:
        data = self.workload.data
        return on_device(data.collate([data.train[i] for i in indices]), prepare.device())

    def rate(self, step: int, steps: int) -> float:
        train = dataclasses.replace(self.job.train, steps=steps)
        warmup = settle.warmup_steps(train)
        if train.schedule == "cosine" or step < warmup:
            return warm_cosine(step, steps, warmup / steps)
        if train.schedule == "constant":
            return 1.0
        return max(0.0, (steps - step) / max(1, steps - warmup))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Every metric on the test rows, and as `validation` on the validation rows."""
        was_training, data = model.training, self.workload.data
        model.eval()
        try:
            at_once, halves = max(self.rows, EVALUATED), split(data.evaluation)
            choosing, test = (
                from_sums({n: summed(model, rows, data, at_once) for n, rows in half.items()}, data)
                for half in halves
            )
        finally:
            model.train(was_training)
        known = names(data)
        found = {name: test.get(name, math.nan) for name in known}
        return found | {on_validation(name): choosing.get(name, math.nan) for name in known}


def on_validation(metric: str) -> str:
    """The name of a metric on the validation rows, by which the learning rate is chosen."""
    return "validation" if metric == "loss" else f"validation_{metric}"


@lru_cache(maxsize=2)  # a batch may span two epochs
def shuffled(n: int, seed: int, epoch: int) -> Any:
    """`order`, cached."""
    return order(n, seed, epoch)


def split(sources: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split held-out rows into validation and test, in alternating blocks of neighbours.

    Rows keep the order of their file. A cut in the middle would give two parts on different
    topics with different best learning rates: on Python's reference, Fira's was three times too
    large, and Fira came out worse than LoRA instead of better.
    """
    parts: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for name, rows in sources.items():
        turn = max(1, math.ceil(len(rows) / TURNS))
        for k, part in enumerate(parts):
            part[name] = rows.select([i for i in range(len(rows)) if i // turn % 2 == k])
    return parts


# --- one run -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BenchTrial:
    """One candidate at one seed and learning rate; `lr` 0 evaluates the initial model."""

    name: str
    job: Job
    seed: int
    lr: float
    steps: int
    rows: int
    content: str  # hash of the model and the data
    folder: str

    @property
    def described(self) -> str:
        return f"{self.name}  seed {self.seed}  lr {self.lr:.2g}" if self.lr else "untouched"

    @property
    def file(self) -> Path:
        return Path(self.folder) / f"{digest(self.facts())}.json"

    def prepare(self) -> None:
        """Does nothing: each worker reads the model and the data itself."""

    def measure(self) -> dict[str, float]:
        lab = UserLab(self.job, self.seed, self.lr, self.steps, self.rows)
        model = lab.model()
        if not self.lr:
            return lab.evaluate(model)
        return lab.train(model, self.job.recipe(), also_train=lab.heads(model)).quantities

    def facts(self) -> dict[str, Any]:
        train = self.job.train
        return {
            "content": self.content,
            "recipe": described(self.job.recipe()),
            "seed": self.seed,
            "lr": self.lr,
            "steps": self.steps,
            "rows": self.rows,
            "training": [train.schedule, train.warmup, train.clip],
            "turns": TURNS,
            "source": [source_of_rooms(), own_source(UserLab), own_source(from_sums)],
            "torch": torch.__version__,
        }
