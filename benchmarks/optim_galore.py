"""A GaLore step without refresh, against its two thin products alone and against galore-torch.

    pip install --no-deps galore-torch
    python benchmarks/optim_galore.py [PAIRS] [--out FILE.json]

The products G P^T and W += N P are what the method cannot do without; the aim is at most
1.25 times their time, and at least 1.15 times the speed of galore-torch. Steps of the three
are interleaved; ratios are of neighbours, so that a slower minute touches both.
"""

import importlib
import importlib.util
import json
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from eckart.methods.update.galore import GaLore
from eckart.optim import LowRankOptimizer

RANK, NEVER = 128, 10**9
WIDTHS = {512: (1376, 2), 1024: (2736, 1)}  # of Llama blocks: the mlp's width, and how many


def galore_torch() -> type:
    """galore-torch's AdamW, without its package's __init__, which needs bitsandbytes."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None:
        sys.exit("galore-torch is missing. Type: pip install --no-deps galore-torch")
    package = types.ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW


def problem(width: int) -> list[nn.Parameter]:
    """The same weights and gradients at every call."""
    torch.manual_seed(0)
    wide, blocks = WIDTHS[width]
    shapes = [(width, width)] * 4 + [(wide, width)] * 2 + [(width, wide)]
    params = [nn.Parameter(torch.randn(s) / 30) for s in shapes * blocks]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def ours(params: list[nn.Parameter]) -> Callable[[], object]:
    rule = GaLore(rank=RANK, every=NEVER, stagger=False).rule()
    return LowRankOptimizer(params, lr=0.01, rule=rule).step


def theirs(params: list[nn.Parameter], AdamW: type) -> Callable[[], object]:
    group = {"params": params, "rank": RANK, "update_proj_gap": NEVER}
    group |= {"scale": 0.25, "proj_type": "std"}
    return AdamW([group], lr=0.01, no_deprecation_warning=True).step


def products(params: list[nn.Parameter]) -> Callable[[], None]:
    """R = G P^T and W += R P (their transposes where m < n), and nothing else."""
    work = []
    for p in params:
        m, n = p.shape
        P = torch.linalg.qr(torch.randn(min(m, n), RANK))[0]  # [short side, r]
        work.append((p.detach(), p.grad, P.T.contiguous() if m >= n else P))

    def run() -> None:
        for W, G, P in work:
            if W.shape[0] >= W.shape[1]:
                W.addmm_(G @ P.T, P, alpha=-1e-4)
            else:
                W.addmm_(P, P.T @ G, alpha=-1e-4)

    return run


def seconds(run: Callable[[], object], repeat: int = 3) -> float:
    start = time.process_time()  # of this process, one thread: neighbours on the machine are out
    for _ in range(repeat):
        run()
    return (time.process_time() - start) / repeat


def summary(values: list[float]) -> dict[str, float]:
    return {
        "min": round(min(values), 4),
        "median": round(statistics.median(values), 4),
        "max": round(max(values), 4),
    }


def compared(width: int, pairs: int, AdamW: type) -> dict[str, object]:
    """Ratios and times for blocks of one width."""
    a, b, c = (problem(width) for _ in range(3))
    step, other, thin = ours(a), theirs(b, AdamW), products(c)
    step(), other()  # the first step finds the bases
    step(), other(), thin()
    gap = max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))
    times = [[seconds(run) for run in (thin, step, other)] for _ in range(pairs)]
    return {
        "width": width,
        "rank": RANK,
        "step_over_products": summary([s / t for t, s, _ in times]),
        "galore_torch_over_step": summary([o / s for _, s, o in times]),
        "seconds": {
            "products": summary([t for t, _, _ in times]),
            "eckart": summary([s for _, s, _ in times]),
            "galore_torch": summary([o for _, _, o in times]),
        },
        "largest_difference_of_weights": gap,
    }


def main() -> None:
    words = sys.argv[1:]
    out = Path(words[words.index("--out") + 1]) if "--out" in words else None
    pairs = int(words[0]) if words and words[0].isdigit() else 15
    torch.set_num_threads(1)
    AdamW = galore_torch()
    result = {
        "what": "GaLore step without refresh, Llama blocks, fp32, one thread, CPU seconds",
        "pairs": pairs,
        "runs": [compared(width, pairs, AdamW) for width in WIDTHS],
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "galore-torch": "1.0",
        },
        "machine": platform.machine(),
    }
    print(json.dumps(result, indent=2))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
