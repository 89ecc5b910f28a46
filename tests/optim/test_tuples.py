"""Every combination of a rule's parts is legal or raises a UsageError; laws for all legal ones.

Parts are discovered: all classes of the optimizer's interfaces, at small sizes. There are
thousands of legal tuples; the default run takes a pairwise covering selection, the exhaustive
one all.
"""

import dataclasses
import io
import random
from functools import cache
from itertools import combinations, product
from typing import get_args, get_type_hints

import pytest
import torch
from tests.optim.trainings import gradients
from torch import nn

import eckart.optim as parts
from eckart.errors import UsageError
from eckart.optim import (
    Adafactor,
    Adam,
    Inner,
    LowRankOptimizer,
    NormGrowth,
    Packed,
    Projector,
    Refresh,
    Residual,
    Rule,
    Selected,
    Source,
    Subspace,
    storage,
)

SMALL = {"rank": 2, "density": 0.5}
STEPS, STOP, LR, DECAY = 5, 3, 0.02, 0.1
SHAPES = {"a": (6, 4), "b": (6, 4), "wide": (4, 6), "experts": (2, 5, 4), "zero": (5, 3), "v": (3,)}


@pytest.fixture(autouse=True)
def all_moments_are_large_enough_for_8_bits(monkeypatch):
    monkeypatch.setattr(storage, "SMALLEST", 1)


def of(contract):
    """The subclasses of an interface, by name."""
    found = [c for c in vars(parts).values() if isinstance(c, type) and issubclass(c, contract)]
    return [c for c in found if c not in (contract, Subspace)]


def made(cls, **more):
    """An instance of the class, or None where its arguments are refused."""
    names = {f.name for f in dataclasses.fields(cls)}
    try:
        return cls(**{k: v for k, v in {**SMALL, **more}.items() if k in names and v is not None})
    except UsageError as error:
        assert_is_a_sentence(error)
        return None


def assert_is_a_sentence(error):
    """Assert that a message says what is wrong, where, and what would fit."""
    assert error.facts and error.fix.endswith(".") and str(error).count("\n") >= 2


def choices(cls, name):
    """The values of a Literal field; (None,) if the class has no such field."""
    return get_args(get_type_hints(cls).get(name)) or (None,)


@cache
def axes():
    """The choices for each part of a tuple."""
    projectors = []
    for cls in [c for c in of(Projector) if c is not Packed]:
        sides = choices(cls, "side") if cls is parts.SVD else ("auto", "both")  # auto: left, right
        ways = [{"side": v} for v in sides if "side" in get_type_hints(cls)] or [{}]
        ways += [{"kind": v} for v in choices(cls, "kind") if v != "hadamard"]  # 4 x 4 alone
        projectors += [made(cls, **way) for way in ways]
    searched = [p for p in projectors if isinstance(p, Subspace) and p.side in ("auto", "both")]
    projectors += [made(Packed, inner=p) for p in searched if isinstance(p, parts.SVD)
                   or p.side == "auto"]  # fmt: skip
    inner = [Adam(eps_mode="hf", age_correct=True), Adafactor(beta1=0.9), *map(made, of(Inner))]
    source = [None] + [made(c, bits=b) for c in of(Source) for b in choices(c, "bits")]
    residual = [None] + [made(c, phi=phi) for c in of(Residual) for phi in choices(c, "phi")]
    refresh = [Refresh(2, m, stagger=False) for m in choices(Refresh, "moments")]
    refresh += [Refresh(1, "rotate"), Refresh(2, adaptive=0.1)]
    found = {
        "projector": projectors, "inner": inner, "refresh": refresh, "source": source,
        "residual": residual, "limiter": [None, NormGrowth()],
    }  # fmt: skip
    found["projector"] = [p for p in projectors if p is not None]
    return {name: list(dict.fromkeys(values)) for name, values in found.items()}


