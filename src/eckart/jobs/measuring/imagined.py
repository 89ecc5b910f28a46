"""A model with its recipe that takes no memory: every shape and dtype, and not one number.

Everything runs as in a training (the model's code, the method's `build`, the optimizer's
rules, a forward and a backward pass) on torch's fake tensors, so that sizes are exact and
nothing is read but a configuration. A method whose sizes depend on the numbers in a matrix
cannot be built so; its `cost` says them then.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers.initialization import no_init_weights

from eckart.errors import EckartError, UsageError
from eckart.io.heads import outside
from eckart.io.preprocessing import USUAL, sides
from eckart.io.presets import quiet
from eckart.io.tasks import TASKS, task_class
from eckart.jobs.measuring.memory import (
    Live,
    activation_bytes,
    autocast,
    autocasts,
    model_bytes,
    size,
    state_bytes,
)
from eckart.jobs.measuring.norms import hold_statistics
from eckart.linear import Horizon, Site, Structured, install
from eckart.recipe import Handle, Recipe, Weights, registry
from eckart.recipe.attachment import choose, convert_base
from eckart.recipe.groups import default_lr, default_update, factor_pairs
from eckart.recipe.installing import install_parts
from eckart.recipe.targets import sites_of

UNKNOWN = (  # what is raised where a number of a fake tensor is asked for
    torch._subclasses.fake_tensor.DataDependentOutputException,
    torch._subclasses.fake_tensor.DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    NotImplementedError,
)
CALIBRATION_TOKENS = 64  # rows of the activations that a builder is shown


def attention_flops(q: Any, k: Any, v: Any, *more: Any, out_shape: Any = None, **_: Any) -> int:
    """Of the CPU's fused attention, which torch's counter does not know. Shapes [b, h, t, d]."""
    return int(sdpa_flop_count(q, k, v))


def attention_backward_flops(
    grad: Any, q: Any, k: Any, v: Any, *more: Any, out_shape: Any = None, **_: Any
) -> int:
    """The same for its backward pass."""
    return int(sdpa_backward_flop_count(grad, q, k, v))


aten = torch.ops.aten
ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


@dataclass
class Imagined:
    """Sizes of a model with its recipe, in bytes; `by_formula` where they come from `cost`."""

    weights: int
    factors: int
    gradients: int
    state: int
    parameters: int
    trainable: int
    by_role: dict[str, dict[str, int]]
    coverage: str
    by_formula: bool = False
    live: Any = field(default=None, repr=False)  # what passes run on: (mode, handle)
    optimizer: Any = field(default=None, repr=False)  # None where sizes come from `cost`
    task: str = "causal"
    packed: bool = False  # are rows filled with texts that are kept apart?

    @property
    def rank(self) -> int | None:
        """Of the first trained factor pair; None where there is none."""
        handle = self.live[1]
        names = dict(handle.model.named_parameters())
        return next((names[a].shape[-2] for _, a, _ in factor_pairs(handle) if a in names), None)

    @property
    def fixed(self) -> dict[str, int]:
        """Bytes by category that do not depend on the batch."""
        names = ("weights", "factors", "gradients", "state")
        return {name: getattr(self, name) for name in names}

    def activations(self, rows: int, length: int, checkpointing: bool = False) -> int:
        """Bytes that autograd keeps for a batch of rows of this length."""
        with self.ready(checkpointing) as model, quiet():
            return activation_bytes(model, self.batch(model, rows, length))

    def peak(self, rows: int, length: int, checkpointing: bool = False, passes: int = 1) -> int:
        """The most bytes alive at once in so many forward and backward passes of a step.

        What is held throughout, gradients as they come, activations, and what an operation
        makes and drops again (logits in fp32, say), which `activations` leaves out. Not the
        optimizer's own temporaries.
        """
        with self.ready(checkpointing) as model, Live() as live:
            for _ in range(passes):
                self.loss(model, rows, length).backward()
        return self.weights + self.factors + self.state + live.peak

    def flops(self, rows: int, length: int) -> tuple[int, int]:
        """Floating-point operations of a forward pass, and of the backward pass after it."""
        with self.ready() as model:
            with FlopCounterMode(display=False, custom_mapping=ON_CPU) as forward:
                loss = self.loss(model, rows, length)
            with FlopCounterMode(display=False, custom_mapping=ON_CPU) as backward:
                loss.backward()
        return forward.get_total_flops(), backward.get_total_flops()

    def loss(self, model: Any, rows: int, length: int) -> Tensor:
        """What a step trains on, a data objective's own passes among it.

        An objective sees no labels: which tokens count is a matter of numbers, so all do. A
        decoder of its own is shown them as its input.
        """
        inputs = self.batch(model, rows, length)
        unlabelled = {key: tensor for key, tensor in inputs.items() if key != "labels"}
        if getattr(model.config, "is_encoder_decoder", False):
            unlabelled["decoder_input_ids"] = inputs["labels"]
        found: Tensor = self.live[1].loss(unlabelled, model(**inputs))
        return found

    def batch(self, model: Any, rows: int, length: int) -> dict[str, Any]:
        """What the model's task is taught from; packed rows bring a mask that is kept."""
        found: dict[str, Any] = BATCHES.get(self.task, batch)(rows, length, model.config)
        if self.packed and "position_ids" in inspect.signature(model.forward).parameters:
            found["position_ids"] = torch.arange(length).expand(rows, -1)
            found["use_cache"] = False
        return found

    @contextmanager
    def ready(self, checkpointing: bool = False) -> Iterator[Any]:
        """The model in training, without gradients before and after."""
        mode, handle = self.live
        model: Any = handle.model
        with mode, autocast(model, autocasts(handle.recipe.precision, handle.weights)):
            model.train()
            if checkpointing:
                model.activation_checkpointing_enable()
            try:
                yield model
            finally:
                model.zero_grad()
                if checkpointing:
                    model.activation_checkpointing_disable()


