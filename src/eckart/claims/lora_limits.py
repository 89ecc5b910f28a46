"""LoRA's limits: the accuracy of a linear-time gradient, and whether a trained model permits it.

Source: J. Hu, M. Su, E. Kuo, Z. Song, H. Liu, "Computational Limits of Low-Rank Adaptation
(LoRA) Fine-Tuning for Transformer Models", ICLR 2025, abstract: below a threshold on the norms
of queries, keys and the scaled adapter LoRA's gradient can be had in almost linear time, above
it not in less than quadratic time.

The approximate gradient is that of attention with exp truncated at degree 2, on heads of width 8
with entries uniform in [-G, G]: whether its error is small (1 %) or large (30 %) must depend on G
and not on the number of tokens. On the trained model, the adapter's scale must change the largest
logits, and some head must be in the easy regime, where fewer features than its 64 tokens suffice.
The lower bound rests on a conjecture (SETH), which is not tested here.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from eckart.claims import (
    END,
    Arm,
    Claim,
    Lab,
    Quantities,
    Results,
    Statement,
    Trained,
    at_least,
    at_most,
    higher,
)
from eckart.decompose.bounds import centred, logit_reach, regime
from eckart.decompose.polynomial import gradient_errors, polynomial_attention
from eckart.linear import seeded_generator
from eckart.methods import LoRA
from eckart.recipe import Recipe

WIDTH, DEGREE = 8, 2
NORMS, LENGTHS = (0.5, 1.0, 2.0, 3.0), (64, 1024)
TIMED = (1024, 4096)
REPEATS = 5  # of a timing, of which the shortest is taken


def drawn(lab: Lab, norm: float, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Q, K uniform in [-G, G], V and dO normal, each [L, h]."""
    g = seeded_generator(lab.seed, str(norm), str(length))
    Q, K = ((2 * torch.rand(length, WIDTH, generator=g) - 1) * norm for _ in range(2))
    V, dO = (torch.randn(length, WIDTH, generator=g) for _ in range(2))
    return [t.to(dtype) for t in (Q, K, V, dO)]


def by_norm(lab: Lab) -> Quantities:
    """The largest relative error of dQ, dK, dV at each norm, and its ratio between lengths."""
    found = {}
    for norm in NORMS:
        worst = []
        for length in LENGTHS:
            Q, K, V, dO = drawn(lab, norm, length, torch.float64)
            errors = gradient_errors(Q, K, V, dO, 1 / WIDTH, DEGREE)
            worst.append(max(float(errors[name]) for name in ("dQ", "dK", "dV")))
        found[f"error at {norm:g}"] = max(worst)
        found[f"ratio at {norm:g}"] = max(worst) / min(worst)
    return found


def exact(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    return scaled_dot_product_attention(Q[None, None], K[None, None], V[None, None])[0, 0]


def fast(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    return polynomial_attention(Q, K, V, WIDTH**-0.5, DEGREE)


def seconds(form: Callable[[Tensor, Tensor, Tensor], Tensor], lab: Lab, length: int) -> float:
    """Seconds of a forward and a backward pass."""
    *inputs, dO = drawn(lab, 0.5, length, torch.float32)
    times = []
    for _ in range(REPEATS):
        leaves = [t.clone().requires_grad_() for t in inputs]
        begun = time.perf_counter()
        torch.autograd.grad(form(*leaves), leaves, dO)
        times.append(time.perf_counter() - begun)
    return min(times)


def by_length(lab: Lab) -> Quantities:
    """The exponent of L in the time of torch's attention, and of degree 2."""
    short, long = TIMED
    growth = {
        name: seconds(form, lab, long) / seconds(form, lab, short)
        for name, form in (("exact", exact), ("fast", fast))
    }
    return {f"{name} power": math.log(g) / math.log(long / short) for name, g in growth.items()}


# --- the heads of a model ------------------------------------------------------------------


@torch.no_grad()
def head_reaches(model: nn.Module, lab: Lab) -> Tensor:
    """The largest |logit| of each head on a batch, with rotated and centred keys, [heads]."""
    found: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = kwargs["hidden_states"]  # [rows, L, d]
        cos, sin = kwargs["position_embeddings"]
        h = module.head_dim
        Q, K = (p(x).unflatten(-1, (-1, h)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
        Q, K = (rotated(t, cos[:, None], sin[:, None]) for t in (Q, K))
        found.append(logit_reach(Q, centred(K), h**-0.5).amax(0))

    hooks = [
        module.register_forward_pre_hook(look, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "q_proj")
    ]
    model(**lab.batch(0))
    for hook in hooks:
        hook.remove()
    return torch.cat(found)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings to x [rows, heads, L, h]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def reach(trained: Trained, lab: Lab) -> Quantities:
    return {"reach": float(head_reaches(trained.model, lab).median())}


def heads(lab: Lab) -> Quantities:
    """Median of the largest logits over the pretrained model's heads, and how many are easy."""
    found, model = head_reaches(lab.model(), lab), lab.model()
    width: Any = next(m for m in model.modules() if hasattr(m, "q_proj"))
    length = lab.batch(0)["input_ids"].shape[1]
    easy = sum(regime(float(r), width.head_dim, length) == "easy" for r in found)
    return {"reach": float(found.median()), "easy": float(easy)}


def adapter(alpha: float) -> Arm:
    """LoRA on queries and keys with this alpha, at a fixed learning rate."""
    recipe = Recipe(LoRA(rank=8, alpha=alpha, targets=("attn.q", "attn.k")))
    return Arm(f"alpha {alpha:g}", recipe, lr=1e-2, search=False, watch={END: reach})


def lengths_agree(r: Results) -> float:
    """log 2 minus the largest log ratio of errors between lengths."""
    return math.log(2) - max(math.log(r["norms"][f"ratio at {norm:g}"]) for norm in NORMS)


CLAIM = Claim(
    says="how near a gradient in linear time comes depends on the norms of queries and keys and "
    "not on the length, an adapter's scale moves them, and a trained model has heads that allow it",
    arms=(
        Arm("norms", run=by_norm, search=False),
        Arm("lengths", run=by_length, search=False),
        Arm("pretrained", run=heads, search=False),
        adapter(4),
        adapter(16),
        adapter(64),
    ),
    control=Statement(
        "at G = 3 the error is above that at G = 0.5 by 0.1",
        lambda r: r["norms"]["error at 3"] - r["norms"]["error at 0.5"] - 0.1,
        unit="",
    ),
    statements=(
        at_most("norms", 0.01, "error at 0.5"),
        at_least("norms", 0.3, "error at 3"),
        Statement("64 and 1,024 tokens have errors within a factor of 2", lengths_agree, unit=""),
        at_least("lengths", 1.5, "exact power"),
        at_most("lengths", 1.5, "fast power"),
        higher("alpha 16", than="alpha 4", quantity="reach", unit=""),
        higher("alpha 64", than="alpha 16", quantity="reach", unit=""),
        at_least("pretrained", 1, "easy", unit="heads"),
    ),
    unseen="the lower bound, heads of large models at lengths of 100,000 tokens, training "
    "through the fast gradient",
)