@cache
def legal():
    """All legal tuples as {field: part}, and how many were refused."""
    found, refused = [], 0
    for values in product(*axes().values()):
        chosen = dict(zip(axes(), values, strict=True))
        if chosen["source"] is not None and chosen["residual"] is not None:
            continue  # refused whatever else: see below
        try:
            Rule(weight_decay=DECAY, vectors=Adam(), **chosen)
        except UsageError as error:
            assert_is_a_sentence(error)
            refused += 1
        else:
            found.append(chosen)
    return found, refused


@cache
def pairwise():
    """Tuples that together contain every pair of parts that occurs in any legal tuple.

    Tuples with many new pairs are taken first; the order is shuffled once, by a seed.
    """
    tuples = [tuple(chosen.items()) for chosen in legal()[0]]
    random.Random(0).shuffle(tuples)
    pairs = {t: set(combinations(t, 2)) for t in tuples}
    seen, found = set(), []
    for least in (15, 12, 9, 6, 4, 3, 2, 1):
        for t in tuples:
            if len(pairs[t] - seen) >= least:
                seen |= pairs[t]
                found.append(dict(t))
    return found


def test_most_tuples_are_refused_and_many_are_legal():
    found, refused = legal()
    assert len(found) > 1000 and refused > 1000
    assert len(pairwise()) < 500, len(pairwise())


@pytest.mark.parametrize(
    "chosen, sentence",
    [
        ({"projector": "SVD both", "residual": "Rescaled"}, "one side that is not projected"),
        ({"projector": "Identity", "residual": "Rescaled"}, "a residual needs a projector"),
        ({"inner": "Adafactor", "refresh": "rotate"}, "these moments cannot be rotated"),
        ({"source": "ErrorFeedback", "residual": "Rescaled"}, "would be applied twice"),
        ({"projector": "Selected", "refresh": "adaptive"}, "a fixed basis has no leading"),
    ],
)
def test_known_illegal_tuples_are_refused(chosen, sentence):
    def matches(part, words):
        return all(word.lower() in repr(part).lower() for word in words.split())

    fitting = {
        place: next(p for p in axes()[place] if matches(p, word)
                    and ("adaptive" not in word or p.adaptive))
        for place, word in chosen.items()
    }  # fmt: skip
    with pytest.raises(UsageError, match=sentence):
        Rule(**({"projector": made(parts.SVD)} | fitting))
    with pytest.raises(UsageError, match="only a basis that was searched for"):
        Packed(Selected(2))


# --- the laws ------------------------------------------------------------------------------


def weights(names, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    full = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in SHAPES.items()}
    return {n: nn.Parameter(full[n].to(dtype)) for n in names}


@cache
def steps(dtype=torch.float64):
    """The gradients of each step by name."""
    flat = {n: s for n, s in SHAPES.items() if len(s) != 3}
    rows = gradients(flat.values(), STEPS)
    found = [dict(zip(flat, row, strict=True)) for row in rows]
    for i, row in enumerate(found):
        row["zero"] = torch.zeros(SHAPES["zero"], dtype=torch.float64)
        row["experts"] = torch.stack([gradients([SHAPES["experts"][1:]], 1, seed=10 * i + e)[0][0]
                                      for e in (1, 2)])  # fmt: skip
    return [{n: G.to(dtype) for n, G in row.items()} for row in found]


def optimizer_of(params, rule, **options):
    plain = [(n, p) for n, p in params.items() if n != "experts"]
    experts = [(n, p) for n, p in params.items() if n == "experts"]
    groups = [{"params": named, "leading": k} for k, named in enumerate((plain, experts)) if named]
    return LowRankOptimizer(groups, LR, rule=rule, **options)


def run(optimizer, params, rows):
    for row in rows:
        for name, p in params.items():
            p.grad = row[name].clone()
        optimizer.step()


