"""Two processes give the same steps as one: FSDP2 with uneven shards, and DDP."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.methods.updates import PlainAdam
from tests.optim.processes import (
    BROAD,
    ROUNDED_LR,
    RULES,
    TALL,
    UNEVEN,
    Convolutions,
    Experts,
    data,
    given,
    network,
    of_layers,
    optimizer_of,
    projecting,
    registered,
    train,
)

from eckart.optim import Iteration, Selected, storage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of a function of tests/optim/processes.py in each of two processes."""
    out = tmp_path_factory.mktemp("two") / "out"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    env |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.optim.processes", str(out)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [p.wait(timeout=240) for p in processes] == [0, 0]
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(2)]


def alone(rule, accumulate, penalised):
    """The same training in this process."""
    model = network()
    optimizer = optimizer_of(model, rule, penalised)
    norms = train(model, optimizer, data(10), accumulate)
    return [p.detach() for p in model.parameters()], norms, optimizer.named_state_dict()


WAYS = ["fsdp2", "one, fsdp2, one", "fsdp2, layer by layer", "ddp", "ddp, layer by layer"]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_take_the_steps_of_one(two, way, monkeypatch):
    """fp64: 1e-9 over 10 steps, in weights, norms and the whole state. Moments in 8 bits are
    fp32 numbers in between: 1e-7."""
    monkeypatch.setattr(storage, "SMALLEST", 1)
    ran = [rule for rule, found in two[0][way].items() if not isinstance(found, str)]
    assert set(ran) - set(registered())  # whatever methods come, these run
    for rule in ran:
        near = 1e-7 if "8bit" in rule else 1e-9
        wanted = alone(rule, 2 if "ddp" in way else 1, "layer" not in way)
        assert max(wanted[1]) > 0.5  # else nothing was clipped
        for runs in two:
            assert_same(runs[way][rule], wanted, near, rule)


