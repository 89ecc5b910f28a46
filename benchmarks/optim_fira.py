"""A Fira step without refresh, against its unavoidable products and the published algorithm.

    python benchmarks/optim_fira.py [--model 7B] [--write]

The products are R = G P^T and W += N P, one pass over G for the norms of its lines and one that
adds it. The aim is at most 1.25 times their time, and at least 1.5 times the speed of the
published algorithm, implemented below matrix by matrix: it forms the residual G - R P, and its
limiter syncs with the host. Matrices of a 60M and a 350M Llama. Steps of the three are
interleaved and ratios compare neighbouring runs, so that a slow phase of the machine affects all.
"""

from collections.abc import Callable
from typing import Any

import torch
from counting import Llama, Published, beside, chosen, first_basis, problem, titled
from pairs import judge, ratios, spread, take_turns, versions, write
from torch import Tensor

from eckart.decompose.products import add_product_, product
from eckart.methods.update.fira import Fira
from eckart.optim import LowRankOptimizer

NEVER, LR, SCALE, GAMMA, EPS = 10**9, 0.01, 0.25, 1.01, 1e-6


class PublishedFira(Published):
    """Algorithm 1 of the paper with its code's scaling."""

    def move(self, place: int, W: torch.nn.Parameter, s: dict[str, Any]) -> None:
        assert W.grad is not None
        G, right = W.grad, W.shape[0] >= W.shape[1]
        if not s:
            side = "right" if right else "left"
            s["P"] = first_basis(place, G, self.rank, side).contiguous()
            s["M"] = torch.zeros_like(self.down(G, s["P"], right))
            s["V"], s["t"], s["norm"] = torch.zeros_like(s["M"]), 0, None
        R = self.down(G, s["P"], right)
        s["t"] += 1
        s["M"].mul_(0.9).add_(R, alpha=0.1)
        s["V"].mul_(0.999).addcmul_(R, R, value=0.001)
        N = s["M"] / (s["V"].sqrt() + EPS)
        size = LR * (1 - 0.999 ** s["t"]) ** 0.5 / (1 - 0.9 ** s["t"])
        dim = 1 if right else 0
        phi = N.norm(dim=dim) / (R.norm(dim=dim) + 1e-8)
        rest = G - SCALE * self.up(R, s["P"], right)
        S = rest * (phi[:, None] if right else phi[None, :])
        norm = S.norm()
        if s["norm"] is not None:
            q = max(norm / (s["norm"] + 1e-8), GAMMA) / GAMMA  # the host waits here
            S = S / q
            norm = norm / q
        s["norm"] = norm
        W.add_(SCALE * self.up(N, s["P"], right) + S, alpha=-size)

    def down(self, G: Tensor, P: Tensor, right: bool) -> Tensor:
        return G @ P.T if right else P.T @ G

    def up(self, R: Tensor, P: Tensor, right: bool) -> Tensor:
        return R @ P if right else P @ R


def products(params: list[torch.nn.Parameter], rank: int) -> Callable[[], None]:
    """The two products, the norms of G's lines, and the addition of G scaled by line, alone."""
    work = []
    for p in params:
        (m, n), right = p.shape, p.shape[0] >= p.shape[1]
        P = torch.linalg.qr(torch.randn(min(m, n), rank))[0]
        psi = torch.full((m, 1) if right else (1, n), 1e-3)
        work.append((p.detach(), p.grad, P.T.contiguous() if right else P, psi, right))

    @torch.no_grad()
    def run() -> None:
        for W, G, P, psi, right in work:
            if right:
                torch.linalg.vector_norm(G, dim=1)
                add_product_(W, product(G, P.T), P, alpha=-1e-4)
            else:
                G.square().sum(0)  # a tenth of the time of vector_norm along columns
                add_product_(W, P, product(P.T, G), alpha=-1e-4)
            W.addcmul_(G, psi, value=-1e-4)

    return run


def compared(name: str, model: Llama) -> dict[str, Any]:
    """Ratios, times, operations and bytes for blocks of one model."""
    rank = model.rank
    a, b, c = (problem(model.shapes()) for _ in range(3))
    rule = Fira(rank=rank, every=NEVER, stagger=False).rule()
    ours, theirs = LowRankOptimizer(a, lr=LR, rule=rule), PublishedFira(b, rank)
    for _ in range(2):  # the first step finds the bases
        ours.step(), theirs.step()
    facts = beside(ours, theirs, (a, b))
    contenders = {
        "products": products(c, rank),
        "eckart": ours.step,
        "published": theirs.step,
    }
    seconds = take_turns(contenders, model.turns, model.repeat)
    return {
        "model": name,
        "rank": rank,
        "step_over_products": ratios(seconds["eckart"], seconds["products"]),
        "published_over_step": ratios(seconds["published"], seconds["eckart"]),
        "seconds": {k: spread(v) for k, v in seconds.items()},
        "products_flops": sum(4 * p.numel() * rank for p in a),
        **facts,
    }


def main() -> None:
    torch.set_num_threads(1)
    runs = [compared(name, model) for name, model in chosen("60M", "350M").items()]
    for run in runs:
        at = f"{run['model']} shapes"
        judge(f"step over its products, {at}", run["step_over_products"]["median"], 1.25, False)
        judge(f"speed against the published, {at}", run["published_over_step"]["median"], 1.5)
        print("            ", run["operations"], "operations a step;", run["state_bytes"],
              "bytes of state; products of", f"{run['products_flops']:.3g} FLOPs")  # fmt: skip
    what = "Fira step without refresh, Llama blocks, fp32, one thread, CPU seconds"
    write(titled("optim_fira"), {"what": what, "runs": runs, "versions": versions()})


if __name__ == "__main__":
    main()
