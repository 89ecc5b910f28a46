"""The optimizer hook that runs methods' events, at real optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

from torch import Tensor, nn

from eckart.linear import Term, seeded_generator
from eckart.optim import LowRankOptimizer
from eckart.recipe.method import Cut, Event, Method, Now

Terms = Mapping[str, Mapping[str, Term]]


class EventHook:
    """Runs events before and after optimizer steps and counts the steps.

    Its state is this count alone, so a checkpoint resumes it exactly. Random draws use a generator
    seeded by (seed, event, step): the same on every process and after every resume.
    """

    def __init__(
        self, methods: tuple[Method, ...], model: nn.Module, terms: Callable[[], Terms], seed: int
    ):
        scheduled = [event for method in methods for event in method.events()]
        self.events = [event for event in scheduled if isinstance(event, Event)]
        self.cuts = [event for event in scheduled if isinstance(event, Cut)]
        self.model, self.terms, self.seed = model, terms, seed
        self.step = 0  # completed optimizer steps
        self.steps: int | None = None
        self.handles: list[Any] = []
        self.methods = methods
        self.rates: list[Any] = []  # the groups' own, while a step is taken with others

    def bind(self, optimizer: LowRankOptimizer) -> None:
        """Follow this optimizer's steps, and no longer those of the one bound before."""
        for handle in self.handles:
            handle.remove()
        self.handles = [
            optimizer.register_step_pre_hook(self.before),
            optimizer.register_step_post_hook(self.after),
        ]

    def before(self, optimizer: LowRankOptimizer, *_: Any) -> None:
        """Run the events scheduled before this step, and scale its learning rates."""
        self.restore_rates(optimizer)  # of a step that failed
        self.run("before", optimizer)
        factor = prod(method.rate(self.step) for method in self.methods)
        if factor != 1:
            self.rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def restore_rates(self, optimizer: LowRankOptimizer) -> None:
        """Restore the groups' own learning rates, which a scheduler updates."""
        for group, rate in zip(optimizer.param_groups, self.rates, strict=False):
            group["lr"] = rate
        self.rates = []

    def after(self, optimizer: LowRankOptimizer, *_: Any) -> None:
        """Count the step and run the events scheduled after it, unless the step was skipped."""
        self.restore_rates(optimizer)
        if optimizer.skipped:
            return
        self.step += 1
        self.run("after", optimizer)

    def run(self, when: str, optimizer: LowRankOptimizer) -> None:
        """Run the events of one phase (before or after), and reset moments where asked."""
        for event in self.events:
            if event.when == when and event.at(self.step):
                done = event.run(self.now(event.name))
                if event.moments == "keep" or done is False:
                    continue
                for parameter in parameters_of(self.terms()):
                    if event.moments == "reset":
                        optimizer.state.pop(parameter, None)
                    elif parameter in optimizer.state:
                        event.moments(optimizer.state[parameter], parameter)

    def now(self, name: str) -> Now:
        """The context that an event of this name receives at the current step."""
        generator = seeded_generator(self.seed, "event", name, self.step)
        return Now(self.step, self.steps, self.terms(), generator, self.model)

    def due_cut(self) -> dict[str, dict[str, Tensor]] | None:
        """The rank components to keep, if a change of shape is scheduled at this step."""
        kept: dict[str, dict[str, Tensor]] = {}
        for cut in self.cuts:
            if cut.at(self.step, self.steps):
                for path, by_term in cut.kept(self.now(cut.name)).items():
                    kept.setdefault(path, {}).update(by_term)
        return kept or None

    def state_dict(self) -> dict[str, int]:
        """Plain scalars only."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a saved count."""
        self.step = int(state["step"])


def parameters_of(terms: Terms) -> Iterator[Tensor]:
    """The parameters of all terms."""
    for by_name in terms.values():
        for term in by_name.values():
            yield from term.parameters()
