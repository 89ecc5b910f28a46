"""Two processes take the steps of one: FSDP2 with uneven shards, and DDP."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.optim.processes import data, network, optimizer_of, train

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


@pytest.mark.parametrize(
    "way", ["fsdp2", "fsdp2, resumed", "fsdp2, layer by layer", "ddp", "ddp, layer by layer"]
)
def test_two_processes_take_the_steps_of_one(two, way):
    """fp64: 1e-9 over 10 steps, in weights, norms and the whole state."""
    for runs in two:
        for rule, (weights, norms, state) in runs[way].items():
            wanted = alone(rule, 2 if "ddp" in way else 1, "layer" not in way)
            for a, b in zip(weights, wanted[0], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=rule)
            assert max(norms) > 0.5  # else nothing was clipped
            assert norms == pytest.approx(wanted[1], abs=1e-9)
            assert state.keys() == wanted[2].keys()
            for key, value in wanted[2].items():
                a, b = torch.as_tensor(state[key]), torch.as_tensor(value)
                close = torch.isclose(a, b, rtol=0, atol=1e-9, equal_nan=True)
                assert a.dtype == b.dtype and close.all(), f"{rule}: {key}"
