"""Sites, the places where a linear map lives: every layer type is seen as a matrix [*, m, n].

The only file that knows layer types. Classes of other packages are recognised by their qualified
names, so that the packages need not be imported.

    Linear      weight [m, n]                     as it is
    Conv1D      weight [n, m] (GPT-2)             transposed
    Embedding   weight [n, m], n = vocabulary     transposed: a map from one-hot tokens
    Conv1d..3d  weight [m, c, kh, kw]             n = c * kh * kw, by unfolding
    experts     a 3-D parameter [e, m, n]         one matrix per expert

A Linear may be quantised: its weight is then a tensor of torchao's or a packed parameter of
bitsandbytes. Its own forward computes with it; `dequantised` returns the matrix.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

CONV1D = "transformers.pytorch_utils.Conv1D"
QUANTISERS = ("torchao", "bitsandbytes")  # packages whose tensors stand for a matrix
HOOKED = "_old_forward"  # where accelerate keeps the forward that its hooks call
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # of torch: others inherit


@dataclass(frozen=True)
class Horizon:
    """The schedule of the training ahead: optimizer steps, the peak lr, warm-up steps."""

    steps: int | None = None
    lr: float = 0.0
    warmup: int = 0

    @property
    def first_lr(self) -> float:
        """The learning rate of the first step: the peak divided by the warm-up steps."""
        return self.lr / max(1, self.warmup)


@dataclass(eq=False)
class Site:
    """One place where a map lives, before or after terms are attached to it.

    `path` names the module (and the parameter, for fused experts), `matrix_shape` is
    (*, m, n) and stays known when the matrix is dropped. `ties` are the paths of other modules
    that use the same matrix. While terms are built, `horizon` is set, and `gradient` [*, m, n]
    and `activations` [t, n] where the method needs them.
    """

    path: str
    module: nn.Module
    kind: str
    matrix_shape: tuple[int, ...]
    param: str = "weight"
    role: str = "other"
    ties: tuple[str, ...] = ()
    tied_modules: tuple[nn.Module, ...] = field(default=(), repr=False)
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    gradient: Tensor | None = field(default=None, repr=False)
    activations: Tensor | None = field(default=None, repr=False)
    horizon: Horizon = field(default=Horizon(), repr=False)

    @property
    def raw(self) -> nn.Parameter:
        """The parameter in the module's own layout."""
        return getattr(self.module, self.param)

    @property
    def prefix(self) -> str:
        """The prefix of a term's name among the module's children."""
        return f"{self.param}_" if self.kind == "experts" else ""

    @property
    def module_path(self) -> str:
        """The path of the module itself."""
        return self.path.rsplit(".", 1)[0] if self.kind == "experts" else self.path

    @property
    def transposed(self) -> bool:
        """Is the stored matrix [*, n, m]?"""
        return transposed(self.module, self.kind)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs, inputs."""
        m, n = self.matrix_shape[-2:]
        return m, n

    @property
    def leading(self) -> tuple[int, ...]:
        """Leading dimensions: (experts,) or ()."""
        return self.matrix_shape[:-2]

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense matrix [*, m, n], detached; a view where no dtype is asked for."""
        matrix = as_matrix(dequantised(self.raw.detach(), self.module), self.module, self.kind)
        return matrix if dtype is None else matrix.to(dtype)

    @property
    def generator(self) -> torch.Generator:
        """A fresh CPU generator seeded by (seed, path): independent of order and of targets."""
        return seeded_generator(self.seed, self.path)


def seeded_generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator whose seed is the hash of (seed, names): the same in every process."""
    text = "/".join(str(name) for name in (seed, *names))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def qualified_name(cls: type) -> str:
    """module.Class of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def quantised(tensor: Any) -> bool:
    """Is this a quantised weight of another package, whose elements are codes?"""
    cls = type(tensor)
    return cls not in (Tensor, nn.Parameter) and cls.__module__.split(".")[0] in QUANTISERS


def dequantised(tensor: Tensor, module: nn.Module) -> Tensor:
    """The dequantised matrix of this module's weight; any other tensor is returned as it is."""
    raw: Any = getattr(module, "weight", None)
    if not quantised(tensor) and not quantised(raw):
        return tensor
    if hasattr(tensor, "dequantize") and quantised(tensor):
        return tensor.dequantize()
    from bitsandbytes import functional

    if getattr(raw, "quant_state", None) is not None:  # Linear4bit, packed two to a byte
        return functional.dequantize_4bit(raw.data, raw.quant_state)
    state: Any = getattr(module, "state", None)  # Linear8bitLt: moved here by its first forward
    rows = raw.SCB if getattr(raw, "SCB", None) is not None else state.SCB
    return functional.int8_vectorwise_dequant(raw.data, rows)


