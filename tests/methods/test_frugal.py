"""What FRUGAL alone promises, against its algorithm reimplemented here."""

import pytest
import torch
from torch import nn

from eckart.methods.update.frugal import FRUGAL
from eckart.optim import LowRankOptimizer
from eckart.optim.fixed import directions
from tests.methods.updates import (
    F64,
    check_resume,
    check_state,
    check_zero,
    regression,
    spectrum,
    start,
    train,
)

KINDS = ["columns", "rows", "entries", "svd", "dct"]


def basis(state, kind, n=6):
    """The directions of a matrix with n columns that Adam sees, as rows; none for coordinates."""
    if kind == "dct":
        return directions("dct2", n, F64, torch.device("cpu"))[:, state["index"].long()].T
    return state["right"] if kind == "svd" else None


def inside(G, state, kind):
    """The part of G that Adam updates, with zeros elsewhere."""
    P = basis(state, kind)
    if P is not None:
        return G @ P.T @ P
    index = state["index"].long()
    mask = torch.zeros_like(G)
    if kind == "columns":
        mask[:, index] = 1
    elif kind == "rows":
        mask[index] = 1
    else:
        mask.view(-1)[index] = 1
    return G * mask


def by_the_paper(W, grads, states, method, kind, lr):
    """FRUGAL with Adam on masked gradients, or in the basis if there is one."""
    (b1, b2), M, V, t = method.betas, 0.0, 0.0, 0
    for step, (G, state) in enumerate(zip(grads, states, strict=True)):
        if step % method.every == 0:
            M, V, t = 0.0, 0.0, 0  # the moments are reset
        t += 1
        part, P = inside(G, state, kind), basis(state, kind)
        R = part if P is None else G @ P.T
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R**2
        N = (M / (1 - b1**t)) / ((V / (1 - b2**t)).sqrt() + method.eps)
        N = N if P is None else N @ P
        rest = G - part
        step_outside = {"sign": rest.sign(), "sgd": rest, "none": 0.0}[method.outside]
        W = (1 - lr * method.weight_decay) * W
        W = W - lr * N - lr * method.outside_scale * step_outside
    return W


