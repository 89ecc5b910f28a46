"""A new basis by an eigendecomposition or from random products, against galore-torch's SVD.

    pip install --no-deps galore-torch
    python benchmarks/optim_refresh.py [--model 7B] [--text FILE] [--write]

The aim is ten times the speed at width 1024 and more, with at least 0.995 of the energy that
the best basis of that rank captures; "default" is the default of GaLore and Fira, an SVD below
that width. Synthetic gradients have the shapes of small language models and singular values that
decay as 1 / i, plus noise; for 7B only one of attention, where an SVD takes a minute. Real ones,
left out if --model is given, are those of a Llama of width 1024, before its first step and after
some on bytes of a text (by default Python's reference); "iteration" starts from the basis of an
earlier gradient. Runs are interleaved.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from counting import Llama, chosen, option, titled
from optim_galore import galore_torch
from pairs import judge, ratios, spread, take_turns, versions, write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from eckart.io.corpora import pydoc_prose
from eckart.optim import Gram, Iteration, Leading, Randomised
from eckart.optim.project import Search

LAYERS = {"attention": "self_attn.q_proj", "mlp": "mlp.up_proj"}  # [1024, 1024], [2736, 1024]
ENERGY, SPEED, WIDE, HUGE = 0.995, 10.0, 1024, 4096
STEPS = (0, 20, 40)  # before which real gradients are taken
Case = tuple[Tensor, Tensor, int]  # a gradient, what the last basis was found from, and the rank


def gradient(m: int, n: int) -> Tensor:
    """A gradient [m, n] with singular values near 1 / i, and noise as large as the 100th."""
    g = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(m, n, generator=g))[0]
    V = torch.linalg.qr(torch.randn(n, n, generator=g))[0]
    noise = torch.randn(m, n, generator=g) / (100 * (m**0.5 + n**0.5))
    return U / torch.arange(1, n + 1) @ V.T + noise


def made(models: dict[str, Llama]) -> dict[str, Case]:
    """Synthetic gradients of attention and mlp, each with a noisy version as the previous one."""
    cases = {}
    for name, model in models.items():
        width, rank = model.width, model.rank
        layers = {"attention": width} | ({"mlp": model.mlp} if width < HUGE else {})
        for layer, m in layers.items():
            G = gradient(m, width)
            noise = 0.1 * G.norm() / (m * width) ** 0.5 * torch.randn(m, width)
            cases[f"made, {name}, {layer}"] = (G, G + noise, rank)
    return cases


def real(text: bytes) -> dict[str, Case]:
    """Gradients of the second of two layers, on 2048 bytes of text."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=1024, intermediate_size=2736,
                         num_hidden_layers=2, num_attention_heads=16)  # fmt: skip
    model, ids = LlamaForCausalLM(config), torch.tensor(list(text))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def backward(rows: int) -> None:
        model.zero_grad()
        starts = torch.randint(len(ids) - 128, (rows,)).tolist()
        batch = torch.stack([ids[i : i + 128] for i in starts])
        model(input_ids=batch, labels=batch).loss.backward()

    cases: dict[str, Case] = {}
    last: dict[str, Tensor] = {}
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            backward(16)
            for name, layer in LAYERS.items():
                G = model.get_parameter(f"model.layers.1.{layer}.weight").grad.clone()
                cases[f"real, {name}, step {step}"] = (G, last.get(name, G), 256)
                last[name] = G
        backward(4)
        optimizer.step()
    return cases


@torch.no_grad()  # as in a step; with gradients on, products are torch's own
def search(projector: Any, G: Tensor, old: dict[str, Tensor]) -> Tensor:
    """The right basis [r, n] that a projector finds."""
    asked = Search(G[None], old, [0], not old, (G.shape[0], G.shape[1]))
    found: Tensor = projector.find(asked)["right"][0]
    return found


def captured(G: Tensor, P: Tensor) -> float:
    """The share of G's energy in the directions P [r, n]."""
    G, P = G.double(), P.double()
    return float((G @ P.T).square().sum() / G.square().sum())


def compared(name: str, case: Case, projector_of_theirs: Any) -> dict[str, Any]:
    G, last, rank = case
    m, n = G.shape
    theirs = projector_of_theirs(rank, update_proj_gap=1)
    ways = {
        "default": Leading(rank, "right"),
        "gram": Gram(rank, "right"),
        "randomised": Randomised(rank, "right"),
        "iteration": Iteration(rank, "right"),
    }
    old = {"right": search(ways["gram"], last, {})[None]}
    contenders: dict[str, Any] = {
        way: lambda p=p, way=way: search(p, G, old if way == "iteration" else {})
        for way, p in ways.items()
    }
    contenders["galore_torch"] = lambda: theirs.get_orthogonal_matrix(G, rank, type="right")
    best = captured(G, contenders["galore_torch"]())
    seconds = take_turns(contenders, pairs=5 if m < HUGE else 1)
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
    cases = made(chosen("60M", "350M"))
    if not option("--model"):
        prose = "".join(text for _, text in pydoc_prose().documents).encode()
        named = option("--text")
        cases |= real(Path(named).read_bytes() if named else prose)
    runs = [compared(name, case, projector) for name, case in cases.items()]
    for run in runs:
        print(f"{run['matrix']} {run['shape']}, rank {run['rank']}: the best basis captures "
              f"{run['captured_by_the_best']:.4f} of the energy")  # fmt: skip
        for way, ratio in run["galore_torch_over"].items():
            judge(f"{way}: share of that energy", run["share_of_the_best"][way], ENERGY)
            if min(run["shape"]) >= WIDE:
                judge(f"{way}: speed against a full SVD", ratio["median"], SPEED)
            else:
                print(f"             {way}: {ratio['median']:.2f} times the speed of a full SVD")
    what = "a new right basis of rank r, fp32, one thread, CPU seconds"
    write(
        titled("optim_refresh"), {"what": what, "runs": runs, "versions": versions("galore-torch")}
    )


if __name__ == "__main__":
    main()
