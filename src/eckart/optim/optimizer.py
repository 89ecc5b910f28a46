"""LowRankOptimizer: a torch.optim.Optimizer whose update is given by a `Rule` per group.

A step refreshes the bases that are due, projects, clips, adds penalties and applies.
Parameters are looked up by name in `param_groups` at each step, since wrappers (accelerate
under FSDP2) replace them after the optimizer was made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from eckart.errors import UsageError
from eckart.optim import named
from eckart.optim.blocks import Blocks
from eckart.optim.bucket import Bucket, buckets, clip_
from eckart.optim.entry import Entry, entry_of, spoilt
from eckart.optim.layerwise import Projected, check_layerwise
from eckart.optim.pair import Pair, move_pairs, prepare
from eckart.optim.part import State
from eckart.optim.rule import Rule, check_same

Penalty = Callable[[], Mapping[Tensor, Tensor]]


class LowRankOptimizer(torch.optim.Optimizer):
    """AdamW, GaLore, Fira, ...: the update is defined by `rule`, or by each group's own.

    `params`: parameters, (name, parameter) pairs, or groups. A group is a dict with
    `params` and any of `rule`, `lr`, `weight_decay` (default: the rule's), `clip_weight` (the
    weight of its squared norm in the clipped norm) and `leading` (1 for fused experts
    [e, m, n]; else all dimensions after the first are columns). Rules for factor pairs need
    `pairs`, a list of (name of B, name of A, scale).

    Names determine when bases are refreshed and the seeds of random draws, and state is saved
    under them; parameters without names are named by their position, "<group>.<index>".

    `clip` bounds the norm of the gradients AS APPLIED: of the low-rank gradient where one
    is projected, of the gradient elsewhere; the last norm, before clipping, is `grad_norm`.
    None neither measures nor clips; `inf` only measures. `skip_nonfinite` skips a step in which
    a gradient is not finite (one host sync a step).

    State holds only tensors, ints and floats, so `torch.load(weights_only=True)` reads it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rule: Rule | None = None,
        clip: float | None = None,
        seed: int = 0,
        layerwise: bool = False,
        skip_nonfinite: bool = False,
    ):
        if clip is not None and not clip > 0:
            fix = "Type clip=None to leave gradients as they are."
            raise UsageError("a norm is bounded by more than zero", [("clip", str(clip))], fix)
        self.clip = clip
        self.seed = seed
        self.skip_nonfinite = skip_nonfinite
        self.scaled = False  # True where a gradient scaler is about to step
        self.skipped = False  # True where the last step was skipped for a non-finite gradient
        self.grad_norm: Tensor | None = None
        self.penalties: list[Penalty] = []
        self.projected: Projected | None = None  # layer-wise mode
        self.places: dict[Tensor, tuple[str, dict[str, Any]]] = {}  # its names and groups
        self.bound: dict[str, Tensor] = {}  # the parameters of the last step
        self.resting: set[str] = set()  # parameters that do not train in this step
        self.aside: set[str] = set()  # parameters that follow `Rule.resting` in this step
        super().__init__(
            params,
            {
                "lr": lr,
                "rule": rule or Rule(),
                "weight_decay": None,
                "clip_weight": 1.0,
                "leading": 0,
                "pairs": (),
                "taken": 0,  # steps of the optimizer, also those in which a parameter is frozen
            },
        )
        if layerwise:
            self.attach_layerwise()
        self.rest(between_steps=False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; unnamed parameters get names. Raises UsageError where a group is invalid."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        place = len(self.param_groups)
        pairs = [p if isinstance(p, tuple) else (f"{place}.{i}", p) for i, p in enumerate(params)]
        taken = {name for name, _, _ in self.named()}
        for name, p in pairs:
            if p.is_complex() or not p.is_floating_point():
                raise UsageError("this parameter's dtype cannot be trained", [(name, str(p.dtype))])
            if name in taken:
                raise UsageError("two parameters have the same name", [(name, "twice")])
            taken.add(name)
        rule = param_group.get("rule", self.defaults["rule"])
        if rule.blocks is not None and not all(isinstance(p, tuple) for p in params):
            raise UsageError(
                "blocks of a model are known by the names of its parameters",
                [(pairs[0][0], "a parameter without a name")],
                "Pass model.named_parameters().",
            )
        halves = [name for name, p in pairs if p.dtype == torch.float16]
        if rule.rounding == "stochastic" and halves:
            raise UsageError(
                "stochastic rounding is for bf16 weights",
                [(halves[0], "float16")],
                'Train it in bf16, or take rounding="nearest".',
            )
        super().add_param_group({**param_group, "params": pairs})
        group = self.param_groups[-1]
        if group["rule"].blocks not in (None, self.blocks):
            raise UsageError(
                "all groups must train the same blocks",
                [(group["param_names"][0], str(group["rule"].blocks))],
            )
        if group["weight_decay"] is None:
            group["weight_decay"] = group["rule"].weight_decay

    # -- the step ---------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient; returns the closure's loss.

        A rule that updates the factors of a pair one after the other within a step, each with
        its own gradient, calls the closure for each; the loss returned is the first.
        """
        scaled, self.scaled = self.scaled, False
        if scaled and closure is not None:
            raise UsageError(
                "a gradient scaler does not see the gradients of a closure",
                [("scaler.step(optimizer, closure)", "they would stay scaled")],
                "Call scaler.step(optimizer), or train in bf16, which needs no scaler.",
            )
        passes = max(group["rule"].passes for group in self.param_groups)
        if passes > 1 and closure is None:
            raise UsageError(
                "this rule computes a gradient for each factor in turn",
                [("optimizer.step()", "got no closure")],
                "Pass one that clears the gradients, computes the loss and its gradients, and "
                "returns it. In a Trainer take schedule=alternate.",
            )
        taken = self.param_groups[0]["taken"]
        loss = self.pass_over(closure, first=True)
        self.skipped = self.param_groups[0]["taken"] == taken
        for _ in range(0 if self.skipped else passes - 1):
            self.pass_over(closure, first=False)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False. Torch's gradient scaler asks just before a step, the only sign of one."""
        self.scaled = True
        return False

    def pass_over(self, closure: Callable[[], Any] | None, first: bool) -> Any:
        """One pass of a step: call the closure and update the parameters that train in it.

        Skipped for a non-finite gradient, a first pass is not counted in "taken", a later one
        is.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        penalties = self.penalty_gradients()
        moving = buckets(self.entries())
        if self.projected is not None:
            self.projected.average(moving)
        left_out = self.skip_nonfinite and spoilt([e for bucket in moving for e in bucket.entries])
        if left_out:
            self.grad_norm = torch.full((), torch.nan)
        else:
            self.move(moving, penalties)
        for group in [] if left_out and first else self.param_groups:
            group["taken"] += 1
        if self.projected is not None:
            self.projected.clear()
            self.bind_hooks()
        self.rest()
        return loss

    def move(self, moving: list[Bucket], penalties: Mapping[Tensor, Tensor]) -> None:
        """Project, clip, add penalties and apply, for the parameters that have a gradient."""
        for bucket in moving:
            bucket.project()
        if self.clip is not None:
            self.grad_norm = clip_(moving, self.clip)
            if self.projected is not None:
                self.grad_norm = self.projected.norm(self.grad_norm)
        for bucket in moving:
            bucket.add(penalties)
        pairs = self.pairs(moving)
        move_pairs(pairs)
        paired = {e.name for pair in pairs for e in (pair.B, pair.A)}
        for bucket in moving:
            bucket.apply(leave=paired)

    def entries(self) -> Iterator[Entry]:
        """Entries of the parameters that have a gradient, or a projected one from a hook."""
        self.rebind()
        kept = {} if self.projected is None else self.projected.low
        at_rest = {id(g): {**g, "rule": g["rule"].at_rest} for g in self.param_groups if self.aside}
        for name, p, group in self.named():
            if name in self.resting:
                p.grad = None
            if p.grad is None and name not in kept:
                continue
            if name in self.aside:
                yield entry_of(name, p, at_rest[id(group)], {}, self.seed)  # state is not kept
                continue
            entry = entry_of(name, p, group, self.state[p], self.seed)
            if self.projected is not None and entry.projected and p.grad is not None:
                # the gradient came before the parameter's hook was registered
                self.projected.absorb(entry, self.skip_nonfinite)
                if p.grad is None and name not in kept:
                    continue  # and the hook's update is done
            entry.low = kept.get(name)
            yield entry

    def add_penalty(self, penalty: Penalty) -> None:
        """Register a penalty: `penalty()` returns gradients {parameter: tensor} that are added
        at every step after clipping, so they are neither averaged over micro-batches nor
        clipped."""
        self.penalties.append(penalty)

    def penalty_gradients(self) -> dict[Tensor, Tensor]:
        """The summed gradients of all penalties; sets a zero `.grad` where there is none."""
        total: dict[Tensor, Tensor] = {}
        for penalty in self.penalties:
            with torch.enable_grad():
                found = penalty()
            for p, g in found.items():
                total[p] = total[p] + g if p in total else g
                if self.projected is not None and p in self.projected.handles:
                    name = next(n for n, q, _ in self.named() if q is p)
                    raise UsageError(
                        "a penalty needs a gradient that layer-wise mode has freed",
                        [(name, "is projected layer by layer")],
                        "Leave layer-wise mode out, or the penalty.",
                    )
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
        return total

    # -- layer-wise -------------------------------------------------------------------

    def attach_layerwise(
        self,
        refresh_from: Literal["step", "first"] = "step",
        average_over: dist.ProcessGroup | None = None,
    ) -> None:
        """Project gradients in backward hooks and free them at once; see `layerwise.Projected`.

        Micro-batches are accumulated. DDP must ignore the parameters in `layerwise_names`;
        their low-rank gradients are averaged over the group `average_over`. A gradient scaler
        cannot be used. Raises UsageError where a rule needs full gradients.
        """
        check_layerwise(self.param_groups, refresh_from, average_over, self.clip)
        self.projected = Projected(refresh_from, average_over)
        self.bind_hooks()

    def detach_layerwise(self) -> None:
        """Remove the hooks and leave layer-wise mode."""
        if self.projected is not None:
            self.projected.bind([], lambda p: None)
            self.projected = None

    def bind_hooks(self) -> None:
        """Register hooks on the projected parameters that are in the groups now."""
        assert self.projected is not None
        self.places = {p: (name, group) for name, p, group in self.named()}

        @torch.no_grad()
        def absorb(p: Tensor) -> None:
            assert self.projected is not None
            name, group = self.places[p]  # looked up at each call: loading makes new groups
            entry = entry_of(name, p, group, self.state[p], self.seed)
            self.projected.absorb(entry, self.skip_nonfinite)

        wanted = (p for p, (_, group) in self.places.items() if is_projected(p, group))
        self.projected.bind(wanted, absorb)

    @property
    def layerwise_names(self) -> list[str]:
        """Names of the parameters whose gradients the hooks free; DDP must ignore them."""
        if self.projected is None:
            return []
        return [name for name, p, group in self.named() if is_projected(p, group)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; also drops the projected gradients of layer-wise mode."""
        super().zero_grad(set_to_none)
        self.scaled = False  # by a scaler that left the step out
        if self.projected is not None:
            self.projected.clear()

    # -- pairs and blocks -------------------------------------------------------------

    def pairs(self, moving: list[Bucket]) -> list[Pair]:
        """The factor pairs to update in this step, with their state.

        A factor whose partner is frozen by the user, not by the rule, makes no pair.
        """
        found = {e.name: e for b in moving for e in b.entries if e.rule.pair is not None}
        if not found:
            return []
        for name, p, group in self.named():
            if name in self.resting:
                found[name] = entry_of(name, p, group, self.state[p], self.seed)
        listed = [pair for group in self.param_groups for pair in group["pairs"]]
        pairs = [Pair(found[b], found[a], s) for b, a, s in listed if b in found and a in found]
        prepare(pairs, [e for e in found.values() if e.param.grad is not None])
        return [pair for pair in pairs if not (pair.B.rests and pair.A.rests)]

    @property
    def blocks(self) -> Blocks | None:
        """The block schedule, which is the same for all groups that have one."""
        found = (group["rule"].blocks for group in self.param_groups)
        return next((blocks for blocks in found if blocks is not None), None)

    def rest(self, between_steps: bool = True) -> None:
        """Freeze the parameters that do not train in the next step, unfreeze the others, and
        drop moments of blocks at a new period.

        With several processes `requires_grad` is changed only after the first step, since DDP
        and FSDP2, which may wrap the model after this, must see every parameter that trains.
        """
        blocks, taken = self.blocks, self.param_groups[0]["taken"]
        names = [name for name, _, _ in self.named()]
        rules = {name: group["rule"] for name, _, group in self.named()}
        in_turn = {name for name, rule in rules.items() if rule.blocks is not None}
        idle = set() if blocks is None else blocks.resting(names, taken, self.seed) & in_turn
        self.aside = {name for name in idle if rules[name].resting is not None}
        resting = idle - self.aside
        for group in self.param_groups:
            rule = group["rule"].pair
            place = "BA".find(rule.rests(taken)) if rule is not None and rule.rests(taken) else -1
            resting |= {pair[place] for pair in group["pairs"] if place >= 0}
        passes = max(group["rule"].passes for group in self.param_groups)
        if taken % passes < passes - 1:  # parameters in no pair train in the last pass alone
            resting |= {*names} - {n for g in self.param_groups for p in g["pairs"] for n in p[:2]}
        silent = between_steps or not (dist.is_available() and dist.is_initialized())
        for name, p, _ in self.named():
            if name in resting:
                p.grad = None
            if resting or self.resting:
                p.requires_grad_(not (silent and name in resting))
        self.resting = resting
        if blocks is not None and blocks.begins(taken):
            forgotten = blocks.forgotten(names, idle) & in_turn
            self.reset_state(p for name, p, _ in self.named() if name in forgotten)

    # -- state ------------------------------------------------------------------------

    def named(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """(name, parameter, group) of all parameters."""
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                yield name, p, group

    def rebind(self) -> None:
        """Move state to the parameters that replaced others of the same name since last step."""
        for name, p, _ in self.named():
            old = self.bound.get(name)
            if old is not None and old is not p and old in self.state:
                self.state[p] = self.state.pop(old)
            self.bound[name] = p

    def reset_state(self, params: Iterable[Tensor] | None = None) -> None:
        """Delete the state of these parameters (default: all), as before their first step."""
        for p in list(self.state) if params is None else params:
            self.state.pop(p, None)

    def named_state_dict(self) -> dict[str, Any]:
        """The state by parameter name: {"<name>/<key>": tensor or number}.

        It can be loaded under other groups. Sharded state is gathered, so all processes must
        call this. It includes the groups' learning rates, which a scheduler does not restore.
        """
        return named.pack(self.named(), self.state)

    def load_named_state_dict(self, flat: Mapping[str, Any]) -> None:
        """Load the result of `named_state_dict`, dtypes unchanged.

        Parameters that are not in it start without state. Raises FileError where a saved
        parameter is not trained here or does not fit.
        """
        for p, entry in named.unpack(flat, self.named()).items():
            self.state[p] = entry
        self.rebind()
        self.rest(between_steps=False)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with each rule as JSON-ready data (`Rule.describe`)."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            group["rule"] = group["rule"].describe()
        return packed

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, but tensors keep the dtype they were saved in and are copied.

        Raises UsageError where the state was made under another rule.
        """
        loaded = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            loaded = pre_hook(self, loaded) or loaded
        saved = loaded["param_groups"]
        sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in self.param_groups]
        if sizes[0] != sizes[1]:
            raise UsageError(
                "the optimizer's groups do not fit the saved ones",
                [("parameters per group", f"saved {sizes[0]}, now {sizes[1]}")],
                "State saved by name (named_state_dict) survives regrouping.",
            )
        groups = []
        for old, group in zip(saved, self.param_groups, strict=True):
            check_same(old["rule"], group["rule"])
            kept = {k: group[k] for k in ("params", "param_names", "rule")}
            groups.append({**group, **old, **kept})
        ids = chain.from_iterable(g["params"] for g in saved)
        params = dict(zip(ids, (p for _, p, _ in self.named()), strict=True))
        state: dict[Tensor, State] = defaultdict(dict)
        for i, entry in loaded["state"].items():
            state[params[i]] = {k: named.copy_to(v, params[i]) for k, v in entry.items()}
        self.__setstate__({"state": state, "param_groups": groups})
        self.rebind()
        if self.projected is not None:
            self.bind_hooks()
        self.rest(between_steps=False)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def is_projected(p: Tensor, group: Mapping[str, Any]) -> bool:
    """True where the group's rule projects a parameter of this shape."""
    return not group["rule"].on(p.shape, group["leading"]).projector.identity