@pytest.mark.parametrize("outside", ["sign", "sgd", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_follows_the_papers_algorithm(kind, outside):
    method = FRUGAL(
        density=0.4, every=5, inside=kind, outside=outside, outside_scale=0.3,
        stagger=False, weight_decay=0.1,
    )  # fmt: skip
    grads = spectrum((9, 6), 13)
    path, states = train(method.rule(), start((9, 6)), grads)
    wanted = by_the_paper(start((9, 6)), grads, states, method, kind, 0.05)
    torch.testing.assert_close(path[-1], wanted, rtol=0, atol=1e-9)  # fp64, 13 steps


def test_a_new_subspace_is_drawn_at_each_refresh():
    method = FRUGAL(density=0.5, every=4, stagger=False)
    _, states = train(method.rule(), start((9, 40)), spectrum((9, 40), 12))
    draws = [s["index"].tolist() for s in states]
    assert all(draws[i] == draws[i + 1] for i in (0, 1, 2, 4, 5, 6))
    assert len({tuple(d) for d in draws}) == 3
    assert all(d == sorted(set(d)) and len(d) == 20 for d in draws)


@pytest.mark.parametrize(("kind", "r"), [("columns", 2), ("rows", 4), ("entries", 22)])
def test_the_state_is_of_the_size_it_says(kind, r):
    found = check_state(FRUGAL(density=0.4, inside=kind), 9, 6)
    shape = {"columns": (9, r), "rows": (r, 6), "entries": (1, r)}[kind]
    assert found == {"index": (r,), "exp_avg": shape, "exp_avg_sq": shape}


def test_state_of_the_svd_form_is_galores():
    found = check_state(FRUGAL(density=0.5, inside="svd"), 9, 6)
    assert found == {"right": (3, 6), "exp_avg": (9, 3), "exp_avg_sq": (9, 3)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind):
    check_resume(FRUGAL(density=0.4, every=5, inside=kind).rule(), stop=7)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradients_do_no_harm(kind):
    check_zero(FRUGAL(density=0.4, every=4, inside=kind, weight_decay=0.1).rule())


def test_columns_of_the_transpose_are_rows():
    grads = spectrum((9, 6), 12)
    columns, rows = (FRUGAL(density=0.4, every=5, inside=k).rule() for k in ("columns", "rows"))
    path, _ = train(columns, start((9, 6)), grads)
    turned, _ = train(rows, start((9, 6)).T, [G.T for G in grads])
    torch.testing.assert_close(path[-1], turned[-1].T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["columns", "svd"])
def test_at_full_density_nothing_is_outside(kind):
    """Also not the signs of rounding errors."""
    grads = spectrum((9, 6), 6)
    with_signs, _ = train(FRUGAL(density=1.0, inside=kind).rule(), start((9, 6)), grads)
    without, _ = train(
        FRUGAL(density=1.0, inside=kind, outside="none").rule(), start((9, 6)), grads
    )
    assert torch.equal(with_signs[-1], without[-1])


@pytest.mark.parametrize("kind", ["columns", "rows", "entries"])
def test_experts_draw_one_by_one(kind):
    rule = FRUGAL(density=0.4, every=3, inside=kind, stagger=False).rule()
    grads = spectrum((3, 8, 10), 5)
    path, states = train(rule, start((3, 8, 10)), grads, leading=1)
    assert not torch.equal(states[-1]["index"][0], states[-1]["index"][1])
    for i in range(3):
        alone = [{"index": s["index"][i]} for s in states]
        method = FRUGAL(density=0.4, every=3, inside=kind)
        wanted = by_the_paper(
            start((3, 8, 10))[i], [G[i] for G in grads], alone, method, kind, 0.05
        )
        torch.testing.assert_close(path[-1][i], wanted, rtol=0, atol=1e-12)


class Blocks(nn.Module):
    """Four numbered layers and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=F64) for _ in range(4))
        self.head = nn.Linear(4, 3, dtype=F64)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def optimizer_of(model, method, lr):
    """Matrices of the layers follow the rule, the rest AdamW, as a handle makes it."""
    special = [(n, p) for n, p in model.named_parameters() if n.startswith("layers") and p.ndim > 1]
    chosen = {n for n, _ in special}
    rest = [(n, p) for n, p in model.named_parameters() if n not in chosen]
    groups = [{"params": rest, "rule": method.plain()}, {"params": special, "rule": method.rule()}]
    return LowRankOptimizer(groups, lr)


def test_whole_layers_inside_and_signs_outside():
    """Each layer's own Adam while it is inside, its gradient's signs at other times."""
    model, lr = Blocks(), 0.01
    method = FRUGAL(density=0.5, every=3, inside="blocks", outside_scale=0.3)
    optimizer = optimizer_of(model, method, lr)
    W = {n: p.detach().clone() for n, p in model.named_parameters()}
    M, V, count, seen = {}, {}, {}, set()
    for step in range(10):
        aside = set(optimizer.aside)
        seen.add(frozenset(aside))
        assert len(aside) == 2 and all(p.requires_grad for p in model.parameters())
        x = torch.randn(8, 4, dtype=F64, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        for n, p in model.named_parameters():
            special = n.startswith("layers") and p.ndim > 1
            if special and step % 3 == 0:
                M[n], V[n], count[n] = 0.0, 0.0, 0
            if n in aside:
                W[n] = W[n] - lr * 0.3 * p.grad.sign()
                continue
            M[n] = 0.9 * M.get(n, 0.0) + 0.1 * p.grad
            V[n] = 0.999 * V.get(n, 0.0) + 0.001 * p.grad**2
            count[n] = t = count.get(n, 0) + 1
            W[n] = W[n] - lr * (M[n] / (1 - 0.9**t)) / ((V[n] / (1 - 0.999**t)).sqrt() + 1e-8)
        optimizer.step()
        optimizer.zero_grad()
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), W[n], rtol=0, atol=1e-12, msg=n)
            if n in aside:
                assert not optimizer.state.get(p)  # nothing is remembered of it
    assert len(seen) > 1


@pytest.mark.parametrize("outside", ["sign", "none"])
def test_blocks_resume_in_the_middle_of_a_period(outside):
    method = FRUGAL(density=0.5, every=3, inside="blocks", outside=outside)

    def run(stop):
        model = Blocks()
        optimizer = optimizer_of(model, method, 0.01)
        for step in range(9):
            if step == stop:
                saved = optimizer.named_state_dict()
                for p in model.parameters():
                    p.requires_grad_(True)
                optimizer = optimizer_of(model, method, 0.01)
                optimizer.load_named_state_dict(saved)
            x = torch.randn(8, 4, dtype=F64, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    assert all(map(torch.equal, run(None), run(4)))


def test_it_learns_a_small_map():
    for kind in ("columns", "entries", "svd"):
        assert regression(FRUGAL(every=20, inside=kind).rule(), 0.03) < 1e-4
