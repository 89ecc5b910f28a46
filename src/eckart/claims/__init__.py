"""Claims of papers as small experiments for a laptop: one declarative file per paper.

A claim file describes an experiment:

    CLAIM = Claim(
        says="a few thousand trained numbers recover nearly all that full fine-tuning gains",
        task=Task(),
        arms=(UNTOUCHED, Arm("full", Recipe(Dense())), Arm("rank 8", Recipe(LoRA(rank=8)))),
        control=lower("full", than="untouched"),
        statements=(recovers("rank 8", 0.9, of="full", start="untouched"),),
        unseen="parity with full fine-tuning at billions of parameters",
    )

`eckart reproduce` searches the best learning rate of every arm, trains it on several seeds in
which all arms see the same data in the same order, and tests each statement on the differences
within seeds. Training that a recipe cannot express is a function of the claim file
(`Arm(run=...)`), as are additional measurements (`Arm(watch=...)`); both receive a `Lab`, which
jobs/lab/bare_loop.py implements.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, nn

from eckart.errors import UsageError, did_you_mean
from eckart.recipe import Handle, Recipe

if TYPE_CHECKING:
    from eckart.io.corpora import Corpus

Batch = Mapping[str, Tensor]
Quantities = Mapping[str, float]  # "loss", "loss@25", "parameters", ..., and a claim's own
Results = Mapping[str, Quantities]  # one seed: arm -> quantities


# --- the task ------------------------------------------------------------------------------

SMALL: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
"""A Llama of 0.5 M parameters over bytes; a run of 200 steps takes a few seconds."""


@dataclass(frozen=True)
class Splits:
    """Examples as tensors [rows, ...], keyed by the model's argument names.

    The learning rate is chosen on `validation` and reported on `test`.
    """

    train: Batch
    validation: Batch
    test: Batch


@dataclass(frozen=True)
class Task:
    """Model, data and training settings that all arms of a claim share."""

    data: str | Callable[[], Splits] = "pydoc-prose"
    """The name of a corpus in io/corpora.py, read as bytes, or a function that returns tensors."""

    pretrained: str | None = "stdlib-code"
    """The corpus that the initial model was pretrained on; None: random weights."""

    shape: Mapping[str, Any] = field(default_factory=lambda: SMALL)
    """Fields of the transformers configuration, without `vocab_size` for text."""

    kind: str = "llama"
    """transformers' model_type."""

    head: str = "causal"
    """The model's task: causal, classification, image, ... (io/presets.py)."""

    steps: int = 200
    batch_size: int = 16
    seq_len: int = 64
    warmup: float = 0.1
    """Share of the steps with linear warm-up; a cosine follows."""
    floor: float = 0.0
    """Share of the learning rate at the end of the cosine."""
    clip: float | None = 1.0
    pretraining_steps: int = 1200
    evaluated: int | None = None
    """Rows of each held-out split that are evaluated; None: all."""
    score: Callable[[nn.Module, Batch], Quantities] | None = None
    """Additional quantities of a test batch, such as an accuracy; averaged over batches."""


# --- the interface for a claim's functions -------------------------------------------------


class Lab(Protocol):
    """The argument of a claim's own functions: trains one arm at one seed and learning rate."""

    task: Task
    seed: int
    lr: float
    steps: int  # fewer than the task's in a quick check or a short run of the search

    def model(self) -> nn.Module:
        """A fresh initial model in training mode: the pretrained one, or random by seed."""
        ...

    def batch(self, step: int) -> Batch:
        """The training batch of a step: the same for all arms of this seed."""
        ...

    def batches(self, count: int) -> list[Batch]:
        """Calibration batches from the training examples, drawn apart from the training batches."""
        ...

    def train(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        lr: float | None = None,
        steps: int | None = None,
        watch: Watches | None = None,
        **attach: Any,
    ) -> Trained:
        """Attach the recipe to the model and train it; `attach` is passed to eckart.attach."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`loss` on the test examples and `validation`, in nats per predicted token."""
        ...

    def on(self, text: str | Corpus) -> Lab:
        """The same lab on another text, split into bytes as the task's own."""
        ...


@dataclass
class Trained:
    """A model after (or, for a watch, during) training."""

    model: nn.Module
    handle: Handle
    optimizer: Any
    step: int
    losses: list[float]  # of the training batches so far
    quantities: dict[str, float]  # "loss", "validation", "parameters", watches', ...


Watch = Callable[[Trained, Lab], Quantities]
Watches = Mapping[int, Watch]  # after this many steps; END: after the last
END = -1


# --- arms and statements -------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One variant in an experiment. Without recipe and run, the initial model is evaluated."""

    name: str
    recipe: Recipe | None = None
    lr: float | None = None
    """The centre of the learning-rate search; None: the recipe's default."""
    search: bool = True
    """Search the learning rate; otherwise use `lr` as it is (None where nothing is trained)."""
    watch: Watches = field(default_factory=dict)
    """Functions that measure additional quantities, by step: {10: norms, END: angles}."""
    loss_at: tuple[int, ...] = ()
    """Steps after which the test loss is also measured, as `loss@STEP`."""
    also_train: tuple[str, ...] = ()
    """Modules trained in full beside the recipe's parameters."""
    run: Callable[[Lab], Quantities] | None = None
    """A function that replaces training by the recipe and returns quantities. They must include
    `validation` where the learning rate is searched."""
    task: Task | None = None
    """This arm's own task, where it differs."""
    full: bool = False
    """Run this arm only with --full."""