def state_of(optimizer):
    """The state after torch.save and torch.load(weights_only=True)."""
    buffer = io.BytesIO()
    torch.save(optimizer.named_state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(a, b):
    """True where bitwise equal; NaN marks entries that have no value yet."""
    return a.keys() == b.keys() and all(
        torch.equal(torch.as_tensor(a[k]).nan_to_num(), torch.as_tensor(b[k]).nan_to_num())
        for k in a
    )


def names_for(rule):
    """Names of the parameters a rule takes: no vectors for an unprojected rule of matrices."""
    matrices = rule.projector.identity and not (rule.inner.elementwise or rule.inner.sums)
    special = isinstance(rule.inner, parts.Orthogonal | parts.Normalised | parts.EightBit)
    return [n for n in SHAPES if n != "v" or not (matrices or special)]


def hold(rule):
    """Raise AssertionError where a law does not hold for a rule."""
    names = names_for(rule)
    whole = weights(names)
    first = {n: p.detach().clone() for n, p in whole.items()}
    optimizer = optimizer_of(whole, rule)
    run(optimizer, whole, steps()[:STOP])
    middle = {n: nn.Parameter(p.detach().clone()) for n, p in whole.items()}
    saved = state_of(optimizer)
    run(optimizer, whole, steps()[STOP:])
    end = state_of(optimizer)

    for name, p in whole.items():
        assert p.isfinite().all(), f"{name} is finite"
        tensors = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
        plain = [v for v in optimizer.state[p].values() if not isinstance(v, torch.Tensor)]
        assert all(type(v) in (int, float) for v in plain), f"{name}: state is plain"
        size = rule.state_elements(*p.shape, leading=int(name == "experts"))
        assert sum(t.numel() for t in tensors) == size, f"{name}: size of the state"
        assert (p - first[name]).abs().max() > 1e-6, f"{name} moves"
    kept = first["zero"] * (1 - LR * DECAY) ** STEPS
    assert torch.allclose(whole["zero"], kept, rtol=0, atol=1e-12), "zero: decay alone"

    resumed = optimizer_of(middle, rule, skip_nonfinite=True)
    resumed.load_named_state_dict(saved)
    before = {n: p.detach().clone() for n, p in middle.items()}
    bad = {n: G.clone() for n, G in steps()[STOP].items()}
    bad["b"][0, 0] = torch.nan
    run(resumed, middle, [bad])
    assert same(before, {n: p.detach() for n, p in middle.items()}), "a bad step moves nothing"
    now, was = resumed.named_state_dict(), {k: v for k, v in saved.items() if "/lr" not in k}
    assert same(was, {k: v for k, v in now.items() if "/lr" not in k}), "nor the state"
    run(resumed, middle, steps()[STOP:])
    assert same({n: p.detach() for n, p in middle.items()},
                {n: p.detach() for n, p in whole.items()}), "resumed in mid-gap"  # fmt: skip
    assert same(state_of(resumed), end), "resumed in mid-gap: state"

    for name in ("a", "experts"):
        alone = {name: nn.Parameter(first[name].clone())}
        run(optimizer_of(alone, rule), alone, steps())
        # a batched decomposition may round otherwise: fp64, five steps, and 8 or 4 bits
        near = 1e-9 if is_exact(rule) else 1e-2
        assert torch.allclose(alone[name], whole[name], rtol=0, atol=near), f"{name}: batched"

    if is_symmetric(rule):
        turned = {"a": nn.Parameter(first["a"].T.clone())}  # of the same name: the same draws
        run(optimizer_of(turned, rule), turned, [{"a": row["a"].T} for row in steps()])
        # on both sides R is diagonal: elsewhere Adam divides rounding, 1e-16, by its epsilon of
        # 1e-8, times the rate, five times
        near = 1e-8 if getattr(projector_of(rule), "side", "") == "both" else 1e-9
        assert torch.allclose(turned["a"].T, whole["a"], rtol=0, atol=near), "transposition"


def projector_of(rule):
    """The projector that finds the basis, without `Packed`."""
    return getattr(rule.projector, "inner", rule.projector)


def is_exact(rule):
    """False where rounding errors can grow: low-precision codes and signs jump."""
    few = isinstance(rule.inner, parts.EightBit | parts.Memoryless)
    few |= isinstance(rule.projector, Packed) or isinstance(rule.residual, parts.Outside)
    return not few and getattr(rule.source, "bits", 32) == 32


def is_symmetric(rule):
    """True where transposing the matrix transposes the update."""
    projector = projector_of(rule)
    mirrored = getattr(projector, "side", "auto") in ("auto", "reverse", "both")
    drawn = isinstance(projector, parts.Gaussian | parts.Coordinates | parts.Warm)
    return mirrored and not drawn and is_exact(rule) and not isinstance(
        rule.inner, parts.Normalised
    )  # fmt: skip


def broken(tuples):
    """The failures of the first few tuples that break a law."""
    found = []
    for chosen in tuples:
        rule = Rule(weight_decay=DECAY, vectors=Adam(), **chosen)
        try:
            hold(rule)
        except Exception as fault:
            said = str(fault).splitlines()[0] if str(fault) else ""
            found.append(f"{type(fault).__name__} {said}: {list(chosen.values())}")
    return "\n".join(found)


@cache
def narrow():
    """Rules for bf16 weights whose moments are fp32: a third of all projectors, each with a
    source or residual."""
    wide = Adam(state_dtype="float32")
    found = {}
    for chosen in legal()[0]:
        kept = {k: v for k, v in chosen.items() if k not in ("inner", "refresh", "limiter")}
        kept = {k: v for k, v in kept.items() if v is not None}
        try:
            rule = Rule(wide, refresh=Refresh(2), rounding="stochastic", weight_decay=DECAY, **kept)
        except UsageError as error:
            assert_is_a_sentence(error)
        else:
            found[rule] = None
    return list(found)[::3]


def test_bf16_weights_have_fp32_moments_and_resume_to_the_bit_when_rounded_by_chance():
    for rule in narrow():
        whole = weights(SHAPES, torch.bfloat16)
        optimizer = optimizer_of(whole, rule)
        run(optimizer, whole, steps(torch.bfloat16)[:STOP])
        middle = {n: nn.Parameter(p.detach().clone()) for n, p in whole.items()}
        resumed = optimizer_of(middle, rule)
        resumed.load_named_state_dict(state_of(optimizer))
        run(optimizer, whole, steps(torch.bfloat16)[STOP:])
        run(resumed, middle, steps(torch.bfloat16)[STOP:])
        assert same(state_of(resumed), state_of(optimizer)), rule
        for name, p in whole.items():
            state = optimizer.state[p]
            assert p.dtype == torch.bfloat16 and p.isfinite().all(), (name, rule)
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32, rule
            assert torch.equal(p, middle[name]), (name, rule)


def test_a_tied_weight_moves_once_by_the_sum_of_its_gradients():
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    tied = tied.double()
    tied[2].weight = tied[0].weight
    x = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layerwise in (False, True):
        free = nn.Parameter(tied[0].weight.detach().clone())
        rule = Rule(Adam(), parts.SVD(2), Refresh(3))
        a = LowRankOptimizer(tied.named_parameters(), LR, rule=rule, layerwise=layerwise)
        b = LowRankOptimizer([("0.weight", free)], LR, rule=rule)
        for _ in range(STEPS):
            (tied(x) ** 2).sum().backward()
            (free.grad,) = torch.autograd.grad(((x @ free.T).tanh() @ free.T).square().sum(), free)
            a.step(), b.step()
            a.zero_grad()
        assert len(a.state) == 1 and a.state[tied[0].weight]["step"] == STEPS
        torch.testing.assert_close(tied[2].weight, free, rtol=0, atol=1e-12)
        if a.projected is not None:
            a.projected.bind([], lambda p: None)


@pytest.mark.parametrize("share", range(4))
def test_the_laws_hold_for_every_pair_of_parts(share):
    assert not broken(pairwise()[share::4])


@pytest.mark.exhaustive
@pytest.mark.parametrize("share", range(16))
def test_the_laws_hold_for_every_legal_tuple(share):
    assert not broken(legal()[0][share::16])
