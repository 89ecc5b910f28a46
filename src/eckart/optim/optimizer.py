"""LowRankOptimizer: an ordinary torch.optim.Optimizer that follows rules.

A step is five lines: refresh the bases that are due, project, clip, add penalties, apply.
Parameters are bound at each step from `param_groups`, by name, so wrappers may swap them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.optim.bucket import Bucket, buckets
from eckart.optim.part import State
from eckart.optim.refresh import refresh
from eckart.optim.rule import Rule, check_same

Penalty = Callable[[], Mapping[Tensor, Tensor]]
GROUP = {"weight_decay": None, "clip_weight": 1.0, "leading": 0}


class LowRankOptimizer(torch.optim.Optimizer):
    """AdamW, GaLore, Fira, ...: what it does is its `rule`, or that of each group.

    `params`: parameters, (name, parameter) pairs, or groups. A group is a dict with
    `params` and any of `rule`, `lr`, `weight_decay` (the rule's where it is left out),
    `clip_weight` (how often its squared norm counts in the clipped norm) and `leading`
    (1 for fused experts [e, m, n]; else all dimensions after the first are columns).

    Names seed the bases and place the refreshes, and state is saved under them; parameters
    without names are called by their place.

    `clip` bounds the norm of the gradients AS APPLIED: of the low-rank gradient where one
    is projected, of the gradient elsewhere; the last norm, before clipping, is `grad_norm`.
    None neither measures nor clips; `inf` measures. `skip_nonfinite` leaves everything as
    it is where a gradient is not finite (one host sync a step).

    State is tensors and ints alone; `torch.load(weights_only=True)` reads it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rule: Rule | None = None,
        clip: float | None = None,
        seed: int = 0,
        skip_nonfinite: bool = False,
    ):
        self.clip = clip
        self.seed = seed
        self.skip_nonfinite = skip_nonfinite
        self.grad_norm: Tensor | None = None
        self.penalties: list[Penalty] = []
        super().__init__(params, {"lr": lr, "rule": rule or Rule(), **GROUP})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters get names where they have none."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        place = len(self.param_groups)
        named = [p if isinstance(p, tuple) else (f"{place}.{i}", p) for i, p in enumerate(params)]
        taken = {name for group in self.param_groups for name in group["param_names"]}
        for name, p in named:
            if p.is_complex() or not p.is_floating_point():
                raise UsageError("this parameter's dtype cannot be trained", [(name, str(p.dtype))])
            if name in taken:
                raise UsageError("two parameters have the same name", [(name, "")])
            taken.add(name)
        super().add_param_group({**param_group, "params": named})
        group = self.param_groups[-1]
        if group["weight_decay"] is None:
            group["weight_decay"] = group["rule"].weight_decay

    # -- the step ---------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        penalties = self.penalty_gradients()
        found = [bucket for group in self.param_groups for bucket in buckets(group, self.state)]
        if self.skip_nonfinite and not all_finite(g for bucket in found for g in bucket.grads):
            return loss
        for bucket in found:
            refresh(bucket)
            bucket.project()
        if self.clip is not None:
            self.grad_norm = clip_(found, self.clip)
        for bucket in found:
            bucket.add(penalties)
            bucket.apply()
        return loss

    def add_penalty(self, penalty: Penalty) -> None:
        """Add the gradient {parameter: tensor} that `penalty()` returns, at every step and
        after clipping: a penalty is neither scaled with the accumulation nor clipped."""
        self.penalties.append(penalty)

    def penalty_gradients(self) -> dict[Tensor, Tensor]:
        """The sum of all penalties. A parameter without a gradient is given a zero one."""
        total: dict[Tensor, Tensor] = {}
        for penalty in self.penalties:
            with torch.enable_grad():
                found = penalty()
            for p, g in found.items():
                total[p] = total[p] + g if p in total else g
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
        return total

    # -- state ------------------------------------------------------------------------

    def named(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """(name, parameter, group) of all parameters."""
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                yield name, p, group

    def reset_state(self, params: Iterable[Tensor] | None = None) -> None:
        """Forget the state of these parameters (all by default): they start afresh."""
        for p in list(self.state) if params is None else params:
            self.state.pop(p, None)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the rules described as plain data."""
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
            state[params[i]] = {k: on_device(v, params[i]) for k, v in entry.items()}
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def clip_(found: list[Bucket], bound: float) -> Tensor:
    """Scale all gradients as applied so that their norm is at most `bound`; the norm before.

    sqrt(sum over groups of clip_weight * squared norm), in fp32 at least. The arithmetic is
    that of torch.nn.utils.clip_grad_norm_.
    """
    norms = [bucket.norms() for bucket in found]
    if not norms:
        return torch.zeros(())
    total = torch.linalg.vector_norm(torch.cat(norms))
    if bound != float("inf"):
        factor = (bound / (total + 1e-6)).clamp(max=1.0)
        for bucket in found:
            bucket.scale_(factor)
    return total


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Are all entries of all tensors finite? One host sync."""
    norms = [torch.linalg.vector_norm(t, float("inf")) for t in tensors]
    return bool(torch.stack(norms).isfinite().all()) if norms else True


def on_device(value: Any, like: Tensor) -> Any:
    """A copy of a state entry on the parameter's device, dtype unchanged."""
    return value.detach().clone().to(like.device) if isinstance(value, Tensor) else value