def kind_of(module: nn.Module) -> str | None:
    """linear, conv1d (GPT-2's), embedding, conv, experts; None for all others."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if any(qualified_name(c) == CONV1D for c in type(module).__mro__):
        return "conv1d"
    if expert_parameters(module):
        return "experts"
    return None


def expert_parameters(module: nn.Module) -> list[str]:
    """Names of the 3-D parameters of a fused expert module (Mixtral, Qwen-MoE, ...)."""
    own = dict(module.named_parameters(recurse=False))
    return [name for name in EXPERT_PARAMETERS if name in own and own[name].ndim == 3]


def transposed(module: nn.Module, kind: str) -> bool:
    """Does this kind of layer store [*, n, m]?"""
    if kind == "experts":
        return bool(getattr(module, "is_transposed", False))
    return kind in ("conv1d", "embedding")


def as_matrix(tensor: Tensor, module: nn.Module, kind: str) -> Tensor:
    """A stored tensor as [*, m, n]."""
    if kind == "conv":
        return tensor.flatten(1)
    return tensor.mT if transposed(module, kind) else tensor


def as_stored(matrix: Tensor, module: Any, kind: str) -> Tensor:
    """A matrix [*, m, n] in the module's own layout."""
    if kind == "conv":
        return matrix.unflatten(-1, (-1, *module.kernel_size))
    return matrix.mT if transposed(module, kind) else matrix


def reads_past_module(parent: nn.Module, name: str) -> str:
    """Why terms on this child would be skipped: its parent reads its weight instead of calling it.

    Text for an error; empty if the child is called.
    """
    if isinstance(parent, nn.MultiheadAttention) and name == "out_proj":
        return "reads its weight without calling it"
    fused = isinstance(parent, nn.TransformerEncoderLayer) and name in ("linear1", "linear2")
    if fused and torch.backends.mha.get_fastpath_enabled():
        return (
            "reads its weight without calling it in evaluation, "
            "until torch.backends.mha.set_fastpath_enabled(False)"
        )
    if hasattr(parent, "A_log"):  # a state space, which scans in one function
        if name == "dt_proj":
            return "reads its weight without calling it"
        if name in ("x_proj", "out_proj") and find_spec("mamba_ssm"):
            return "reads its weight without calling it in training, since mamba_ssm is installed"
    return ""


def forward_replaced(module: nn.Module) -> bool:
    """Was this layer's forward replaced on the instance? Terms would then be skipped."""
    return "forward" in vars(module) and HOOKED not in vars(module)


def more_than_its_matrix(module: nn.Module) -> bool:
    """Does this layer's class compute anything other than torch's own layer would?

    An overridden forward (offsets, a number format) is tested on one small input. Quantised layers
    and layers without values (an estimate) count as plain products.
    """
    layer: Any = next((cls for cls in type(module).__mro__ if cls in LAYERS), None)
    weight = module._parameters.get("weight")
    if layer is None or weight is None or type(module).forward is layer.forward:
        return False
    if quantised(weight) or weight.is_meta or isinstance(weight.data, FakeTensor):
        return False
    forward: Any = type(module).forward  # past hooks
    x = small_input(module, weight)
    with torch.no_grad():
        try:
            y = forward(module, x)
            expected = layer.forward(module, x) * getattr(module, "embed_scale", 1.0)
            # the same sum in another order is within bf16's 2^-8 of its largest value
            return not torch.allclose(y, expected, rtol=0, atol=0.01 * float(expected.abs().max()))
        except Exception:  # foreign code, given what it does not expect
            return True


def small_input(layer: Any, weight: Tensor) -> Tensor:
    """The smallest valid input of one of torch's layers: [1, n], ids [3] or one patch."""
    if isinstance(layer, nn.Embedding):
        return torch.arange(min(3, len(weight)), device=weight.device)
    kernel = zip(getattr(layer, "dilation", ()), getattr(layer, "kernel_size", ()), strict=True)
    shape = (1, weight.shape[1], *(1 + d * (k - 1) for d, k in kernel))
    return torch.randn(shape, generator=seeded_generator(0)).to(weight)


def find_sites(model: nn.Module, seed: int = 0) -> list[Site]:
    """All sites in the order of named_modules; a tied group is one site, at the embedding."""
    sites: dict[int, Site] = {}
    for path, module in model.named_modules():
        for site in module_sites(path, module, seed):
            first = sites.setdefault(id(site.raw), site)
            if first is not site:
                sites[id(site.raw)] = join(first, site)
    return list(sites.values())


def module_sites(path: str, module: nn.Module, seed: int) -> Iterator[Site]:
    """The sites of one module: one, one per fused parameter, or none."""
    kind = kind_of(module)
    if kind is None:
        return
    for param in expert_parameters(module) if kind == "experts" else ["weight"]:
        parameter = module._parameters.get(param)
        if parameter is not None:
            name = f"{path}.{param}" if kind == "experts" else path
            shape: tuple[int, ...]
            if quantised(parameter):  # packed: the module knows its sizes
                shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
            else:
                shape = tuple(as_matrix(parameter.detach(), module, kind).shape)
            yield Site(name, module, kind, shape, param, seed=seed)


def join(first: Site, other: Site) -> Site:
    """Merge two uses of one parameter: the embedding keeps the terms, the other refers to it."""
    if other.kind == "embedding" and first.kind != "embedding":
        first, other = other, first
    return dataclasses.replace(
        first,
        ties=(*first.ties, other.path, *other.ties),
        tied_modules=(*first.tied_modules, other.module, *other.tied_modules),
    )
