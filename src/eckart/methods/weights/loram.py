"""LoRAM: learn a LoRA on a pruned model, use it with the whole one.

    prune      whole channels and heads leave the base:  W^P = E W, or W E^T
    align      (optional) the pruned base is trained a little, so that it behaves as the whole
    learn      y = W^P x + s B^P A^P x                   LoRA on what is left
    recover    B = E^T B^P,  A = A^P E                   zeros where something was pruned
    then       y = W x + s B A x                         a plain LoRA of the original model

E is a 0/1 selection of kept rows. Take it where the base does not fit the device that trains
but does fit the one that serves; take LoRA wherever the base fits. The premise is that large
models are redundant, so a small model suffers sooner. Judge by the held-out loss of the WHOLE
model: the pruned one's says little.

Coupled units are pruned together: an MLP channel is a row of gate and of up and a column of
down; a KV head is its rows of k and v, and for each query head that reads it rows of q and
columns of o. The pruned model is then the whole one with these rows and columns zero, and
zeros at recovery are what that one would have learnt: the removed rows of B get no gradient,
nor do the removed columns of A. (fill=normal, as an option of the official code, is noise fed
by channels that are alive in the whole model.)

pattern=2:4 and unstructured zero single weights by magnitude; shapes stay, so recovery is the
identity and memory is saved only by a sparse format. The base itself is frozen while B A is
learnt, and B A is not masked.

Source: J. Zhang et al., "Train Small, Infer Large: Memory-Efficient LoRA Training for Large
Language Models", 2025, Alg. 1. Sizes are kept in the map and never computed anew. We differ
in that alignment uses the job's own data and trains the layers' weights, not the head.

m out, n in, r rank, h head width, g query heads per KV head.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from eckart.errors import FileError, UsageError
from eckart.linear import LowRank, Site, seeded_generator
from eckart.linear.factored import fresh_pair
from eckart.linear.narrow import narrow, spread, units
from eckart.recipe import Cost, Handle, Paper, Recipe, Stage, Weights, Work, attach
from eckart.recipe.calibrate import Batch, gather_gradients
from eckart.recipe.fingerprint import fingerprint
from eckart.recipe.targets import sites_of

BASE = "base"  # in a prune map: which model it was made for


@dataclass(frozen=True)
class Member:
    """A map's part in a group: a unit is `width` of its rows (axis 0) or columns (axis 1)."""

    site: Site
    axis: Literal[0, 1]
    width: int

    def by_unit(self, entries: Tensor) -> Tensor:
        """Sums over each unit: [m, n] -> [units]."""
        return entries.sum(1 - self.axis).unflatten(0, (-1, self.width)).sum(1)


@dataclass(frozen=True)
class Group:
    """Maps that lose units together: an MLP's channels, or an attention's KV heads."""

    path: str
    count: int
    members: tuple[Member, ...]


def groups(model: nn.Module, heads: bool, channels: bool) -> list[Group]:
    """The groups of a model in order. UsageError where its heads or channels are unknown."""
    by_parent: dict[str, dict[str, Site]] = {}
    for site in sites_of(model):
        if site.role.split(".")[0] in ("attn", "mlp"):
            by_parent.setdefault(site.path.rpartition(".")[0], {})[site.role] = site
    found = []
    for path, parts in by_parent.items():
        attention = any(role.startswith("attn") for role in parts)
        if heads if attention else channels:
            take = kv_heads if attention else mlp_channels
            found.append(take(path, model.get_submodule(path), parts))
    return found


def mlp_channels(path: str, module: nn.Module, parts: Mapping[str, Site]) -> Group:
    """gate and up lose rows, down loses columns."""
    known = {"mlp.up", "mlp.down"} <= parts.keys() <= {"mlp.gate", "mlp.up", "mlp.down"}
    if not known or any(site.kind != "linear" for site in parts.values()):
        raise unknown(path, "channels", parts)
    members = [Member(s, 1 if role == "mlp.down" else 0, 1) for role, s in parts.items()]
    return Group(path, parts["mlp.down"].shape[1], tuple(members))


