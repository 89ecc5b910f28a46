"""A DCT-AdamW step with its choice of directions, against the published algorithm.

    python benchmarks/optim_dct.py [--model 7B] [--write]

The published algorithm is implemented below matrix by matrix: coordinates by one product, the
choice of directions, moments rotated by the product of the old and the new directions, the update
projected back. The aim is at least twice its speed with the default route, here the fast
transform. With route=matmul the products S = G Q and W += N Q^T take most of either's time; their
time is printed as well. Matrices of a 60M and a 350M Llama; steps are interleaved, and ratios
compare neighbouring runs.
"""

from collections.abc import Callable
from typing import Any

import torch
from counting import Llama, Published, beside, chosen, problem, titled
from pairs import judge, ratios, spread, take_turns, versions, write

from eckart.decompose.products import add_product_, product
from eckart.methods.update.dct_adamw import DCTAdamW
from eckart.optim import LowRankOptimizer
from eckart.optim.fixed import directions

LR, EPS = 0.001, 1e-8


class PublishedDCTAdamW(Published):
    """Algorithm 1 of the paper without error feedback."""

    def move(self, place: int, W: torch.nn.Parameter, s: dict[str, Any]) -> None:
        assert W.grad is not None
        right = W.shape[0] >= W.shape[1]
        G = W.grad if right else W.grad.T  # [long, short]
        Q = directions("dct2", G.shape[1], G.dtype, G.device)
        S = G @ Q
        index = S.abs().sum(0).topk(self.rank).indices.sort().values
        R, P = S[:, index], Q[:, index]
        if not s:
            s["M"], s["V"], s["t"] = torch.zeros_like(R), torch.zeros_like(R), 0
        else:
            turn = Q[:, s["index"]].T @ P
            s["M"], s["V"] = s["M"] @ turn, (s["V"] @ turn).abs()
        s["index"] = index
        s["t"] += 1
        s["M"].mul_(0.9).add_(R, alpha=0.1)
        s["V"].mul_(0.999).addcmul_(R, R, value=0.001)
        N = (s["M"] / (1 - 0.9 ** s["t"])) / ((s["V"] / (1 - 0.999 ** s["t"])).sqrt() + EPS)
        U = N @ P.T
        W.add_(U if right else U.T, alpha=-LR)


def products(params: list[torch.nn.Parameter], rank: int) -> Callable[[], None]:
    """The products S = G Q and W += S[:, :r] Q[:, :r]^T alone."""
    work = []
    for p in params:
        assert p.grad is not None
        right = p.shape[0] >= p.shape[1]
        Q = directions("dct2", min(p.shape), p.dtype, p.device)
        work.append((p.detach(), p.grad, Q, Q[:, :rank].T.contiguous(), right))

    @torch.no_grad()
    def run() -> None:
        for W, G, Q, P, right in work:
            if right:
                add_product_(W, product(G, Q)[:, :rank], P, alpha=-1e-4)
            else:
                add_product_(W, P.T, product(Q.T, G)[:rank], alpha=-1e-4)

    return run


def compared(name: str, model: Llama) -> dict[str, Any]:
    """Ratios, times, operations and bytes for blocks of one model."""
    rank = model.rank
    a, b, c, d = (problem(model.shapes()) for _ in range(4))
    ours = LowRankOptimizer(a, lr=LR, rule=DCTAdamW(rank=rank).rule())
    plain = LowRankOptimizer(d, lr=LR, rule=DCTAdamW(rank=rank, route="matmul").rule())
    theirs = PublishedDCTAdamW(b, rank)
    for i in range(3):  # gradients that change, so that the directions do
        torch.manual_seed(i)
        for p, q, r in zip(a, b, d, strict=True):
            p.grad = torch.randn_like(p)
            q.grad, r.grad = p.grad.clone(), p.grad.clone()
        ours.step(), theirs.step(), plain.step()
    facts = beside(ours, theirs, (a, b))
    contenders = {
        "products": products(c, rank),
        "eckart": ours.step,
        "eckart, matmul": plain.step,
        "published": theirs.step,
    }
    seconds = take_turns(contenders, model.turns, model.repeat)
    return {
        "model": name,
        "rank": rank,
        "published_over_step": ratios(seconds["published"], seconds["eckart"]),
        "published_over_matmul_step": ratios(seconds["published"], seconds["eckart, matmul"]),
        "matmul_step_over_products": ratios(seconds["eckart, matmul"], seconds["products"]),
        "seconds": {k: spread(v) for k, v in seconds.items()},
        "products_flops": sum(2 * p.numel() * (min(p.shape) + rank) for p in a),
        **facts,
    }


def main() -> None:
    torch.set_num_threads(1)
    runs = [compared(name, model) for name, model in chosen("60M", "350M").items()]
    for run in runs:
        at = f"{run['model']} shapes"
        judge(f"speed against the published, {at}", run["published_over_step"]["median"], 2.0)
        speed, over = run["published_over_matmul_step"], run["matmul_step_over_products"]
        print(f"              by matmul {speed['median']:.2f} times its speed,",
              f"{over['median']:.2f} times its products;",
              run["operations"], "operations a step;", run["state_bytes"], "bytes of state;",
              f"{run['products_flops']:.3g} FLOPs")  # fmt: skip
    what = "DCT-AdamW step, T = 1, Llama blocks, fp32, one thread, CPU seconds"
    write(titled("optim_dct"), {"what": what, "runs": runs, "versions": versions()})


if __name__ == "__main__":
    main()
