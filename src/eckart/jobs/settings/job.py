"""The validated configuration of a command, and its form in config.yaml and resolved.yaml."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eckart.jobs.settings.emit import emit, nested, plain
from eckart.jobs.settings.merge import AXES, BUDGET
from eckart.jobs.settings.tree import OWN, SECTIONS, Budget, Convert, Data, Eval, Train
from eckart.recipe import registry

if TYPE_CHECKING:
    from eckart.recipe import Recipe
    from eckart.recipe.method import Method

PLAIN = ("model", "out", "track")  # keys without a section


@dataclass(frozen=True)
class Flags:
    """Options of the command line that are not keys of the job."""

    out: str | None = None
    seed: int | None = None
    dry_run: bool = False
    json: bool = False
    resume: str | None = None
    overwrite: bool = False


NO_FLAGS = Flags()


@dataclass(frozen=True)
class Choice:
    """The choice on one axis: a slug with its method, or `auto` or `none` without one."""

    name: str
    method: Method | None = None


NONE = Choice("none")
AUTO = Choice("auto")


@dataclass(frozen=True)
class Healing:
    """The training after a compression; `train` is the job's, overridden by heal.train."""

    steps: int
    weights: Choice
    update: Choice
    train: Train


@dataclass(frozen=True)
class Job:
    """The validated configuration of a command."""

    command: str
    model: str | None
    out: str
    track: tuple[str, ...]
    data: Data
    choices: Mapping[str, Choice]  # weights, update, precision, attention, compress, compose
    objectives: tuple[Choice, ...]
    train: Train
    eval: Eval
    compress: Budget
    heal: Healing
    convert: Convert
    options: Mapping[str, Any] = field(default_factory=dict)  # a command's own flags
    flags: Flags = field(default=NO_FLAGS, compare=False)
    given: Mapping[str, Any] = field(default_factory=dict, compare=False)  # key -> value
    settled: Mapping[str, str] = field(default_factory=dict, compare=False)  # key -> reason

    def recipe(self) -> Recipe:
        """The choices as a Recipe; raises UsageError where they cannot combine."""
        from eckart.recipe import Recipe

        chosen: dict[str, Any] = {
            axis: self.choices[axis].method
            for axis in ("weights", "update", "precision", "attention")
        }
        objectives: Any = tuple(c.method for c in self.objectives)
        return Recipe(objective=objectives, **chosen)

    def settle(self, key: str, value: Any, reason: str) -> Job:
        """A copy with one key of a section decided (train.lr, heal.train.steps), and the reason."""
        *sections, field_name = key.split(".")
        parts = [self, *(getattr(self, s) for s in sections[:1])]
        parts += [getattr(parts[-1], s) for s in sections[1:]]
        for part, name in zip(reversed(parts), (field_name, *reversed(sections)), strict=True):
            value = dataclasses.replace(part, **{name: value})
        return dataclasses.replace(value, settled={**self.settled, key: reason})

    def choose(self, axis: str, choice: Choice, reason: str) -> Job:
        """A copy with the choice on one axis decided, and the reason."""
        choices = {**self.choices, axis: choice}
        settled = {**self.settled, f"{axis}.name": reason}
        return dataclasses.replace(self, choices=choices, settled=settled)

    def dump(self) -> str:
        """config.yaml: the given keys, merged. Resolving it again gives an equal job."""
        return emit(nested(self.given))

    def dump_resolved(self) -> str:
        """resolved.yaml: every key, with the reason as a comment where a value was decided."""
        return emit(nested(self.everything()), self.settled)

    def everything(self) -> dict[str, Any]:
        """All keys with their current values."""
        keys = [*PLAIN]
        for section in ("data", "train", "eval"):
            keys += [f"{section}.{f.name}" for f in dataclasses.fields(SECTIONS[section])]
        for axis, choice in self.choices.items():
            if choice != NONE:
                keys += [f"{axis}.{n}" for n in fields_in(choice)]
        keys += [f"objective.{c.name}.{n}" for c in self.objectives for n in fields_in(c)]
        keys += [f"{self.command}.{n}" for n in OWN.get(self.command, ())]
        keys += ["heal.steps"] if self.command == "compress" else []
        keys += [key for key in (*self.given, *self.settled) if key.startswith("heal.")]
        if "train.steps" in self.settled:
            keys.remove("train.epochs")  # replaced by train.steps
        return {key: value_at(self, key) for key in dict.fromkeys(keys)}


def value_at(job: Job, key: str) -> Any:
    """A key's value in a job, as plain data."""
    head, *rest = key.split(".")
    if head == "objective":
        return field_of(next(c for c in job.objectives if c.name == rest[0]), rest[1])
    if head in AXES and (head != "compress" or rest[0] not in BUDGET):
        return field_of(job.choices[head], rest[0])
    value: Any = getattr(job, head)
    for name in rest:
        value = field_of(value, name) if isinstance(value, Choice) else getattr(value, name)
    return plain(value)


def field_of(choice: Choice, name: str) -> Any:
    """A choice's name, or a field of its method."""
    return plain(choice.name if name == "name" else getattr(choice.method, name))


def fields_in(choice: Choice) -> list[str]:
    """`name` and the method's fields."""
    return ["name", *(registry.find(choice.name).fields if choice.method else ())]
