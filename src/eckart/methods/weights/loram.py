"""LoRAM: learn a LoRA on a pruned model, use it with the whole one.

    prune      whole channels and heads leave the base:  W^P = E W, or W E^T
    align      (optional) the pruned base is trained a little, so that it behaves as the whole
    learn      y = W^P x + s B^P A^P x                   LoRA on what is left
    recover    B = E^T B^P,  A = A^P E                   zeros where something was pruned
    then       y = W x + s B A x                         a plain LoRA of the original model

E is a 0/1 selection of kept rows. Take it where the base does not fit the device that trains
but does fit the one that serves; take LoRA wherever the base fits, and where a smaller model of
the family exists LoRA on that. The premise is that large models are redundant; a small one is not:
with half of it pruned and aligned, claims/loram.py goes from 1.84 to 1.62 nats, LoRA on the whole
to 1.44 and on a smaller model to 1.48. Judge by the held-out loss of the WHOLE model: the pruned
one's says little.

Coupled units are pruned together: an MLP channel is a row of gate and of up and a column of
down; a KV head is its rows of k and v, and for each query head that reads it rows of q and
columns of o. The pruned model is then the whole one with these rows and columns zero, and
zeros at recovery are what that one would have learnt: the removed rows of B get no gradient,
nor do the removed columns of A. (fill=normal, as an option of the official code, is noise fed
by channels that are alive in the whole model.)

pattern=2:4, 4:8 and unstructured zero single weights, W^P = W * M; shapes stay, so recovery is
the identity and memory is saved only by a sparse format. Alignment trains what is left. B A is
not masked; with mask_delta it is, beside W^P and beside W: s (B A) * M is no low-rank update any
more, and every pass forms it, m x n numbers.

Source: J. Zhang et al., "Train Small, Infer Large: Memory-Efficient LoRA Training for Large
Language Models", 2025, Alg. 1. Sizes are kept in the map and never computed anew. We differ
in that alignment uses the job's own data and trains the layers' weights, not the head. The
official code has structured pruning only; whether the paper masks B A is not said.

m out, n in, r rank, h head width, g query heads per KV head, M [m, n] zeros and ones.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from eckart.errors import FileError, UsageError
from eckart.linear import LowRank, Site, seeded_generator
from eckart.linear.bits import packed, unpacked
from eckart.linear.factored import fresh_pair
from eckart.linear.narrow import narrow, spread, units
from eckart.recipe import (
    Cost,
    Event,
    Handle,
    Now,
    Paper,
    Recipe,
    Stage,
    Weights,
    Work,
    attach,
    every_step,
)
from eckart.recipe.calibrate import Batch, gather_activations, gather_gradients
from eckart.recipe.coupled import Group, Member, groups
from eckart.recipe.fingerprint import fingerprint
from eckart.recipe.targets import sites_of

BASE = "base"  # in a prune map: which model it was made for


def importance(site: Site, criterion: str, seed: int) -> Tensor:
    """The importance of each weight, fp64 [m, n]: random, w^2, g w, or w^2 |x_j|^2 (Wanda)."""
    W = site.weight(torch.float64)
    if criterion == "random":
        g = seeded_generator(seed, site.path, "prune")
        return torch.rand(W.shape, generator=g, dtype=torch.float64)
    if criterion == "gradient":
        return W * (0.0 if site.gradient is None else site.gradient.double())
    if criterion == "activation" and site.activations is not None:
        return W.square() * site.activations.double().square().sum(0).to(W.device)
    return W.square()


def scores(group: Group, criterion: str, seed: int) -> Tensor:
    """The importance of each unit, [count]: the absolute value of the sum over its weights."""
    parts = (m.by_unit(importance(m.site, criterion, seed)).cpu() for m in group.members)
    return torch.stack(list(parts)).sum(0).abs()


def kept_units(score: Tensor, ratio: float) -> Tensor:
    """Indices of the units that are kept, ascending int32: at least one."""
    count = max(1, round((1 - ratio) * len(score)))
    return score.topk(count).indices.sort().values.int()


def take_out(group: Group, kept: Tensor) -> None:
    """Remove all other units from the maps of a group, in place."""
    for member in group.members:
        index = units(kept, member.width).to(member.site.raw.device)
        rows, columns = (index, None) if member.axis == 0 else (None, index)
        narrow(member.site.module, rows, columns)  # type: ignore[arg-type]


def identity(model: nn.Module) -> Tensor:
    """The model's fingerprint as a tensor, int64 []."""
    return torch.tensor(int(fingerprint(model)[:15], 16))