def batch(rows: int, length: int, config: Any = None) -> dict[str, Tensor]:
    """Token ids with labels, [rows, length]."""
    ids = torch.ones(rows, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


def one_label(rows: int, length: int, config: Any) -> dict[str, Tensor]:
    """Token ids [rows, length], and a class for each row."""
    config.pad_token_id = config.pad_token_id or 0  # by which a decoder finds the end
    return {**batch(rows, length), "labels": torch.zeros(rows, dtype=torch.long)}


def tags(rows: int, length: int, config: Any) -> dict[str, Tensor]:
    """Token ids and tags, [rows, length]."""
    return {**batch(rows, length), "labels": torch.zeros(rows, length, dtype=torch.long)}


def pictures(rows: int, length: int, config: Any) -> dict[str, Tensor]:
    """Pixels [rows, c, h, w] as the configuration has them, and a class for each."""
    height, width = sides(getattr(config, "image_size", None) or USUAL)
    pixels = torch.zeros(rows, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}


BATCHES = {"classification": one_label, "tagging": tags, "image": pictures}


@dataclass(frozen=True)
class Wanted:
    """What is to be imagined: a configuration with a recipe, in which numbers, where, for what."""

    config: Any
    recipe: Recipe
    dtype: torch.dtype
    device: torch.device
    steps: int
    task: str
    packed: bool


def imagine(
    config: Any,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    steps: int = 1000,
    task: str = "causal",
    packed: bool = False,
) -> Imagined:
    """A model of this configuration with the recipe's terms. UsageError as `attach` raises it.

    `packed`: several texts in a row, as io/packing.py fills them.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    wanted = Wanted(config, recipe, dtype, device, steps, task, packed)
    try:
        handle = built(mode, wanted)
    except EckartError:
        raise
    except UNKNOWN:
        try:
            return by_formula(mode, wanted)
        except UNKNOWN:
            kind = config.model_type
            raise UsageError(
                "this architecture cannot be estimated",
                [(kind, "it asks for numbers while it is built")],
                "Load it, and be told the same: eckart finetune MODEL DATA --dry-run",
            ) from None
    optimizer = handle.optimizer(default_lr(recipe))  # first: it says which blocks rest
    with mode:
        trained = handle.trainable()
        parts = model_bytes(handle)
        return Imagined(
            weights=parts["weights"],
            factors=parts["factors"],
            gradients=sum(size(p) for p in trained.values()),
            state=state_bytes(optimizer),
            parameters=handle.coverage.parameters,
            trainable=sum(p.numel() for p in trained.values()),
            by_role=handle.coverage.by_role,
            coverage=str(handle.coverage),
            live=(mode, handle),
            optimizer=optimizer,
            task=task,
            packed=packed,
        )


def built(mode: FakeTensorMode, wanted: Wanted) -> Handle:
    """What `attach` does, with calibration that has shapes alone."""
    recipe, weights = wanted.recipe, wanted.recipe.weights
    assert weights is not None
    with ExitStack() as stack:
        for context in (mode, wanted.device, quiet()):
            stack.enter_context(context)
        with no_init_weights():  # some rules of ViTs ask for a number
            model = task_class(wanted.task).from_config(wanted.config, dtype=wanted.dtype)
        model.tie_weights()
        hold_statistics(model)
        head = outside(model) if TASKS[wanted.task].classes else ()
        sites = choose(model, weights, 0)
        convert_base(model, recipe)
        for site in sites:
            site.horizon = Horizon(wanted.steps, default_lr(recipe), 0)
            site.gradient = torch.zeros(site.matrix_shape)
            site.activations = torch.zeros(CALIBRATION_TOKENS, site.shape[1])
        parts = weights.build(sites)
        handle = Handle(model, recipe, {site.path: site for site in sites}, also_train=head)
        with kept_in_place(parts):
            install_parts(handle, parts)
        for site in sites:
            site.gradient = site.activations = None
        route_evenly(model)
    return handle


def route_evenly(model: nn.Module) -> None:
    """Give fused experts without terms the forward of those with: others ask which token goes
    where."""
    for site in sites_of(model):
        if site.kind == "experts" and not isinstance(site.module, Structured):
            install(site, {})


@contextmanager
def kept_in_place(parts: Mapping[str, Mapping[str, nn.Module]]) -> Iterator[None]:
    """Make `to` of these parts do nothing inside the block: fake parameters cannot be moved."""
    modules = [part for by_name in parts.values() for part in by_name.values()]
    for module in modules:
        module.__dict__["to"] = lambda *args, module=module, **kwargs: module
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["to"]


# --- where numbers decide the sizes --------------------------------------------------------


def by_formula(mode: FakeTensorMode, wanted: Wanted) -> Imagined:
    """Sizes from the methods' `cost`; passes run on its flat form, or the default method's terms.

    The optimizer's state is that of one vector of as many elements: exact for rules that
    treat every element alike.
    """
    recipe, weights = wanted.recipe, wanted.recipe.weights
    assert weights is not None
    instead = registry.load(registry.DEFAULTS["weights"])
    rank = min(getattr(weights, "rank", None) or 16, 16)
    like_lora: Any = instead(rank=rank, targets=weights.targets)  # type: ignore[call-arg]
    light = Recipe(weights=weights.flat() or like_lora, precision=recipe.precision)
    handle = built(mode, replace(wanted, recipe=light))
    with mode:
        base = model_bytes(handle)["weights"]
        sites = list(handle.sites.values())
        trained, frozen = elements(weights, sites)
        dropped = weights.base == "dropped"
        kept = base - (sum(size(s.raw) for s in sites) if dropped else 0)
        update = recipe.update or default_update()
        state = update.plain().state_elements(trained)
    whole = sum(p.numel() for p in handle.model.parameters()) - sum(
        p.numel() for part in handle.carried().values() for p in part.parameters()
    )
    share = trained / max(1, whole + trained)
    return Imagined(
        weights=kept,
        factors=4 * (trained + frozen),
        gradients=4 * trained,
        state=4 * state,
        parameters=whole + trained,
        trainable=trained,
        by_role={},
        coverage=f"{len(sites)} matrices; trained {trained:,} ({100 * share:.2g} %)",
        by_formula=True,
        live=(mode, handle),
        task=wanted.task,
        packed=wanted.packed,
    )


def elements(weights: Weights, sites: list[Site]) -> tuple[int, int]:
    """Trained and further stored elements of a method over all sites, shared ones once."""
    trained = frozen = shared = 0
    for site in sites:
        cost = weights.at(site).cost(*site.shape)
        copies = math.prod(site.leading)
        trained += copies * cost.parameters
        frozen += copies * cost.frozen
        shared = max(shared, cost.shared)
    return trained, frozen + shared
