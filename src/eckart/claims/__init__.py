"""What a paper promises, on a scale that a laptop can check: one file per paper, no code to run.

A claim file reads like the protocol of an experiment:

    CLAIM = Claim(
        says="a few thousand trained numbers recover nearly all that full fine-tuning gains",
        task=Task(),
        arms=(UNTOUCHED, Arm("full", Recipe(Dense())), Arm("rank 8", Recipe(LoRA(rank=8)))),
        control=lower("full", than="untouched"),
        statements=(recovers("rank 8", 0.9, of="full", start="untouched"),),
        unseen="parity with full fine-tuning at billions of parameters",
    )

The lab (`jobs/lab/bare_loop.py`, handed over by `eckart reproduce`) trains every arm with its own
best learning rate, then several seeds in which all arms see the same data in the same order, and
judges each statement on the differences within seeds. What a lab cannot train by a recipe
alone, a function of the claim file does (`Arm(run=...)`), or measures (`Arm(watch=...)`).
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
    """Examples as tensors of equal length, by the names under which the model takes them.

    The learning rate is chosen on `validation` and reported on `test`.
    """

    train: Batch
    validation: Batch
    test: Batch


@dataclass(frozen=True)
class Task:
    """A model, its data and its training: what all arms of a claim have in common."""

    data: str | Callable[[], Splits] = "pydoc-prose"
    """A corpus of io/corpora.py as bytes, or a function of the claim file that makes tensors."""

    pretrained: str | None = "stdlib-code"
    """The corpus that the model was trained on before, once for all; None: random weights."""

    shape: Mapping[str, Any] = field(default_factory=lambda: SMALL)
    """Fields of the transformers configuration, `vocab_size` left out for text."""

    kind: str = "llama"
    """transformers' model_type."""

    head: str = "causal"
    """What the model is for: causal, classification, image, ... (io/presets.py)."""

    steps: int = 200
    batch_size: int = 16
    seq_len: int = 64
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises; then a cosine."""
    floor: float = 0.0
    """Share of the learning rate that is left at the end."""
    clip: float | None = 1.0
    pretraining_steps: int = 1200
    evaluated: int | None = None
    """Rows of each held-out part that are evaluated; None: all of them."""
    score: Callable[[nn.Module, Batch], Quantities] | None = None
    """Further quantities of the test examples, for example an accuracy; means over batches."""


# --- the lab, as a claim sees it -----------------------------------------------------------


class Lab(Protocol):
    """What a claim's own functions are given: one arm at one seed and learning rate."""

    task: Task
    seed: int
    lr: float
    steps: int  # fewer than the task's in a quick check or a first look at a learning rate

    def model(self) -> nn.Module:
        """A fresh start model in training mode: the pretrained one, or random from the seed."""
        ...

    def batch(self, step: int) -> Batch:
        """The training batch of a step: the same for all arms of this seed."""
        ...

    def batches(self, count: int) -> list[Batch]:
        """Calibration batches from the training examples, none of them a training batch."""
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
        """Attach the recipe to the model and train it; `attach` goes to eckart.attach."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`loss` on the test examples and `validation`, in nats per predicted token."""
        ...

    def on(self, text: str | Corpus) -> Lab:
        """The same lab with other text, cut into bytes as the task's own is."""
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
    """One way to do the task. Neither recipe nor run: the start model, only evaluated."""

    name: str
    recipe: Recipe | None = None
    lr: float | None = None
    """Where the search for the learning rate begins; None: the recipe's default."""
    search: bool = True
    """Is the learning rate searched? Else `lr` is taken as it is, or none where nothing trains."""
    watch: Watches = field(default_factory=dict)
    """Quantities of the claim's own, measured during training: {10: norms, END: angles}."""
    loss_at: tuple[int, ...] = ()
    """Steps after which the test loss is measured too, as `loss@STEP`."""
    also_train: tuple[str, ...] = ()
    """Modules trained whole beside the recipe's."""
    run: Callable[[Lab], Quantities] | None = None
    """Instead of training by the recipe: anything, from the lab to named numbers. Must give
    `validation` where its learning rate is searched."""
    task: Task | None = None
    """This arm's own task, where it differs."""
    full: bool = False
    """Only with --full; left out otherwise, and said so."""


