"""A GaLore step without refresh, against its two thin products alone and against galore-torch.

    pip install --no-deps galore-torch
    python benchmarks/optim_galore.py [--model 7B] [--write]

The products G P^T and W += N P, computed as the step computes them, are the method's unavoidable
work. The aim is at most 1.25 times their time, and at least 1.15 times the speed of galore-torch.
galore-torch's time relative to these products, printed too, bounds the speed-up that any step can
have over it. Steps of the three are interleaved and ratios compare neighbouring runs, so that a
slow phase of the machine affects all.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from counting import Llama, apart, chosen, first_basis, problem, titled
from pairs import judge, ratios, spread, take_turns, versions, write
from torch import nn

from eckart.decompose.products import add_product_, product
from eckart.methods.update.galore import GaLore
from eckart.optim import LowRankOptimizer

NEVER = 10**9


def galore_torch() -> type:
    """galore-torch's AdamW, imported without the package's __init__, which needs bitsandbytes."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None:
        sys.exit("galore-torch is missing. Type: pip install --no-deps galore-torch")
    package = types.ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW


def ours(params: list[nn.Parameter], rank: int) -> Callable[[], object]:
    rule = GaLore(rank=rank, every=NEVER, stagger=False).rule()
    return LowRankOptimizer(params, lr=0.01, rule=rule).step


def theirs(params: list[nn.Parameter], AdamW: type, rank: int) -> Callable[[], object]:
    """galore-torch's optimizer, given our first bases: an SVD of a large matrix takes a minute."""
    projector: Any = sys.modules["galore_torch.galore_projector"].GaLoreProjector
    places = count()  # each parameter asks once, in their order
    projector.get_orthogonal_matrix = lambda self, *given, type: first_basis(
        next(places), *given, type
    )
    group = {"params": params, "rank": rank, "update_proj_gap": NEVER}
    group |= {"scale": 0.25, "proj_type": "std"}
    return AdamW([group], lr=0.01, no_deprecation_warning=True).step


def products(params: list[nn.Parameter], rank: int) -> Callable[[], None]:
    """The products R = G P^T and W += R P alone (their transposes where m < n)."""
    work = []
    for p in params:
        m, n = p.shape
        P = torch.linalg.qr(torch.randn(min(m, n), rank))[0]  # [short side, r]
        work.append((p.detach(), p.grad, P.T.contiguous() if m >= n else P))

    @torch.no_grad()
    def run() -> None:
        for W, G, P in work:
            if W.shape[0] >= W.shape[1]:
                add_product_(W, product(G, P.T), P, alpha=-1e-4)
            else:
                add_product_(W, P, product(P.T, G), alpha=-1e-4)

    return run


def compared(name: str, model: Llama, AdamW: type) -> dict[str, object]:
    """Ratios and times for blocks of one model."""
    a, b, c = (problem(model.shapes()) for _ in range(3))
    step, other = ours(a, model.rank), theirs(b, AdamW, model.rank)
    thin = products(c, model.rank)
    step(), other()  # the first step finds the bases
    step(), other()
    gap = apart(a, b)
    contenders = {"products": thin, "eckart": step, "galore_torch": other}
    seconds = take_turns(contenders, model.turns, model.repeat)
    return {
        "model": name,
        "width": model.width,
        "rank": model.rank,
        "step_over_products": ratios(seconds["eckart"], seconds["products"]),
        "galore_torch_over_step": ratios(seconds["galore_torch"], seconds["eckart"]),
        "galore_torch_over_products": ratios(seconds["galore_torch"], seconds["products"]),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "largest_difference_of_weights": gap,
    }


def main() -> None:
    AdamW = galore_torch()
    torch.set_num_threads(1)
    runs = [compared(name, model, AdamW) for name, model in chosen("60M", "350M").items()]
    for run in runs:
        over: Any = run["step_over_products"]
        faster: Any = run["galore_torch_over_step"]
        at = f"at width {run['width']}"
        judge(f"step over its products {at}", over["median"], 1.25, at_least=False)
        judge(f"speed against galore-torch {at}", faster["median"], 1.15)
        most: Any = run["galore_torch_over_products"]
        print(f"             the products alone would be {most['median']:.3f} times as fast")
    what = "GaLore step without refresh, Llama blocks, fp32, one thread, CPU seconds"
    write(
        titled("optim_galore"), {"what": what, "runs": runs, "versions": versions("galore-torch")}
    )


if __name__ == "__main__":
    main()
