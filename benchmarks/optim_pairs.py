"""Steps of the rules for factor pairs, against a step of AdamW on the same factors.

    python benchmarks/optim_pairs.py [--model 7B] [--write]

One Llama block with a factor pair on each of its seven maps. AltLoRA, AltLoRA+ and LoRA-Pro are
compared with torch's AdamW (foreach) and ours; the aim is at most 1.3 times the time of torch's.
No implementation can meet it on a CPU, where AdamW's step and a rule's unavoidable products,
measured alone in the same run, take two to five times AdamW's step: each rule is compared with
that floor, too. Printed with each: its state in bytes, all of which is read and written, the
floating-point operations of its products, and the operations dispatched. LoRA-Pro's moments are
those of the whole matrices: its floor is torch's AdamW step on these and its products, one after
the other; a step done in pieces that stay in the cache can be faster than that. Inverses
and eigendecompositions of r x r are not in the floor; LoRA-Pro's two, in fp64, are a third of its
factored step at width 512 and rank 64.
"""

from collections.abc import Callable
from typing import Any

import torch
from counting import Llama, chosen, launches, problem, state_bytes, titled
from pairs import judge, ratios, spread, take_turns, versions, write
from torch import nn

from eckart.decompose.products import product
from eckart.methods.update.adamw import AdamW
from eckart.methods.update.altlora import AltLoRA
from eckart.methods.update.lora_pro import LoRAPro
from eckart.optim import LowRankOptimizer
from eckart.recipe import Update

RANKS = (8, 64)
REPEAT = {8: 3, 64: 2}
AIM = 1.3
RULES: dict[str, Update] = {
    "AdamW": AdamW(),
    "AltLoRA": AltLoRA(),
    "AltLoRA+": AltLoRA(plus=True),
    "LoRA-Pro, factored": LoRAPro(moment_space="factored"),
    "LoRA-Pro": LoRAPro(),
}


def factors(maps: list[tuple[int, int]], rank: int) -> list[nn.Parameter]:
    """B and A of each map [m, n]."""
    return problem([s for m, n in maps for s in ((m, rank), (rank, n))])


def step_of(update: Update, params: list[nn.Parameter]) -> LowRankOptimizer:
    named = [(str(i), p) for i, p in enumerate(params)]
    pairs = [(str(i), str(i + 1), 2.0) for i in range(0, len(params), 2)]
    groups = [{"params": named, "pairs": pairs}]
    return LowRankOptimizer(groups, lr=1e-4, rule=update.rule())


def products(name: str, maps: list[tuple[int, int]], rank: int) -> int:
    """FLOPs of a step's thin and full products, without r x r work."""
    total = 0
    for m, n in maps:
        thin = 2 * (m + n) * rank**2  # one r x r product along the rank of both factors
        if name != "AdamW":
            total += 4 * thin  # AltLoRA: two Gram matrices, carrying, projecting
        if name == "LoRA-Pro":
            total += 8 * m * n * rank + 3 * thin  # E, B^T N, N A^T, and a first adjustment
    return total


def floor(maps: list[tuple[int, int]], rank: int, whole: bool) -> Callable[[], None]:
    """The products alone: two r x r and two thin ones for each factor, the same in AltLoRA and
    LoRA-Pro; with `whole` also those of LoRA-Pro's E [m, n], B^T N and N A^T."""
    work = []
    for m, n in maps:
        B, A = torch.randn(m, rank) / 30, torch.randn(rank, n) / 30
        work.append((B, torch.randn_like(B), A, torch.randn_like(A), torch.randn(rank, rank)))

    @torch.no_grad()
    def run() -> None:
        for B, gB, A, gA, Q in work:
            for first, second in ((B.mT, B), (B.mT, gB), (A, A.mT), (A, gA.mT)):
                product(first, second)
            for first, second in ((B, Q), (gB, Q), (Q, A), (Q, gA)):
                product(first, second)
            if whole:
                N = product(torch.cat([B, gB], 1), torch.cat([gA, A]))
                product(B.mT, N), product(N, A.mT)

    return run


def compared(model: Llama, rank: int) -> dict[str, Any]:
    """Ratios and times for one block."""
    width, maps = model.width, model.shapes(blocks=1)
    plain, whole = factors(maps, rank), problem(maps)
    steps: dict[str, torch.optim.Optimizer] = {
        "torch": torch.optim.AdamW(plain, lr=1e-4, weight_decay=0.0, foreach=True),
        "torch, whole matrices": torch.optim.AdamW(whole, lr=1e-4, weight_decay=0.0, foreach=True),
    }
    steps |= {name: step_of(update, factors(maps, rank)) for name, update in RULES.items()}
    contenders: dict[str, Callable[[], object]] = {name: o.step for name, o in steps.items()}
    contenders["thin products"] = floor(maps, rank, whole=False)
    contenders["all products"] = floor(maps, rank, whole=True)
    # processor time has a resolution of some milliseconds, so small steps are repeated more often
    seconds = take_turns(contenders, model.turns, model.repeat * REPEAT[rank])
    thin = sums(seconds["torch"], seconds["thin products"])
    large = sums(seconds["torch, whole matrices"], seconds["all products"])
    floors = {name: large if name == "LoRA-Pro" else thin for name in RULES if name != "AdamW"}
    return {
        "width": width,
        "rank": rank,
        "over_torch": {name: ratios(seconds[name], seconds["torch"]) for name in RULES},
        "over_floor": {name: ratios(seconds[name], least) for name, least in floors.items()},
        "floor_over_torch": {n: ratios(least, seconds["torch"]) for n, least in floors.items()},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "state_bytes": {name: state_bytes(o.state.values()) for name, o in steps.items()},
        "flops_of_products": {name: products(name, maps, rank) for name in RULES},
        "operations": {name: launches(steps[name].step) for name in RULES},
    }


def sums(a: list[float], b: list[float]) -> list[float]:
    return [x + y for x, y in zip(a, b, strict=True)]


def report(run: dict[str, Any]) -> None:
    at = f"width {run['width']}, rank {run['rank']}"
    base = run["seconds"]["torch"]["median"]
    print(f"\n{at}: torch's AdamW {1e3 * base:.2f} ms, state {run['state_bytes']['torch']:,} bytes")
    for name in RULES:
        state, flops = run["state_bytes"][name], run["flops_of_products"][name]
        print(f"  {name:<20} state {state:>13,} bytes   products {flops / 1e6:>9,.1f} MFLOP   "
              f"{run['operations'][name]} operations")  # fmt: skip
        judge(f"{name}, {at}", run["over_torch"][name]["median"], AIM, at_least=False)
        if name in run["over_floor"]:
            least, over = run["floor_over_torch"][name], run["over_floor"][name]
            print(f"             AdamW and its products alone are {least['median']:.2f} times that,"
                  f" the step {over['median']:.2f} times these")  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    runs = [compared(m, rank) for m in chosen("60M", "1B").values() for rank in RANKS]
    for run in runs:
        report(run)
    what = "steps on a Llama block's factor pairs, fp32, one thread, CPU seconds"
    write(titled("optim_pairs"), {"what": what, "runs": runs, "versions": versions()})


if __name__ == "__main__":
    main()