UNTOUCHED = Arm("untouched", search=False)


@dataclass(frozen=True)
class Statement:
    """A number per seed that is positive exactly where the sentence holds.

    Confirmed where the interval of its mean over seeds lies above 0, refuted where it lies
    below, else not seen.
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
    """The arm is at most `within` above another: as good, up to a margin said beforehand."""
    text = f"{quantity} of {arm} is at most {within:g} above that of {of}"
    return Statement(text, lambda r: within - (r[arm][quantity] - r[of][quantity]), unit)


def near(arm: str, *, of: str, share: float) -> Statement:
    """The arm's loss is at most a share above another's."""
    text = f"loss of {arm} is at most {share:.0%} above that of {of}"
    return Statement(text, lambda r: (1 + share) * r[of]["loss"] - r[arm]["loss"])


def recovers(arm: str, share: float, *, of: str, start: str, quantity: str = "loss") -> Statement:
    """The arm gains at least a share of what another gains over the start."""
    text = f"{arm} recovers {share:.0%} of what {of} gains over {start}"

    def excess(r: Results) -> float:
        return (r[start][quantity] - r[arm][quantity]) - share * (
            r[start][quantity] - r[of][quantity]
        )

    return Statement(text, excess)


def at_most(arm: str, limit: float, quantity: str, unit: str = "") -> Statement:
    """A measured quantity is at most a limit that the paper or its theory gives."""
    text = f"{quantity} of {arm} is at most {limit:g}"
    return Statement(text, lambda r: limit - r[arm][quantity], unit)


def at_least(arm: str, limit: float, quantity: str, unit: str = "") -> Statement:
    """A measured quantity is at least a limit that the paper or its theory gives."""
    text = f"{quantity} of {arm} is at least {limit:g}"
    return Statement(text, lambda r: r[arm][quantity] - limit, unit)


def ordered(
    arms: Sequence[str], quantity: str = "loss", unit: str = "nats"
) -> tuple[Statement, ...]:
    """The quantity falls from each arm to the next: one statement per step."""
    return tuple(
        lower(b, than=a, quantity=quantity, unit=unit) for a, b in zip(arms, arms[1:], strict=False)
    )


@dataclass(frozen=True)
class Claim:
    """A paper's claim, the experiment that tests it here, and what would count as an answer."""

    says: str
    """The claim in one sentence, as far as it is tested here."""
    arms: tuple[Arm, ...]
    statements: tuple[Statement, ...]
    """What must hold: all confirmed -> confirmed; one refuted -> refuted; else not seen."""
    control: Statement
    """A difference that is there beyond doubt. Where it is not seen, nothing is concluded."""
    task: Task = field(default_factory=Task)
    full: Task | None = None
    """The task of --full, where it is a larger one."""
    unseen: str = ""
    """What the paper claims beside this and no experiment of this size can show."""
    seeds: int = 5
    """Seeds of the report; at least 3. --full takes twice as many."""

    def chosen(self, budget: Budget) -> tuple[Arm, ...]:
        """The arms that a budget runs."""
        return tuple(arm for arm in self.arms if budget == "full" or not arm.full)


Budget = Literal["quick", "default", "full"]


# --- which claims there are ----------------------------------------------------------------


def folders() -> list[Path]:
    """This folder, and those of ECKART_CLAIMS (separated like PATH)."""
    more = os.environ.get("ECKART_CLAIMS", "").split(os.pathsep)
    return [Path(__file__).parent, *(Path(p) for p in more if p)]


def slugs() -> list[str]:
    """All claims by the names that people type, sorted."""
    return sorted(path.stem.replace("_", "-") for path in files())


def files() -> Iterator[Path]:
    for folder in folders():
        yield from (path for path in folder.glob("*.py") if path.name[0] != "_")


def load(slug: str) -> Claim:
    """The claim of a slug, hyphens or underscores; UsageError names the nearest one."""
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
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module.CLAIM
