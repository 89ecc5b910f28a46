"""What LoLDU alone promises: its decomposition, and the little of it that is stored."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.autograd import gradcheck

from eckart.errors import FileError
from eckart.io import native, peft
from eckart.io.tensors import write_tensors
from eckart.linear import find_sites, install
from eckart.methods.weights.loldu import DEAD, LDU, LoLDU, alive, ldu, pivot_rows, without_pivoting
from eckart.recipe import attach_from
from tests.conftest import batch_for, randomise, tiny
from tests.laws.matrix import logits, steps
from tests.methods.lawful import assert_lawful, carried, draw

F64 = torch.float64
SHAPES = [(12, 20), (20, 12), (14, 14)]


def decomposed(W, r):
    pivots = pivot_rows(W, r)
    return (*ldu(W, pivots), pivots)


@pytest.mark.parametrize("fields", [{"relative": True}, {"scale": 0.25}, {"z_init": "normal"}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral", "vit"])
def test_every_form_keeps_the_laws(fields, architecture):
    targets = ("linear", "embedding") if architecture == "gemma" else ("linear",)
    assert_lawful(LoLDU(rank=20, targets=targets, **fields), architecture)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pieces_make_up_the_matrix(shape):
    W = draw(*shape)
    L, D, U, pivots = decomposed(W, min(shape))
    torch.testing.assert_close(L * D @ U, W, rtol=0, atol=1e-12)  # fp64, condition below 1e3
    assert L.abs().max() <= 1 + 1e-12
    assert torch.equal(U.diagonal(), torch.ones_like(D)) and not U.tril(-1).any()
    lower = L[pivots.long()]
    torch.testing.assert_close(lower, lower.tril(), rtol=0, atol=1e-12)
    P, lapack_L, lapack_U = torch.linalg.lu(W)  # LAPACK's own factors
    torch.testing.assert_close(L, P @ lapack_L, rtol=0, atol=1e-12)
    torch.testing.assert_close(D, lapack_U.diagonal(), rtol=0, atol=1e-12)
    term = LDU(pivots, D.float(), 1.0, False)  # frames in fp32: entries up to 4
    term.derive(W)
    torch.testing.assert_close(term.dense(), W.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rest_is_the_schur_complement(shape):
    W, r = draw(*shape), 5
    L, D, U, pivots = decomposed(W, r)
    rest = W - L * D @ U
    assert rest[:, :r].abs().max() < 1e-10 and rest[pivots.long()].abs().max() < 1e-10
    assert torch.linalg.matrix_rank(rest) == min(shape) - r


def test_fewer_pieces_are_the_first_of_more():
    W = draw(14, 14)
    few, all_ = decomposed(W, 6), decomposed(W, 14)
    assert torch.equal(few[3], all_[3][:6])
    torch.testing.assert_close(few[0], all_[0][:, :6], rtol=0, atol=1e-12)
    torch.testing.assert_close(few[2], all_[2][:6], rtol=0, atol=1e-12)


def test_rescaling_all_pieces_rescales_the_matrix():
    W, s = draw(12, 20), draw(12, seed=1)
    term = LDU(pivot_rows(W, 12), s, 1.0, False)
    D = term.derive(W)
    P, L, U = torch.linalg.lu(W)
    expected = P @ L @ ((U.diagonal() + s) / U.diagonal()).diag() @ U
    torch.testing.assert_close(W + term.dense(), expected, rtol=0, atol=1e-11)
    term.s.data.copy_(0.5 * D)
    torch.testing.assert_close(W + term.dense(), 1.5 * W, rtol=0, atol=1e-12)
    share = LDU(term.pivots, torch.full((12,), 0.5, dtype=F64), 1.0, relative=True)
    share.derive(W)
    torch.testing.assert_close(W + share.dense(), 1.5 * W, rtol=0, atol=1e-12)


def test_permuted_rows_move_with_the_left_factor_alone():
    W, order = draw(14, 10), torch.randperm(14, generator=torch.Generator().manual_seed(3))
    L, D, U, pivots = decomposed(W, 8)
    L2, D2, U2, pivots2 = decomposed(W[order], 8)
    assert torch.equal(order[pivots2.long()], pivots.long())
    torch.testing.assert_close(L2, L[order], rtol=0, atol=1e-10)
    torch.testing.assert_close(D2, D, rtol=0, atol=1e-10)
    torch.testing.assert_close(U2, U, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lost", [(0,), (3,), (2, 3, 7)])
def test_dead_pieces_move_nothing_and_stay_in_the_base(lost):
    W = draw(14, 10)
    for column in lost:  # a combination of earlier columns; the first one of none
        W[:, column] = W[:, :column] @ draw(column, seed=column)
    L, D, U, pivots = decomposed(W, 9)
    dead = D.abs() <= DEAD * W.abs().max()
    assert dead.nonzero().flatten().tolist() == list(lost)
    assert not U[dead].any() and L.isfinite().all() and U.isfinite().all()
    assert L.abs().max() <= 1 + 1e-12  # later pivots are chosen as if the dead were not there
    rows = pivots.long()
    assert torch.equal(L[:, dead], torch.eye(14, dtype=F64)[:, rows[dead]])
    top = torch.linalg.solve_triangular(L[rows], W[rows], upper=False, unitriangular=True)
    kept = L * D @ U + L[:, dead] @ top[dead]
    rest = W - kept
    assert rest[:, :9].abs().max() < 1e-12 and rest[rows].abs().max() < 1e-12


def test_a_zero_matrix_has_dead_pieces_alone():
    L, D, U, _ = decomposed(torch.zeros(6, 8, dtype=F64), 4)
    assert not D.any() and not U.any() and L.isfinite().all()


def test_one_dead_expert_leaves_the_others_alone():
    W = torch.stack([draw(12, 20), torch.zeros(12, 20, dtype=F64), draw(12, 20, seed=1)])
    together = decomposed(W, 12)
    for e in (0, 2):
        for batched, alone in zip(together, decomposed(W[e], 12), strict=True):
            torch.testing.assert_close(batched[e], alone, rtol=0, atol=1e-12)


def test_elimination_by_halves_is_elimination():
    M = draw(13, 13) + 8 * torch.eye(13, dtype=F64)
    L, U = without_pivoting(M, torch.zeros((), dtype=F64))
    torch.testing.assert_close(L @ U, M, rtol=0, atol=1e-12)
    assert torch.equal(L, L.tril()) and torch.equal(U, U.triu())
    assert torch.equal(L.diagonal(), torch.ones(13, dtype=F64))
    assert alive(U, torch.zeros((), dtype=F64)).all()


def test_the_gradient_is_that_of_each_piece():
    W, x, dy, sigma = draw(7, 9), draw(5, 9, seed=1), draw(5, 7, seed=2), 0.5
    term = LDU(pivot_rows(W, 4), torch.zeros(4, dtype=F64), sigma, False)
    term.derive(W)
    (term(x) * dy).sum().backward()
    L, _, U, _ = decomposed(W, 4)
    G = dy.T @ x
    torch.testing.assert_close(term.s.grad, sigma * (L.T @ G @ U.T).diagonal(), rtol=0, atol=1e-10)
    B, A = term.frames()

    def run(x, s):
        return torch.func.functional_call(term, {"s": s, "B": B, "A": A}, (x,))

    assert gradcheck(run, (x.requires_grad_(), draw(4, seed=3).requires_grad_()))


def test_only_touched_pieces_change_the_matrix():
    W = draw(12, 20)
    s = torch.zeros(10, dtype=F64)
    s[[1, 4, 8]] = 1.0
    term = LDU(pivot_rows(W, 10), s, 1.0, False)
    term.derive(W)
    assert torch.linalg.matrix_rank(term.dense()) == 3
    L = decomposed(W, 10)[0]  # its columns span the update's
    beside = term.dense() - L @ torch.linalg.lstsq(L, term.dense()).solution
    assert beside.abs().max() < 1e-12


def test_training_decomposes_nothing(monkeypatch):
    """Pivots, L, D and U are computed before the first forward pass, and never again."""
    _, handle, batch = carried(LoLDU(rank=6), "llama")
    for name in ("ldu", "pivot_rows", "without_pivoting"):
        monkeypatch.delattr(f"eckart.methods.weights.loldu.{name}")
    optimizer = handle.optimizer(lr=1e-2)
    assert len(handle.trainable()) == len(handle.attached)
    losses = steps(handle, optimizer, [batch] * 3)
    assert losses[-1] < losses[0]


def test_a_file_without_its_pivots_is_refused(tmp_path):
    _, handle, _ = carried(LoLDU(rank=6), "llama")
    native.save(handle, tmp_path)
    tensors = load_file(tmp_path / native.TENSORS)
    left = {name: t for name, t in tensors.items() if not name.endswith("pivots")}
    write_tensors(tmp_path / native.TENSORS, left)
    with pytest.raises(FileError, match=r"pivots +is missing"):
        native.load(tiny("llama"), tmp_path)


def test_a_pass_keeps_r_numbers_per_token():
    W, x, kept = draw(7, 90), draw(64, 90).requires_grad_(), []
    term = LDU(pivot_rows(W, 4), draw(4), 1.0, False)
    term.derive(W)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        term(x)
    # h, and the frames themselves; neither x nor an m x n matrix
    assert (64, 4) in kept and (64, 90) not in kept and (7, 90) not in kept


def test_the_file_holds_two_numbers_per_piece(tmp_path):
    model, handle, batch = carried(LoLDU(rank=6), "llama")
    randomise(handle)
    expected = logits(model, batch)
    state = handle.named_state()
    assert sum(t.numel() for t in state.values()) == 2 * 6 * len(handle.attached)
    native.save(handle, tmp_path)
    again = tiny("llama")
    native.load(again, tmp_path)
    assert torch.equal(logits(again, batch), expected)


def test_pivots_fix_the_meaning_on_another_precision():
    """A base in bf16, loaded in fp64: near-ties may fall otherwise, the stored rows do not."""
    model, handle, _ = carried(LoLDU(rank=8), "llama", torch.bfloat16)
    randomise(handle)
    handle.model.to(torch.float32)
    dense = {p: t["loldu"].dense() for p, t in handle.terms().items()}
    state = {k: v.clone() for k, v in handle.named_state().items()}
    again = tiny("llama", torch.bfloat16).to(F64)
    second = attach_from(again, json.loads(json.dumps(handle.structure())))
    again.to(F64)
    second.load_named_state(state)
    for path, terms in second.terms().items():
        # the first frames were rounded to bf16 with the model: 2^-9 of entries of order 0.1
        torch.testing.assert_close(terms["loldu"].dense().float(), dense[path], rtol=0, atol=1e-3)


def test_other_pivots_give_other_frames():
    """Pivots at ties determine what z means, so they are read from the file, not recomputed."""
    W = draw(8, 6).sign()  # every entry of the first column ties
    pivots = pivot_rows(W, 1)
    other = torch.tensor([7], dtype=torch.int32)
    assert pivots.tolist() == [0]
    layer = torch.nn.Linear(6, 8, bias=False).double()
    layer.weight.data.copy_(W)
    (site,) = find_sites(layer)
    term = LDU.empty(
        {
            "s": {"shape": [1], "dtype": "float64", "trained": True},
            "pivots": {"shape": [1], "dtype": "int32", "trained": False},
        },
        {"scale": 1.0, "relative": False},
    )
    install(site, {"loldu": term})
    term.bind({}, layer, "weight")
    term.s.data.fill_(1.0)
    term.pivots.copy_(other)
    L, _, U = ldu(W, other)
    torch.testing.assert_close(term.dense(), L @ U, rtol=0, atol=1e-12)
    assert not torch.allclose(ldu(W, pivots)[2], U)


def test_decay_draws_to_the_base():
    from eckart.methods.update.adamw import AdamW
    from eckart.recipe import Recipe, attach

    model = tiny("llama")
    handle = attach(model, Recipe(weights=LoLDU(rank=4), update=AdamW(weight_decay=0.5)))
    randomise(handle)
    before = {name: p.detach().clone() for name, p in handle.trainable().items()}
    for p in handle.trainable().values():
        p.grad = torch.zeros_like(p)
    handle.optimizer(lr=0.1).step()
    for name, p in handle.trainable().items():
        torch.testing.assert_close(p, 0.95 * before[name])


def test_peft_computes_the_same(tmp_path):
    model, handle, batch = carried(LoLDU(rank=6), "llama")
    randomise(handle)
    expected = logits(model, batch)
    peft.save(handle, tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    # fp32, the same products in another order
    torch.testing.assert_close(logits(loaded, batch_for("llama")), expected, rtol=0, atol=5e-6)