UNTOUCHED = Arm("untouched", search=False)


@dataclass(frozen=True)
class Statement:
    """A sentence, and a function of one seed's results that is positive where the sentence holds.

    Confirmed where the confidence interval of its mean over seeds lies above 0, refuted where it
    lies below, otherwise not seen.
    """

    text: str
    excess: Callable[[Results], float]
    unit: str = "nats"


def lower(
    arm: str, *, than: str, by: float = 0.0, quantity: str = "loss", unit: str = "nats"
) -> Statement:
    """The arm has a lower loss (or other quantity) than another, by at least `by`."""
    margin = f" by {by:g}" if by else ""
    text = f"{quantity} of {arm} is lower than of {than}{margin}"
    return Statement(text, lambda r: r[than][quantity] - r[arm][quantity] - by, unit)


def higher(
    arm: str, *, than: str, by: float = 0.0, quantity: str = "loss", unit: str = "nats"
) -> Statement:
    """The arm has a higher quantity than another, by at least `by`."""
    margin = f" by {by:g}" if by else ""
    text = f"{quantity} of {arm} is higher than of {than}{margin}"
    return Statement(text, lambda r: r[arm][quantity] - r[than][quantity] - by, unit)


def matches(
    arm: str, *, of: str, within: float, quantity: str = "loss", unit: str = "nats"
) -> Statement:
    """The arm's quantity is at most `within` above another's: equal up to a fixed margin."""
    text = f"{quantity} of {arm} is at most {within:g} above that of {of}"
    return Statement(text, lambda r: within - (r[arm][quantity] - r[of][quantity]), unit)


def near(arm: str, *, of: str, share: float) -> Statement:
    """The arm's loss is at most `share` (relative) above another's."""
    text = f"loss of {arm} is at most {share:.0%} above that of {of}"
    return Statement(text, lambda r: (1 + share) * r[of]["loss"] - r[arm]["loss"])


def recovers(arm: str, share: float, *, of: str, start: str, quantity: str = "loss") -> Statement:
    """The arm's gain over `start` is at least `share` of the gain of `of`."""
    text = f"{arm} recovers {share:.0%} of what {of} gains over {start}"

    def excess(r: Results) -> float:
        return (r[start][quantity] - r[arm][quantity]) - share * (
            r[start][quantity] - r[of][quantity]
        )

    return Statement(text, excess)


def at_most(arm: str, limit: float, quantity: str, unit: str = "") -> Statement:
    """The quantity is at most a limit that the paper or its theory gives."""
    text = f"{quantity} of {arm} is at most {limit:g}"
    return Statement(text, lambda r: limit - r[arm][quantity], unit)


def at_least(arm: str, limit: float, quantity: str, unit: str = "") -> Statement:
    """The quantity is at least a limit that the paper or its theory gives."""
    text = f"{quantity} of {arm} is at least {limit:g}"
    return Statement(text, lambda r: r[arm][quantity] - limit, unit)


def ordered(
    arms: Sequence[str], quantity: str = "loss", unit: str = "nats"
) -> tuple[Statement, ...]:
    """The quantity decreases from each arm to the next: one statement per pair."""
    return tuple(
        lower(b, than=a, quantity=quantity, unit=unit) for a, b in zip(arms, arms[1:], strict=False)
    )


@dataclass(frozen=True)
class Claim:
    """A paper's claim and the experiment that tests it."""

    says: str
    """The claim in one sentence, as far as it is tested here."""
    arms: tuple[Arm, ...]
    statements: tuple[Statement, ...]
    """Confirmed if all are confirmed, refuted if one is refuted, otherwise not seen."""
    control: Statement
    """The positive control: a known difference. If it is not confirmed, there is no verdict."""
    task: Task = field(default_factory=Task)
    full: Task | None = None
    """The task under --full; None: `task`."""
    unseen: str = ""
    """Further claims of the paper that an experiment of this size cannot show."""
    seeds: int = 5
    """Number of test seeds, at least 3; --full uses twice as many."""

    def chosen(self, budget: Budget) -> tuple[Arm, ...]:
        """The arms that run under a budget."""
        return tuple(arm for arm in self.arms if budget == "full" or not arm.full)


Budget = Literal["quick", "default", "full"]


# --- which claims there are ----------------------------------------------------------------


def folders() -> list[Path]:
    """This folder, and those in ECKART_CLAIMS (separated like PATH)."""
    more = os.environ.get("ECKART_CLAIMS", "").split(os.pathsep)
    return [Path(__file__).parent, *(Path(p) for p in more if p)]


def slugs() -> list[str]:
    """The names of all claims, sorted, with hyphens."""
    return sorted(path.stem.replace("_", "-") for path in files())


def files() -> Iterator[Path]:
    for folder in folders():
        yield from (path for path in folder.glob("*.py") if path.name[0] != "_")


def load(slug: str) -> Claim:
    """Load a claim by its name, with hyphens or underscores.

    Raises UsageError with the nearest name for an unknown one.
    """
    name = slug.replace("-", "_")
    path = next((p for p in files() if p.stem == name), None)
    if path is None:
        raise UsageError(
            f"no claim is called {slug}     command line", fix=did_you_mean(slug, slugs())
        )
    if path.parent == Path(__file__).parent:
        return import_module(f"eckart.claims.{name}").CLAIM
    spec = spec_from_file_location(f"eckart_claim_{name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses need the module there
    spec.loader.exec_module(module)
    return module.CLAIM
