"""The contract of methods: what a file in `methods/` may declare, one class per axis.

A method is a frozen dataclass of its hyper-parameters with the maths beside it. It declares what
it promises and what it needs; the library does the rest (seeds, dtypes, hooks, saving, merging,
resuming). Nothing here refers to a method by name.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from eckart.recipe.fields import check_fields

if TYPE_CHECKING:
    from eckart.linear import Site, Term
    from eckart.optim import Rule
    from eckart.recipe.handle import Handle

# A learning rate, or {rate: {field: value(s) for which it holds}} for one that a field decides.
Rates = float | Mapping[float, Mapping[str, Any]] | None


@dataclass(frozen=True)
class Paper:
    """The paper that a method comes from."""

    title: str
    url: str
    venue: str = ""


@dataclass(frozen=True)
class Cost:
    """What a method adds to ONE [m, n] matrix, in elements and FLOPs.

    `parameters` trained elements, `frozen` further stored elements, `shared` elements held
    once per model, `state` elements of optimizer state, `flops_per_token` forward FLOPs.
    """

    parameters: int = 0
    frozen: int = 0
    shared: int = 0
    state: int = 0
    flops_per_token: int = 0


@dataclass(frozen=True)
class Now:
    """What an event receives: the step completed or about to start, live terms and model."""

    step: int
    steps: int | None
    terms: Mapping[str, Mapping[str, Term]]  # site path -> term name -> term
    generator: torch.Generator  # seeded by (seed, event, step): the same on every process
    model: nn.Module


@dataclass(frozen=True)
class Event:
    """Something that happens at certain optimizer steps and changes tensors in place.

    `at` is called with the number of completed steps. `moments` says what happens to the optimizer
    state of all terms' parameters, unless `run` returns False, which means that nothing was done.
    If `moments` is a function, it is called with each parameter's state, to change in place, and
    the parameter.
    """

    name: str
    at: Callable[[int], bool]
    run: Callable[[Now], bool | None]
    when: Literal["before", "after"] = "after"
    moments: Literal["keep", "reset"] | Callable[[dict[str, Any], Tensor], None] = "keep"


def every_step(step: int) -> bool:
    """For `Event.at`: always."""
    return True


@dataclass(frozen=True)
class Cut:
    """A change of shape within one training: which rank components are kept.

    `at` is called with the number of completed steps and the total number of steps. `kept` returns
    {site path: {term name: int64 indices along the rank axis}}; `Term.select` defines what happens
    to the others. The library checkpoints, rebuilds from the saved structure, migrates the
    optimizer's state along the same axis and resumes: step count, schedule and data position
    continue. A cut that is not `needed` only frees memory: the training is the same without it.
    """

    name: str
    at: Callable[[int, int | None], bool]
    kept: Callable[[Now], dict[str, dict[str, Tensor]]]
    needed: bool = True


@dataclass(frozen=True)
class Stage:
    """One part of a job that has several: a one-shot operation or a training.

    `base` names the stage (or "original") whose model this one starts from, `reads` the earlier
    stages whose output it needs, `repeat` what it is repeated over ("tasks" or nothing),
    `optimizer` whether the optimizer state starts fresh or is carried over.
    """

    name: str
    kind: Literal["train", "operate"]
    base: str = ""
    reads: tuple[str, ...] = ()
    train: str = "terms"
    repeat: Literal["", "tasks"] = ""
    optimizer: Literal["fresh", "migrate"] = "fresh"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """The input of a one-shot stage, which it modifies to return its results.

    `handle` is None where no terms are attached. `read` holds the `output` of the stages in
    `stage.reads`: {stage name: {tensor name: tensor}}. `batches` gathers calibration batches of
    the task's data.
    """

    stage: Stage
    model: nn.Module
    handle: Handle | None = None
    task: str = ""
    read: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    output: Mapping[str, Tensor] = field(default_factory=dict)
    batches: Callable[[], list[dict[str, Any]]] = list


@dataclass(frozen=True)
class Method:
    """Base class of every method: plain data, frozen, validated on construction."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }
    axis: ClassVar[str] = ""
    paper: ClassVar[Paper | None] = None
    mission: ClassVar[bool] = False  # one of the 36 papers, or beside them
    promises: ClassVar[Any] = ()  # names, or {name: {field: value(s) for which it holds}}
    needs: ClassVar[Any] = ()  # "gradients", "activations", ..., "horizon"; or as promises
    stages: ClassVar[tuple[Stage, ...]] = ()
    size: ClassVar[str] = "rank"  # the field, where it has it, that says how large it is
    default_lr: ClassVar[Rates] = None  # None, of an update: the weights method's
    scratch_lr: ClassVar[Rates] = None  # from random weights; None: the same

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def slug(self) -> str:
        """The name users type: the file's name, with hyphens."""
        return type(self).__module__.rsplit(".", 1)[-1].replace("_", "-")

    def promised(self, promise: str) -> bool:
        """Does this configuration make a promise? Conditional promises depend on the fields."""
        return self.declared(self.promises, promise)

    @property
    def needed(self) -> set[str]:
        """What this configuration needs of data and horizon; conditions depend on the fields."""
        return {need for need in self.needs if self.declared(self.needs, need)}

    def usual_lr(self, scratch: bool = False) -> float | None:
        """The default learning rate of a training; with `scratch`, of one from random weights."""
        rates = self.default_lr if not scratch or self.scratch_lr is None else self.scratch_lr
        if not isinstance(rates, Mapping):
            return rates
        return next(rate for rate in rates if self.declared(rates, rate))

    def declared(self, declaration: Any, name: Any) -> bool:
        """Does a declaration, names or {name: {field: value(s)}}, hold for this configuration?"""
        if name not in declaration:
            return False
        if not isinstance(declaration, Mapping):
            return True
        conditions = declaration[name] or {}
        return all(
            getattr(self, field) in (value if isinstance(value, tuple | list) else (value,))
            for field, value in conditions.items()
        )

    def events(self) -> Iterable[Event | Cut]:
        """Events at certain steps; none by default."""
        return ()

    def rate(self, step: int) -> float:
        """The factor on all learning rates in the step after `step` completed ones."""
        return 1.0

    def operate(self, work: Work) -> Work:
        """Run a stage of kind "operate"; `work.stage.name` says which."""
        raise NotImplementedError(f"{self.slug} does not say how to {work.stage.name}")