def widened(group: Group, kept: Tensor, member: Member, B: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    """B [m, r], A [r, n] of the whole map from those of the pruned one, zeros elsewhere."""
    index, size = units(kept, member.width), group.count * member.width
    if (B.shape[0] if member.axis == 0 else A.shape[1]) != len(index):
        raise FileError(
            "the prune map does not fit what was learnt",
            [(member.site.path, f"{len(index)} kept, factors {tuple(B.shape)}, {tuple(A.shape)}")],
            "Recover with the map that the model was pruned by.",
        )
    if member.axis == 0:
        return spread(B, index, size, 0), A
    return B, spread(A, index, size, 1)


def sparse(score: Tensor, pattern: str, ratio: float) -> Tensor:
    """Which weights are kept, by their scores >= 0 [m, n]: the largest two of four or four of eight
    in each group of inputs, or the largest share.
    """
    if pattern == "unstructured":
        keep = max(1, round((1 - ratio) * score.numel()))
        return score >= score.flatten().topk(keep).values[-1]
    keep, of = (int(number) for number in pattern.split(":"))
    whole = score.shape[1] // of * of
    blocks = score[:, :whole].unflatten(1, (-1, of))
    top = torch.zeros_like(blocks, dtype=torch.bool)
    top.scatter_(-1, blocks.topk(keep).indices, True)
    return torch.cat([top.flatten(1), torch.ones_like(score[:, whole:], dtype=torch.bool)], 1)


class Masked(LowRank):
    """M * s B A, with a gradient for kept weights only: dA = s B^T (G * M), G = dL/dy^T x."""

    mask: Tensor
    plain_pair = False  # type: ignore[assignment]

    def __init__(self, B: Tensor, A: Tensor, mask: Tensor, scale: float, dropout: float):
        super().__init__(B, A, scale, dropout=dropout)
        self.register_buffer("mask", mask)  # bool [m, n]

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropped(x.to(self.A.dtype))
        return self.mm(x, self.dense().mT)

    def dense(self) -> Tensor:
        return super().dense() * self.mask

    def back(self, x: Tensor) -> Tensor:
        return self.mm(x.to(self.A.dtype), self.dense())

    def columns(self, ids: Tensor) -> Tensor:
        return self.dense().mT[ids]

    def factors(self) -> None:
        return None

    def pair(self) -> None:
        return None

    def pack(self, name: str, tensor: Tensor) -> Tensor | None:
        return packed(tensor.flatten(), 1) if name == "mask" else None

    def unpack(self, name: str, held: Tensor, shape: torch.Size) -> Tensor:
        return unpacked(held, 1, shape.numel()).view(shape).bool()


def thinned(model: nn.Module) -> Iterator[Site]:
    """The maps whose single weights are pruned: of attention and MLPs, not of experts."""
    for site in sites_of(model):
        if site.role.split(".")[0] in ("attn", "mlp") and not site.leading:
            yield site


def keep_zeros(now: Now) -> None:
    """Before a step: clear the gradient of pruned weights, so that they have no momentum."""
    for site in thinned(now.model):
        if site.raw.grad is not None:
            site.raw.grad.mul_(site.raw != 0)


@dataclass(frozen=True)
class LoRAM(Weights):
    """Trains a LoRA on a pruned base and transfers it to the whole one, which is unchanged."""

    rank: Annotated[int, Ge(1)] = 8
    """r. Paper: 8; cut to min(m, n) of the pruned maps."""

    alpha: Annotated[float, Gt(0)] = 16.0
    """Numerator of the scale s = alpha / r."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of inputs of A dropped in training. Paper: 0.05."""

    pattern: Literal["structured", "2:4", "4:8", "unstructured"] = "structured"
    """Whole channels and heads, or single weights (which saves no memory here)."""

    mask_delta: bool = False
    """Is the update masked as the base is, where single weights are pruned?"""

    channels: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Share of MLP channels (or weights) pruned in a layer. Paper: 0.65 to 0.95 at 70B."""

    heads: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Share of KV heads (or attention weights) pruned in a layer; one head always stays."""

    spared: Annotated[float, Ge(0), Lt(0.5)] = 0.05
    """Share of the layers at either end that stays whole. Paper: 4 and 2 of 80."""

    criterion: Literal["magnitude", "random", "gradient", "activation"] = "magnitude"
    """What says that a unit matters: its weights, nothing, |sum g w| on the job's data, or the
    weights times the inputs there."""

    align_steps: Annotated[int, Ge(0)] = 0
    """Steps for which the pruned base is trained before the adapter. Paper: 100 to 1000."""

    align_lr: Annotated[float, Gt(0)] = 5e-5
    """Learning rate of these steps."""

    fill: Literal["zero", "normal"] = "zero"
    """Columns of A at pruned inputs: zero, or N(0, 1/r^2)."""

    base: ClassVar = "frozen"
    mission: ClassVar = True
    default_lr: ClassVar = 1e-3
    paper: ClassVar = Paper(
        "Train Small, Infer Large: Memory-Efficient LoRA Training for Large Language Models",
        "https://arxiv.org/abs/2502.13533",
        "ICLR 2025",
    )
    promises: ClassVar = {
        "starts_at_base": {},
        "restores_base": {},
        "merges": {},
        "exports_low_rank": {"mask_delta": False},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_delta and self.pattern == "structured":
            raise UsageError(
                "loram: mask_delta masks single weights",
                [("pattern = structured", "takes whole units out")],
                "Type weights.pattern=2:4, or leave mask_delta out.",
            )

    @property
    def stages(self) -> tuple[Stage, ...]:  # type: ignore[override]
        """Prune, align (if it has steps), learn, recover."""
        align = {"steps": self.align_steps, "lr": self.align_lr}
        aligning = (
            # weights and biases below the model's top level: all but the head, and no factors
            Stage("align", "train", train="*.*.[wb]*", options=align),
            Stage("aligned", "operate"),
        )
        return (
            Stage("prune", "operate"),
            *(aligning if self.align_steps else ()),
            Stage("learn", "train"),
            Stage("recover", "operate", base="original", reads=("prune", "learn")),
        )

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        B, A = fresh_pair(site, min(self.rank, *site.shape))
        scale = self.alpha / self.rank
        if self.mask_delta and not site.leading:
            return {"loram": Masked(B, A, site.weight() != 0, scale, self.dropout)}
        return {"loram": LowRank(B, A, scale, dropout=self.dropout)}

    def events(self) -> Iterable[Event]:
        if self.pattern == "structured" or not self.align_steps:
            return ()
        return (Event("keep pruned weights at zero", every_step, keep_zeros, when="before"),)

    def operate(self, work: Work) -> Work:
        if work.stage.name == "prune":
            return dataclasses.replace(work, output=self.prune(work.model, work.batches))
        if work.stage.name == "aligned":  # what was trained is the base; the terms were zero
            assert work.handle is not None
            return dataclasses.replace(work, model=work.handle.remove(), handle=None)
        handle = self.recover(work.model, work.read["learn"], work.read["prune"])
        return dataclasses.replace(work, handle=handle, output=dict(handle.named_state()))

    def prune(
        self, model: nn.Module, batches: Callable[[], Sequence[Batch]] = list, seed: int = 0
    ) -> dict[str, Tensor]:
        """Prune a model in place; returns the kept units by module, and the base's fingerprint.

        `batches()` gives calibration batches, if the criterion needs data.
        """
        kept = {BASE: identity(model)}
        if self.pattern != "structured":
            self.thin_out(model, batches, seed)
            return kept
        found = list(self.chosen(groups(model, self.heads > 0, self.channels > 0)))
        for group, ratio in found:
            with self.looking(model, [member.site for member in group.members], batches):
                kept[group.path] = kept_units(scores(group, self.criterion, seed), ratio)
        for group, _ in found:
            take_out(group, kept[group.path])
        return kept

    @contextmanager
    def looking(
        self, model: nn.Module, sites: Sequence[Site], batches: Callable[[], Sequence[Batch]]
    ) -> Iterator[None]:
        """Context manager: these sites with the data that the criterion needs, freed afterwards."""
        if self.criterion == "gradient":
            gather_gradients(model, sites, batches())
        elif self.criterion == "activation":
            gather_activations(model, sites, batches())
        with torch.no_grad():
            yield
        for site in sites:
            site.gradient = site.activations = None

    def chosen(self, found: Sequence[Group]) -> Iterator[tuple[Group, float]]:
        """The groups that are pruned, each with the share it loses."""
        for heads, ratio in ((True, self.heads), (False, self.channels)):
            of_kind = [g for g in found if g.members[0].site.role.startswith("attn") == heads]
            spare = round(self.spared * len(of_kind))
            yield from ((group, ratio) for group in of_kind[spare : len(of_kind) - spare])

    def thin_out(self, model: nn.Module, batches: Callable[[], Sequence[Batch]], seed: int) -> None:
        """Zero single weights of attention and MLP maps, each with data through the pruned ones."""
        by_parent: dict[str, dict[str, list[Site]]] = {"attn": {}, "mlp": {}}
        for site in thinned(model):
            parents = by_parent[site.role.split(".")[0]]
            parents.setdefault(site.path.rpartition(".")[0], []).append(site)
        for kind, ratio in (("attn", self.heads), ("mlp", self.channels)):
            found = list(by_parent[kind].values()) if ratio else []
            spare = round(self.spared * len(found))
            for sites in found[spare : len(found) - spare]:
                with self.looking(model, sites, batches):
                    for site in sites:
                        score = importance(site, self.criterion, seed).abs()
                        W = site.weight()
                        W.mul_(sparse(score, self.pattern, ratio).to(W.device))

    def recover(
        self, model: nn.Module, learnt: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> Handle:
        """Attach the trained adapter to the whole model. FileError for another model's map."""
        if identity(model) != kept[BASE]:
            raise FileError(
                "the prune map was made for another model",
                [("base", type(model).__name__)],
                "Recover on the model that was pruned, unchanged.",
            )
        found = groups(model, self.heads > 0, self.channels > 0) if len(kept) > 1 else []
        member_of = {
            member.site.path: (group, member)
            for group in found
            if group.path in kept
            for member in group.members
        }
        heads = {name: t for name, t in model.named_parameters() if name in learnt}
        whole = dict.fromkeys(name.partition(".")[0] for name in heads)  # was trained beside them
        handle = attach(model, Recipe(weights=self), also_train=tuple(whole))
        with torch.no_grad():
            for name, parameter in heads.items():
                parameter.copy_(learnt[name])
        for path, by_name in handle.terms().items():
            site, term = handle.sites[path], by_name["loram"]
            assert isinstance(term, LowRank)
            stem = f"{site.module_path}.{site.prefix}loram"
            B, A = learnt[f"{stem}.B"], learnt[f"{stem}.A"]
            if path in member_of:
                group, member = member_of[path]
                B, A = widened(group, kept[group.path], member, B, A)
                if member.axis == 1 and self.fill == "normal":
                    A = self.filled(site, A, units(kept[group.path], member.width))
            term.select(torch.arange(A.shape[-2]))  # a narrower map may have had a smaller rank
            with torch.no_grad():
                term.B.copy_(B)
                term.A.copy_(A)
                if isinstance(term, Masked):
                    term.mask.copy_(learnt[f"{stem}.mask"])
        return handle

    def filled(self, site: Site, A: Tensor, kept: Tensor) -> Tensor:
        """N(0, 1/r^2) at the columns of A [r, n] that were pruned."""
        g = seeded_generator(site.seed, site.path, "fill")
        noise = torch.randn(A.shape, generator=g).to(A) / A.shape[0]
        return noise.index_copy(1, kept.to(A.device), A[:, kept.to(A.device)])

    def cost(self, m: int, n: int) -> Cost:
        """The cost on the maps that the adapter is trained on."""
        pair = min(self.rank, m, n) * (m + n)
        if self.mask_delta:
            return Cost(parameters=pair, frozen=m * n, flops_per_token=2 * m * n)
        return Cost(parameters=pair, flops_per_token=2 * pair)