def kv_heads(path: str, module: Any, parts: Mapping[str, Site]) -> Group:
    """k and v lose a head's rows, q and o those of all query heads that read it."""
    h: Any = getattr(module, "head_dim", None)
    fits = isinstance(h, int) and hasattr(module, "num_key_value_groups")
    known = parts.keys() == {"attn.q", "attn.k", "attn.v", "attn.o"}
    if not (fits and known) or any(site.kind != "linear" for site in parts.values()):
        raise unknown(path, "heads", parts)
    count = parts["attn.k"].shape[0] // h
    wide = parts["attn.q"].shape[0] // count  # g h
    members = (
        Member(parts["attn.q"], 0, wide),
        Member(parts["attn.k"], 0, h),
        Member(parts["attn.v"], 0, h),
        Member(parts["attn.o"], 1, wide),
    )
    return Group(path, count, members)


def unknown(path: str, what: str, parts: Mapping[str, Site]) -> UsageError:
    """The error for a layer whose units we do not know how to take out."""
    return UsageError(
        f"loram does not know how to prune these {what}",
        [(path, ", ".join(f"{role} ({site.kind})" for role, site in parts.items()))],
        f"Type weights.{what}=0 to keep them all.",
    )


# --- prune and recover ---------------------------------------------------------------------


def scores(group: Group, criterion: str, seed: int) -> Tensor:
    """How much each unit matters, [count]; at random, by |w|^2, or by |sum g w|."""
    if criterion == "random":
        return torch.rand(group.count, generator=seeded_generator(seed, group.path, "prune"))
    total = torch.zeros(group.count, dtype=torch.float64)
    for member in group.members:
        W = member.site.weight(torch.float64)
        if criterion == "gradient":
            G = member.site.gradient
            total += member.by_unit(W * (0.0 if G is None else G.double())).cpu()
        else:
            total += member.by_unit(W * W).cpu()
    return total.abs()


def kept_units(score: Tensor, ratio: float) -> Tensor:
    """Indices of the units that stay, ascending int32: at least one."""
    count = max(1, round((1 - ratio) * len(score)))
    return score.topk(count).indices.sort().values.int()


def take_out(group: Group, kept: Tensor) -> None:
    """Narrow all maps of a group to the kept units, in place."""
    for member in group.members:
        index = units(kept, member.width).to(member.site.raw.device)
        rows, columns = (index, None) if member.axis == 0 else (None, index)
        narrow(member.site.module, rows, columns)  # type: ignore[arg-type]


def identity(model: nn.Module) -> Tensor:
    """The model's fingerprint as a tensor, int64 []."""
    return torch.tensor(int(fingerprint(model)[:15], 16))


def widened(group: Group, kept: Tensor, member: Member, B: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    """B [m, r], A [r, n] of the whole map from those of the narrow one, zeros elsewhere."""
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


def sparse(W: Tensor, pattern: str, ratio: float) -> Tensor:
    """Which weights of W [m, n] stay: the larger two of four inputs, or the largest share."""
    if pattern == "2:4":
        whole = W.shape[1] // 4 * 4
        blocks = W[:, :whole].abs().unflatten(1, (-1, 4))
        top = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, blocks.topk(2).indices, True)
        return torch.cat([top.flatten(1), torch.ones_like(W[:, whole:], dtype=torch.bool)], 1)
    keep = max(1, round((1 - ratio) * W.numel()))
    return W.abs() >= W.abs().flatten().topk(keep).values[-1]