@dataclass(frozen=True)
class Weights(Method):
    """What is the map made of, and which part of it is trained?"""

    targets: tuple[str, ...] = field(default=("linear",), kw_only=True)
    """Which maps: roles (attn, attn.q, mlp, ssm, linear, embedding, head, experts, conv, all),
    module names, globs, `re:` patterns, layer ranges such as layers.0-3."""

    overrides: tuple[dict[str, Any], ...] = field(default=(), kw_only=True)
    """Other values of this method's fields at some maps: {match: "layers.0-3", rank: 8}."""

    axis: ClassVar[str] = "weights"
    base: ClassVar[Literal["frozen", "trained", "dropped", "rewritten"]] = "frozen"
    """rewritten: frozen for the optimizer, changed in place by events."""
    rest: ClassVar[Literal["frozen", "trained"]] = "frozen"  # what has no terms
    offers: ClassVar[tuple[str, ...]] = ("pairs",)  # to update rules: "pairs", "matrices"
    peft_type: ClassVar[str | None] = None
    peft_shared: ClassVar[tuple[str, ...]] = ()  # tensors that PEFT keeps once, at the root
    default_lr: ClassVar[Rates] = 1e-3

    @property
    def trains_the_model(self) -> bool:
        """Are tensors of the model itself trained? They stay in fp32 in every precision."""
        return "trained" in (self.base, self.rest)

    def build(self, sites: list[Site]) -> dict[str, dict[str, nn.Module]]:
        """The terms of all sites at once: {site.path: {name: term}}; {} leaves a site alone.

        A term called "dense" replaces the base matrix (the original is kept); one called
        "gain" multiplies the output rows.
        """
        return {site.path: dict(self.at(site).build_one(site)) for site in sites}

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        """The terms of one site."""
        raise NotImplementedError

    def at(self, site: Site) -> typing.Self:
        """This method with the overrides that match the site."""
        return dataclasses.replace(self, **site.overrides) if site.overrides else self

    def cost(self, m: int, n: int) -> Cost:
        """The cost of one [m, n] matrix."""
        return Cost()

    def flat(self) -> Weights | None:
        """This method with sizes that do not depend on the values of a matrix, for estimates,
        which have none; None if there is no such form.
        """
        return None

    def ratios(self, name: str, tensor: Tensor) -> dict[str, float]:
        """Ratios for a trained tensor's group: lr, weight_decay; 1 where absent."""
        return {}

    def to_peft(
        self, site: Site, parts: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """One site in the form of PEFT's `peft_type`: its tensors and its config's entries.

        Matrices have the layout [*, m, n] of the site (`lora_A` [*, r, n]); io/peft_layout.py
        converts them to the layout of the layer. None if this configuration has no such form.
        """
        return None

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> typing.Self | None:
        """This method from a PEFT config of its type; None if the config is another method."""
        return None

    def parts_from_peft(self, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        """The parts of one site, from the tensors named as in `to_peft`."""
        raise NotImplementedError

    def to_peft_shared(self, shared: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The tensors named in `peft_shared`, from the modules at the model's root."""
        return {}

    def shared_from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        """The modules at the model's root, from those tensors."""
        return {}


@dataclass(frozen=True)
class Update(Method):
    """How does a gradient become a change of the weights?"""

    targets: tuple[str, ...] = field(default=("linear",), kw_only=True)
    """Which trained matrices the rule acts on; all others follow `plain`."""

    axis: ClassVar[str] = "update"
    wants: ClassVar[Literal["any", "matrices", "pairs"]] = "any"

    def rule(self) -> Rule:
        """The parts of the rule for the parameters that the method acts on."""
        raise NotImplementedError

    def plain(self) -> Rule:
        """The parts of the rule for all other parameters; by default the inner rule alone."""
        return self.rule().plain

    def plain_lr(self) -> float:
        """The learning rate of parameters that follow `plain`, as a share of the rule's."""
        return 1.0

    def branch_gradient(self) -> Callable[[Tensor, Tensor, float], Tensor] | None:
        """A row factor (B, A, scale) -> [m] that factor pairs apply in their backward."""
        return None

    def asks(self, weights: Weights) -> Mapping[str, Any]:
        """Values that the weights method's fields must have with this rule; fields that the
        user left unset are set to them.
        """
        return {}

    def cost(self, m: int, n: int) -> Cost:
        """Elements of optimizer state for one trained [m, n] parameter."""
        return Cost(state=self.rule().state_elements(m, n))


@dataclass(frozen=True)
class Precision(Method):
    """In which number format is the map evaluated?"""

    axis: ClassVar[str] = "precision"
    dtype: ClassVar[str] = "float32"  # of the frozen base; what is trained stays fp32
    converts: ClassVar[bool] = False  # the frozen base itself, into what cannot be trained
    multiplies: ClassVar[bool] = False  # in its own way, forwards and backwards: see `mm`

    def convert(self, sites: Sequence[Site]) -> None:
        """Convert the frozen matrices to the format, in place, before terms are built.

        `sites` are all maps of the model; those already converted stay as they are.
        """

    def mm(self, site: Site) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The product x [*, t, n] by w [n, m] for one map and its terms; None for the plain one.

        Called for every map of the model, with or without terms. w is the map's matrix or a thin
        factor; for convolutions and embeddings, thin factors only. Fused experts share one
        product.
        """
        return None


@dataclass(frozen=True)
class Attention(Method):
    """What replaces softmax(Q K^T) V?"""

    axis: ClassVar[str] = "attention"


@dataclass(frozen=True)
class Objective(Method):
    """What is added to the loss, or replaces it? One of the two methods below is defined.

    A penalty is a function of parameters alone: its gradient is added once per optimizer
    step, after clipping. A data objective sees the batch and the outputs.
    """

    axis: ClassVar[str] = "objective"
    kind: ClassVar[Literal["penalty", "data"]] = "data"
    couples_batch: ClassVar[bool] = False  # contrastive: refuses accumulation
    needs_reference: ClassVar[bool] = False  # wants the outputs of the base (or a teacher)

    def penalty(self, terms: Mapping[str, Mapping[str, Term]]) -> Tensor:
        """A scalar of the full trained tensors."""
        raise NotImplementedError

    def loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        outputs: Any,
        loss: Tensor,
        reference: Any = None,
    ) -> Tensor:
        """The loss to train on, given the task's own; `reference`: the base's outputs."""
        raise NotImplementedError


@dataclass(frozen=True)
class Compress(Weights):
    """How do the weights of a trained model become fewer, in one shot?

    `build` gives the terms that stand in for each dense matrix; {} keeps a site dense. The
    terms can be trained afterwards.
    """

    axis: ClassVar[str] = "compress"
    base: ClassVar[Literal["frozen", "trained", "dropped"]] = "dropped"


@dataclass(frozen=True)
class Compose(Method):
    """Several adapters -> one behaviour."""

    axis: ClassVar[str] = "compose"


AXES: dict[str, type[Method]] = {
    "weights": Weights,
    "update": Update,
    "precision": Precision,
    "attention": Attention,
    "objective": Objective,
    "compress": Compress,
    "compose": Compose,
}
