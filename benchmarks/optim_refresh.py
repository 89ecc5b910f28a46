"""A new basis by an eigendecomposition or from random products, against galore-torch's SVD.

    pip install --no-deps galore-torch
    python benchmarks/optim_refresh.py [--write]

The aim is ten times the speed at width 1024 and more, with at least 0.995 of the energy that
the best basis of that rank captures; "default" is what GaLore and Fira do when nobody says
otherwise, an SVD below that width. The gradient is that of a small language model's layer in
shape and spectrum: singular values fall as 1 / i, with noise below. Contenders are interleaved.
"""

import sys
from typing import Any

import torch
from optim_galore import galore_torch
from pairs import judge, ratios, spread, take_turns, versions, write
from torch import Tensor

from eckart.optim import Gram, Iteration, Leading, Randomised
from eckart.optim.project import Search

SHAPES = {"60M, mlp": (1376, 512, 128), "350M, attention": (1024, 1024, 256),
          "350M, mlp": (2736, 1024, 256)}  # fmt: skip
ENERGY, SPEED, WIDE = 0.995, 10.0, 1024


def gradient(m: int, n: int) -> Tensor:
    """[m, n] with singular values near 1 / i, and noise as large as the 100th."""
    g = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(m, n, generator=g))[0]
    V = torch.linalg.qr(torch.randn(n, n, generator=g))[0]
    noise = torch.randn(m, n, generator=g) / (100 * (m**0.5 + n**0.5))
    return U / torch.arange(1, n + 1) @ V.T + noise


def search(projector: Any, G: Tensor, old: dict[str, Tensor]) -> Tensor:
    """The right basis [r, n] that a projector finds."""
    asked = Search(G[None], old, [0], not old, (G.shape[0], G.shape[1]))
    found: Tensor = projector.find(asked)["right"][0]
    return found


def captured(G: Tensor, P: Tensor) -> float:
    """The share of G's energy in the directions P [r, n]."""
    G, P = G.double(), P.double()
    return float((G @ P.T).square().sum() / G.square().sum())


def compared(name: str, projector_of_theirs: Any) -> dict[str, Any]:
    m, n, rank = SHAPES[name]
    G = gradient(m, n)
    theirs = projector_of_theirs(rank, update_proj_gap=1)
    ways = {
        "default": Leading(rank, "right"),
        "gram": Gram(rank, "right"),
        "randomised": Randomised(rank, "right"),
        "iteration": Iteration(rank, "right"),
    }
    noise = 0.1 * G.norm() / (m * n) ** 0.5 * torch.randn(m, n)  # what the last one was found from
    old = {"right": search(ways["gram"], G + noise, {})[None]}
    contenders: dict[str, Any] = {
        way: lambda p=p, way=way: search(p, G, old if way == "iteration" else {})
        for way, p in ways.items()
    }
    contenders["galore_torch"] = lambda: theirs.get_orthogonal_matrix(G, rank, type="right")
    best = captured(G, contenders["galore_torch"]())
    seconds = take_turns(contenders, pairs=5)
    return {
        "matrix": name, "shape": [m, n], "rank": rank, "captured_by_the_best": round(best, 5),
        "share_of_the_best": {w: round(captured(G, contenders[w]()) / best, 5) for w in ways},
        "galore_torch_over": {w: ratios(seconds["galore_torch"], seconds[w]) for w in ways},
        "seconds": {k: spread(v) for k, v in seconds.items()},
    }  # fmt: skip


def main() -> None:
    galore_torch()
    projector = sys.modules["galore_torch.galore_projector"].GaLoreProjector
    torch.set_num_threads(1)
    runs = [compared(name, projector) for name in SHAPES]
    for run in runs:
        print(f"{run['matrix']} {run['shape']}, rank {run['rank']}: the best basis captures "
              f"{run['captured_by_the_best']:.4f} of the energy")  # fmt: skip
        for way, ratio in run["galore_torch_over"].items():
            judge(f"{way}: share of that energy", run["share_of_the_best"][way], ENERGY)
            if min(run["shape"]) >= WIDE:
                judge(f"{way}: speed against a full SVD", ratio["median"], SPEED)
            else:
                print(f"             {way}: {ratio['median']:.2f} times the speed of a full SVD")
    what = "a new right basis of rank r, fp32, one thread, CPU seconds, 5 pairs"
    write("optim_refresh", {"what": what, "runs": runs, "versions": versions("galore-torch")})


if __name__ == "__main__":
    main()