@dataclass(frozen=True)
class LoRAM(Weights):
    """Trains a LoRA on a pruned base and gives it to the whole one, which stays as it is."""

    rank: Annotated[int, Ge(1)] = 8
    """r. Paper: 8; cut to min(m, n) of the pruned maps."""

    alpha: Annotated[float, Gt(0)] = 16.0
    """Numerator of the scale s = alpha / r."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of inputs of A dropped in training. Paper: 0.05."""

    pattern: Literal["structured", "2:4", "unstructured"] = "structured"
    """Whole channels and heads, or single weights (which saves no memory here)."""

    channels: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Share of MLP channels (or weights) pruned in a layer. Paper: 0.65 to 0.95 at 70B."""

    heads: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Share of KV heads (or attention weights) pruned in a layer; one head always stays."""

    spared: Annotated[float, Ge(0), Lt(0.5)] = 0.05
    """Share of the layers at either end that stays whole. Paper: 4 and 2 of 80."""

    criterion: Literal["magnitude", "random", "gradient"] = "magnitude"
    """What says that a unit matters: its weights, nothing, or |sum g w| on the job's data."""

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
    promises: ClassVar = ("starts_at_base", "restores_base", "merges", "exports_low_rank")

    @property
    def stages(self) -> tuple[Stage, ...]:  # type: ignore[override]
        """Prune, align where steps are given for it, learn, recover."""
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
        return {"loram": LowRank(B, A, self.alpha / self.rank, dropout=self.dropout)}

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
        """Take units out of a model in place; the map: kept units by module, and the base's name.

        `batches()` gives calibration batches, asked for by criterion=gradient alone.
        """
        kept = {BASE: identity(model)}
        if self.pattern != "structured":
            self.thin_out(model)
            return kept
        found = list(self.chosen(groups(model, self.heads > 0, self.channels > 0)))
        if self.criterion == "gradient":
            sites = [member.site for group, _ in found for member in group.members]
            gather_gradients(model, sites, batches())
        for group, ratio in found:
            kept[group.path] = kept_units(scores(group, self.criterion, seed), ratio)
            take_out(group, kept[group.path])
        return kept

    def chosen(self, found: Sequence[Group]) -> Iterator[tuple[Group, float]]:
        """The groups that are not spared, each with the share it loses."""
        for heads, ratio in ((True, self.heads), (False, self.channels)):
            of_kind = [g for g in found if g.members[0].site.role.startswith("attn") == heads]
            spare = round(self.spared * len(of_kind))
            yield from ((group, ratio) for group in of_kind[spare : len(of_kind) - spare])

    @torch.no_grad()
    def thin_out(self, model: nn.Module) -> None:
        """Zero single weights of attention and MLP maps, by magnitude."""
        for kind, ratio in (("attn", self.heads), ("mlp", self.channels)):
            by_parent: dict[str, list[Site]] = {}
            for site in sites_of(model):
                if site.role.split(".")[0] == kind and not site.leading:
                    by_parent.setdefault(site.path.rpartition(".")[0], []).append(site)
            parents = list(by_parent.values())
            spare = round(self.spared * len(parents))
            for sites in parents[spare : len(parents) - spare] if ratio else []:
                for site in sites:
                    W = site.weight()
                    W.mul_(sparse(W, self.pattern, ratio))

    def recover(
        self, model: nn.Module, learnt: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> Handle:
        """The learnt adapter on the whole model. FileError where the map is another model's."""
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
        handle = attach(model, Recipe(weights=self))
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
        return handle

    def filled(self, site: Site, A: Tensor, kept: Tensor) -> Tensor:
        """N(0, 1/r^2) at the columns of A [r, n] that were pruned."""
        g = seeded_generator(site.seed, site.path, "fill")
        noise = torch.randn(A.shape, generator=g).to(A) / A.shape[0]
        return noise.index_copy(1, kept.to(A.device), A[:, kept.to(A.device)])

    def cost(self, m: int, n: int) -> Cost:
        """On the maps that the adapter is learnt on."""
        pair = min(self.rank, m, n) * (m + n)
        return Cost(parameters=pair, flops_per_token=2 * pair)