def assert_same(found, wanted, near, rule):
    """Assert that weights, norms and state equal those of one process."""
    for a, b in zip(found[0], wanted[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=near, msg=rule)
    assert found[1] == pytest.approx(wanted[1], rel=near, abs=near), rule
    state = found[2]
    assert state.keys() == wanted[2].keys()
    for key, value in wanted[2].items():
        a, b = torch.as_tensor(state[key]), torch.as_tensor(value)
        if a.dtype == torch.uint8:  # a rounding error may cross to the next code
            close = (a.int() - b.int()).abs() <= 1
        else:
            close = torch.isclose(a, b, rtol=0, atol=near, equal_nan=True)
        assert a.dtype == b.dtype and close.all(), f"{rule}: {key}"


def test_each_process_moves_its_own_experts_and_sends_no_matrix(two, monkeypatch):
    """fp64, 10 steps; where bits are few, a crossing rounds otherwise: 1e-7. What is sent says how
    long gradients are, and whether a basis was found."""
    monkeypatch.setattr(storage, "SMALLEST", 1)
    for rule in two[0]["experts"]:
        wanted = of_layers(Experts, rule, sharded=False)
        for runs in two:
            *found, most = runs["experts"][rule]
            assert_same(found, wanted, 1e-7 if "8bit" in rule else 1e-9, rule)
            assert most <= 2, rule


def test_convolutions_are_sharded_along_their_rows(two, monkeypatch):
    """By all rules that project or know matrices; fp64, 5 steps."""
    monkeypatch.setattr(storage, "SMALLEST", 1)
    for rule in two[0]["convolutions"]:
        wanted = of_layers(Convolutions, rule, False, 5)
        for runs in two:
            near = 1e-7 if "8bit" in rule else 1e-9
            assert_same(runs["convolutions"][rule][:3], wanted, near, rule)


def test_every_rule_runs_sharded_or_is_refused_with_a_sentence(two):
    for runs in two:
        refused = {rule for rule, found in runs["fsdp2"].items() if isinstance(found, str)}
        assert runs["fsdp2"].keys() == RULES.keys()
        assert refused <= set(registered())
        for rule in refused:
            assert "sharded" in runs["fsdp2"][rule] and rule.split()[-1] not in MISSION


MISSION = {"galore", "fira", "dct-adamw", "lisa", "lora-pro", "altlora", "adamw"}


def test_what_a_step_sends_is_bounded(two):
    """Four matrices. Projected on the right, shards of rows need nothing from
    each other in a step, and at a refresh one sum of half a Gram matrix for each shape."""
    for runs in two:
        found = runs["sent"]
        elsewhere = [steps for name, steps in found.items() if not name.startswith("left")]
        assert {name for steps in elsewhere for step in steps for name, _ in step} == {"allreduce_"}
        grams = [n * (n + 1) // 2 for n in (6, 5, 9, 7)]
        for step, calls in enumerate(found["right"]):
            assert sorted(size for _, size in calls) == sorted(grams if step in (0, 5) else [])
        for step, calls in enumerate(found["right, clipped"]):
            assert len(calls) == (5 if step in (0, 5) else 1)
        assert found["adamw"] == [[]] * 10
        for step, calls in enumerate(found["right, 4 bits"]):
            assert calls == found["right"][step]
        # two of [n, k], G^T (G Z) twice or after G^T Z, and whether G is finite: never all of G
        for name, k in (("right, randomised", 3), ("right, wide", 9)):
            for step, calls in enumerate(found[name]):
                assert len(calls) == (12 if step in (0, 5) else 0)
                most = sum(1 + 2 * min(k, n) * n for n in (6, 5, 9, 7))
                assert sum(size for _, size in calls) <= most
        for step, calls in enumerate(found["right, iteration"]):
            sizes = [(1, min(2, m) * n) for n, m in UNEVEN] if step == 5 else []
            wanted = grams if step == 0 else sum(sizes, ())
            assert sorted(size for _, size in calls) == sorted(wanted)
        # R [r, n] of four shapes is summed, and a left basis needs the gradient once
        for step, calls in enumerate(found["left"]):
            low = [2 * 6, 2 * 5, 2 * 9, 1 * 7]
            sums = sorted(size for name, size in calls if name == "allreduce_")
            assert sums[-4:] == sorted(low) if step not in (0, 5) else len(calls) > 4
        # the old basis, half of G^T G and G V of 30 x 6, R; the old basis, half of the rows here
        # and of G G^T of 7 x 30, R
        share = (4, 3)[runs is two[1]] * 15
        for step, calls in enumerate(found["left, thin"]):
            wanted = [12, 60] if step not in (0, 5) else [30, 21, 30, 12, 8, share, 28, 60]
            assert [size for _, size in calls] == wanted
        # columns and row totals of all matrices together, and lengths of all;
        assert all(len(calls) == 2 for calls in found["adafactor"])
        assert all(len(calls) == 1 for calls in found["orthogonal"])
        # a norm for each shape that has a rest, beside the Gram matrices at a refresh
        for step, calls in enumerate(found["fira"]):
            assert len(calls) == (7 if step in (0, 5) else 3)
        # scores of 6, 5, 9 and 7 directions
        assert all(len(calls) <= 8 for calls in found["dct"])


def test_rules_send_no_matrix_that_is_projected_on_the_right(two):
    """For all rules that project, on four tall matrices; bounds follow from the rule's parts."""
    for slug, rule in projecting().items():
        steps = two[0]["sent by rules"][slug][0]
        assert not isinstance(steps, str), steps
        if rule.projector.fleeting:
            continue  # its basis is on the left: see below
        for step, calls in enumerate(steps):
            assert not [name for name, _ in calls if "gather" in name], slug
            if step % 3 and rule.refresh.every > 1:  # norms; r x r numbers of an orthogonal step
                assert all(size <= 4 for _, size in calls), slug
            else:  # beside these once n x n numbers or fewer, or a few times n x (r + 8)
                most = [3 * n * min(n, 10) + n + 6 for n, _ in TALL]
                assert sum(size for _, size in calls) <= sum(most), slug


def test_rules_send_no_large_matrix_that_is_projected_on_the_left(two):
    """Rules send r of its columns or rows, or a few more. For a fixed basis, whose coordinates
    are sums over all rows, they send half of a shard. Power iteration starts from an exact
    basis, for which a Gram matrix of this shape would be more."""
    shard, few = max(n * m for n, m in BROAD[1:]) // 2, (2 + 8) * 299
    for slug, rule in projecting().items():
        steps = two[0]["sent by rules"][slug][1]
        first, *later = [max((size for _, size in calls), default=0) for calls in steps]
        if isinstance(rule.projector, Selected):
            assert first == max(later) == shard // 2, slug
            continue
        assert first == shard if isinstance(rule.projector, Iteration) else first <= few, slug
        assert max(later) <= few, slug


def test_ddp_may_average_the_projected_gradients_alone(two):
    """r / n of the elements of each matrix, which the reducer then leaves out; where a basis is
    due, in steps 0 and 5, the matrix itself."""
    whole = [m * n for n, m in TALL]
    low = [2 * max(m, n) for n, m in TALL]
    vectors = sum(m for _, m in TALL)
    for runs in two:
        reducer, optimizer, weights = runs["sent under ddp"][False]
        assert reducer == [sum(whole) + vectors] * 10 and optimizer == [[]] * 10
        reducer, optimizer, others = runs["sent under ddp"][True]
        assert reducer == [vectors] * 10
        for step, calls in enumerate(optimizer):
            assert [size for _, size in calls] == (low if step % 5 else whole)
        for a, b in zip(weights, others, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)  # fp64, 10 steps


def test_shards_of_bf16_weights_are_rounded_by_chance(two):
    """Each to a bf16 neighbour of the result of Adam with fp32 moments, with its own random bits;
    the processes agree, and a resumed run draws the same."""
    path, state = two[0]["rounded by chance"][10]
    for runs in two:
        for other, moments in runs["rounded by chance"].values():
            assert all(torch.equal(a[n], b[n]) for a, b in zip(path, other, strict=True) for n in a)
            assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(moments[k]))
                       for k in state)  # fmt: skip
    adam, up, below = PlainAdam(ROUNDED_LR), 0, 0.0
    for step in range(10):
        for name, G in given(step).items():
            found = path[step + 1][name].double()
            wanted = adam.moved(name, path[step][name].double(), G.double())
            spacing = 2.0 ** (wanted.abs().log2().floor() - 7)  # of 8 bits
            assert ((found - wanted).abs() < spacing * 1.001).all()  # moments are fp32
            up += int((found > wanted).sum())
            below += float(((wanted / spacing).ceil() - wanted / spacing).sum())
    assert state["1.weight/exp_avg"].dtype == state["1.weight/exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(state["1.weight/exp_avg"].double(), adam.M["1.weight"])
    # as often up as the distance from the neighbour below says: 1190 draws, three deviations
    drawn = sum(p.numel() for p in path[0].values()) * 10
    assert abs(up - (drawn - below)) < 3 * drawn**0.5 / 2
    ones = path[-1]["0.weight"]
    assert len(ones.unique()) > 1 and not torch.equal(*ones.chunk(2))  # the shards' own chances
