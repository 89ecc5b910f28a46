"""The tree of keys of every job: what may stand in a file or on the command line, and its range.

The docstring under a field is its help text and stands in the schema. The sections for the
axes (weights, update, ...) have the fields of the method that is chosen there; see `config`.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval

Auto = Literal["auto"]


@dataclass(frozen=True)
class Section:
    """What pydantic is told about all sections."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }


@dataclass(frozen=True)
class Source(Section):
    """One file or hub data set of a mixture."""

    path: str
    """A file, a folder or a hub id; a path that exists never touches the network."""
    weight: Annotated[float, Gt(0)] = 1.0
    """Share of the rows drawn from it, relative to the others'."""
    encoding: str = "utf-8"
    """How its text files are encoded."""


@dataclass(frozen=True)
class Data(Section):
    """What is trained on and held out."""

    train: tuple[Source, ...] = ()
    """A path, a list of paths, or a list of {path: ..., weight: ..., encoding: ...} to mix."""
    eval: Annotated[float, Interval(ge=0, lt=1)] | tuple[str, ...] = 0.02
    """The share of rows held out, or paths of held-out files; 0 for none."""
    format: str = "auto"
    """How rows are read (text, messages, prompt and completion, ...); auto looks at them."""
    seq_len: Annotated[int, Ge(2)] | Auto = "auto"
    """Tokens in a row at most."""
    tokenizer: str | None = None
    """`bytes`, or where it lies; null takes the model's own, and where a model is pretrained that
    has none, trains one on the data."""


@dataclass(frozen=True)
class Train(Section):
    """The loop: how long, how fast, how often saved."""

    steps: Annotated[int, Ge(1)] | Auto = "auto"
    """Optimizer steps."""
    epochs: Annotated[float, Gt(0)] | None = None
    """Passes over the data, instead of steps."""
    batch_size: Annotated[int, Ge(1)] | Auto = "auto"
    """Rows in a batch of one process."""
    accumulate: Annotated[int, Ge(1)] | Auto = "auto"
    """Batches summed up before a step."""
    lr: Annotated[float, Gt(0)] | Auto = "auto"
    """Learning rate, whatever the recipe; a method may give the default."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What the learning rate does after the warm-up."""
    warmup: Annotated[float, Ge(0)] = 0.03
    """A share of the steps below 1, a number of steps from 1 on."""
    clip: Annotated[float, Gt(0)] | None = 1.0
    """Greatest norm of the gradients as applied; null for no clipping."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of initial values, data order and masks."""
    save_every: Annotated[int, Ge(1)] | Auto = "auto"
    """Steps between checkpoints."""
    keep: Annotated[int, Ge(1)] = 2
    """Checkpoints kept besides the best one."""
    best: bool = True
    """Is the result the checkpoint with the best held-out loss, not the last?"""
    patience: Annotated[int, Ge(1)] | None = None
    """Evaluations without a better loss before it stops; null for never."""
    checkpointing: bool | Auto = "auto"
    """Are activations computed again in the backward pass, to save memory?"""
    layerwise: bool = False
    """Is each gradient projected as soon as it is there, and freed? For update rules that
    project (galore, ...); others are refused with the reason."""
    compile: bool = False
    """Is the model compiled by torch.compile?"""
    processes: Annotated[int, Ge(1)] = 1
    """Processes that share the work."""


@dataclass(frozen=True)
class Eval(Section):
    """How often and by what a model is measured."""

    every: Annotated[int, Ge(1)] | Auto = "auto"
    """Steps between evaluations."""
    metrics: tuple[str, ...] | Auto = "auto"
    """Names of metrics beside the loss."""


@dataclass(frozen=True)
class Budget(Section):
    """How small a compressed model is to be: one of keep, rank and error."""

    keep: Annotated[float, Interval(gt=0, le=1)] | None = 0.8
    """The share of the targeted parameters that stays."""
    rank: Annotated[int, Ge(1)] | None = None
    """The same rank everywhere."""
    error: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """The relative error allowed at each map."""
    samples: Annotated[int, Ge(1)] = 128
    """Calibration rows read from DATA."""


@dataclass(frozen=True)
class Heal(Section):
    """Training after a compression; heal.update and heal.train as without heal."""

    steps: Annotated[int, Ge(0)] = 0
    """Optimizer steps; 0 for none."""


@dataclass(frozen=True)
class Convert(Section):
    """How a model or adapter is written in another form; `convert.` may be left out there."""

    rank: Annotated[int, Ge(1)] | None = None
    """The rank of an approximation, where no exact form is wanted or there is none."""
    max_drift: Annotated[float, Gt(0)] | None = None
    """The KL in nats per token that an approximation may cost; gives the smallest such rank."""
    base: str | None = None
    """The base: of an adapter whose own is elsewhere now, or the model to write a difference to."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The number format of a dense result; auto keeps the base's."""


SECTIONS: dict[str, type[Section]] = {
    "data": Data,
    "train": Train,
    "eval": Eval,
    "compress": Budget,
    "heal": Heal,
    "convert": Convert,
}
OWN = {  # after these commands X stands for COMMAND.X
    command: tuple(f.name for f in fields(SECTIONS[command])) for command in ("compress", "convert")
}
