"""Two processes take the steps of one: FSDP2 with uneven shards, and DDP."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.optim.processes import RULES, data, network, optimizer_of, registered, train

from eckart.optim import storage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes returned that ran tests/optim/processes.py."""
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


WAYS = ["fsdp2", "fsdp2, resumed", "fsdp2, layer by layer", "ddp", "ddp, layer by layer"]


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
            weights, norms, state = runs[way][rule]
            for a, b in zip(weights, wanted[0], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=near, msg=rule)
            assert norms == pytest.approx(wanted[1], rel=near, abs=near), rule
            assert state.keys() == wanted[2].keys()
            for key, value in wanted[2].items():
                a, b = torch.as_tensor(state[key]), torch.as_tensor(value)
                if a.dtype == torch.uint8:  # a rounding error may cross to the next code
                    close = (a.int() - b.int()).abs() <= 1
                else:
                    close = torch.isclose(a, b, rtol=0, atol=near, equal_nan=True)
                assert a.dtype == b.dtype and close.all(), f"{rule}: {key}"


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
    each other in a step, and at a refresh one sum of Gram matrices for each shape."""
    for runs in two:
        found = runs["sent"]
        assert all(name == "allreduce_" for steps in found.values() for step in steps
                   for name, _ in step if steps is not found["left"])  # fmt: skip
        for step, calls in enumerate(found["right"]):
            grams = [n * n for n in (6, 5, 9, 7)] if step in (0, 5) else []
            assert sorted(size for _, size in calls) == sorted(grams)
        for step, calls in enumerate(found["right, clipped"]):
            assert len(calls) == (5 if step in (0, 5) else 1)
        assert found["adamw"] == [[]] * 10
        # R [r, n] of four shapes is summed, and a left basis needs the gradient once
        for step, calls in enumerate(found["left"]):
            low = [2 * 6, 2 * 5, 2 * 9, 1 * 7]
            sums = sorted(size for name, size in calls if name == "allreduce_")
            assert sums[-4:] == sorted(low) if step not in (0, 5) else len(calls) > 4
        # columns and row totals of all matrices together, and lengths of all;
        assert all(len(calls) == 2 for calls in found["adafactor"])
        assert all(len(calls) == 1 for calls in found["orthogonal"])
        # a norm for each shape that has a rest, beside the Gram matrices at a refresh
        for step, calls in enumerate(found["fira"]):
            assert len(calls) == (7 if step in (0, 5) else 3)
        # scores of 6, 5, 9 and 7 directions
        assert all(len(calls) <= 8 for calls in found["dct"])
