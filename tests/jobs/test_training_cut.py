"""A rank that shrinks in mid-run: as if the lost components had been held at zero from then on."""

import copy
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import param
from transformers import Trainer, TrainerCallback

from eckart.io.run import latest_checkpoint
from eckart.jobs.training import cut
from eckart.jobs.training.checkpoints import read_state
from eckart.linear import LowRank
from eckart.recipe import Recipe, attach, attach_from, registry
from tests.conftest import tiny
from tests.jobs.killed import die, die_at_operation
from tests.jobs.loops import LR, SEED, collate, logged, mixed, order, rows
from tests.processes import in_processes, until_one_dies

STEPS, CUT, DROPOUT = 9, 4, 0.2


@pytest.fixture(autouse=True)
def dropped_in():
    folder = registry.add_folder(Path(__file__).parent / "methods")
    yield
    registry.folders.remove(folder)


def recipe(dropout: float = 0.0) -> Recipe:
    method: Any = registry.load("shrinking")
    return Recipe(weights=method(cut_after=CUT, dropout=dropout))


def fresh(dropout: float = 0.0) -> Any:
    handle = attach(tiny("llama", torch.float64), recipe(dropout), seed=SEED)
    handle.model.to(torch.float64)
    return handle


def rebuilt(checkpoint: Path, dropout: float = 0.0) -> Any:
    """A handle of the shape that a checkpoint has."""
    structure = read_state(checkpoint)["structure"]
    handle = attach_from(tiny("llama", torch.float64), structure, recipe=recipe(dropout))
    handle.model.to(torch.float64)
    return handle


def masked_by_hand() -> tuple[list[float], dict[str, torch.Tensor]]:
    """The reference: one bare loop at full rank, lost components zeroed with their moments.

    B's column and A's row at zero give each other no gradient, so they stay there.
    """
    handle = fresh()
    optimizer = handle.optimizer(lr=LR, clip=0.5)
    data, losses = rows(), []
    ranked = [order(len(data), SEED, e).tolist() for e in range(2)]
    queue = [ids[i : i + 2] for ids in ranked for i in range(0, len(data), 2)]
    lost: dict[str, torch.Tensor] = {}
    handle.model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / STEPS)
        batch = collate([data[i] for i in queue[step]])
        loss = handle.model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step + 1 == CUT:
            for path, by_name in handle.terms().items():
                term = by_name["shrinking"]
                size = term.B.detach().norm(dim=0) * term.A.detach().norm(dim=1)
                lost[path] = size.argsort(descending=True)[2:]
                for p, index in ((term.B, (slice(None), lost[path])), (term.A, (lost[path],))):
                    for t in (
                        p.data,
                        optimizer.state[p]["exp_avg"],
                        optimizer.state[p]["exp_avg_sq"],
                    ):
                        t[index] = 0
    final = {}
    for path, by_name in handle.terms().items():
        term = by_name["shrinking"]
        left = [i for i in range(6) if i not in lost[path].tolist()]
        final[f"{path}.shrinking.B"] = term.B.detach()[:, left]
        final[f"{path}.shrinking.A"] = term.A.detach()[left]
    return losses, final


@pytest.fixture(scope="module")
def reference():
    folder = registry.add_folder(Path(__file__).parent / "methods")
    found = masked_by_hand()
    registry.folders.remove(folder)
    return found


def training(handle: Any, out: Path, batch: int = 2, every: int = 3) -> Any:
    saves = {"save_strategy": "steps", "save_steps": every}
    return mixed(handle, Trainer, out, STEPS, 1, per_device_train_batch_size=batch, **saves)


def assert_same(handle: Any, final: dict[str, torch.Tensor]) -> None:
    found = handle.named_state()
    assert found.keys() == final.keys()
    for name, tensor in final.items():
        # fp64, sums over 6 and over 2 components in other orders: far below 1e-9
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)


def test_a_cut_goes_on_as_if_the_rest_were_zero(reference, tmp_path):
    losses, final = reference
    handle = fresh()
    trained = training(handle, tmp_path)
    trained.train()
    assert_same(handle, final)
    assert logged(trained) == pytest.approx(losses, rel=1e-6)  # kept by Trainer in fp32
    assert logged(trained, "learning_rate") == pytest.approx(
        [LR * (1 - s / STEPS) for s in range(STEPS)]
    )
    structure = handle.structure()
    shapes = {
        t["A"]["shape"][0] for p in structure["sites"].values() for t in [p["shrinking"]["tensors"]]
    }
    assert shapes == {2}


def test_moments_of_living_components_are_kept_and_their_steps_go_on(tmp_path):
    handle = fresh()
    training(handle, tmp_path).train()
    whole = read_state(tmp_path / "checkpoints" / "step-9")["optimizer"]
    assert {v for k, v in whole.items() if k.endswith("/step")} == {STEPS}


@pytest.mark.parametrize("where", ["before the rewriting", "in the rewriting", "after it"])
def test_a_run_stopped_on_either_side_of_the_cut_ends_the_same(
    reference, where, tmp_path, monkeypatch
):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    place = {
        "before the rewriting": (cut, "cut_checkpoint"),
        "in the rewriting": (cut, "close_with_manifest"),
        "after it": (Trainer, "create_scheduler"),
    }[where]
    with monkeypatch.context() as patch:
        if where == "after it":
            made = []
            original = Trainer.create_scheduler

            def second_time(self, *a: Any, **k: Any) -> Any:
                made.append(1)
                return stop() if len(made) == 2 else original(self, *a, **k)

            patch.setattr(*place, second_time)
        else:
            patch.setattr(*place, stop)
        with pytest.raises(KeyboardInterrupt):
            training(fresh(), tmp_path).train()
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.name == f"step-{CUT}"
    assert ("cut_at" in read_state(checkpoint)) == (where == "after it")
    again = rebuilt(checkpoint)
    training(again, tmp_path).train(resume_from_checkpoint=True)
    assert_same(again, reference[1])


def test_a_core_and_its_moments_lose_rows_and_columns_together():
    g = torch.Generator().manual_seed(0)
    B, A, R = (torch.randn(*shape, generator=g) for shape in ((5, 4), (4, 6), (4, 4)))
    term, index = LowRank(B, A, R=R), torch.tensor([0, 3])
    moments = {f"x.{n}/exp_avg": t + 1 for n, t in {"B": B, "A": A, "R": R}.items()}
    found = cut.cut_term_moments(term, index, "x", moments)
    term.select(index)
    assert torch.equal(term.dense(), B[:, index] @ R[index][:, index] @ A[index])
    assert torch.equal(found["x.R/exp_avg"], R[index][:, index] + 1)
    assert torch.equal(found["x.B/exp_avg"], B[:, index] + 1)


def test_state_of_another_shape_starts_afresh():
    term = LowRank(torch.zeros(5, 4), torch.zeros(4, 6))
    moments = {"x.B/exp_avg": torch.zeros(5, 2), "x.B/step": 3, "x.B/lr": 0.1, "y.B/step": 3}
    found = cut.cut_term_moments(term, torch.tensor([1]), "x", moments)
    assert found == {"x.B/exp_avg": None, "x.B/step": None}


# --- two processes -------------------------------------------------------------------------


def in_one_of_two(rank: int, out: Path, dropout: float, kill: Any = None) -> Any:
    """One process of a DDP training, from the newest checkpoint where there is one."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    registry.add_folder(Path(__file__).parent / "methods")
    checkpoint = latest_checkpoint(out)
    handle = rebuilt(checkpoint, dropout) if checkpoint else fresh(dropout)
    trained = training(handle, out, batch=1, every=2)
    assert trained.args.world_size == 2
    if kill is not None and kill.rank == rank:
        trained.add_callback(kill)
    trained.train(resume_from_checkpoint=checkpoint is not None)
    assert type(trained.model_wrapped).__name__ == "DistributedDataParallel"
    final = copy.deepcopy({n: t.detach() for n, t in handle.named_state().items()})
    return {"final": final, "noise": torch.initial_seed()}


def test_two_processes_cut_as_one(reference, tmp_path):
    both = in_processes(in_one_of_two, tmp_path, 0.0)
    assert both[0]["noise"] != both[1]["noise"], "dropout must not be the same on both"
    for found in both:
        for name, tensor in reference[1].items():
            torch.testing.assert_close(found["final"][name], tensor, rtol=0, atol=1e-9)


class Kill(TrainerCallback):
    """SIGKILL for one process: as a step begins or ends, or at a file operation.

    The checkpoint of the cut's step has 21 operations when it is "written" and 24 when it is
    "rewritten" in its new shape, all of them on rank 0.
    """

    def __init__(self, rank: int, moment: str, step: int = CUT, operation: int = 0):
        self.rank, self.moment, self.step, self.operation = rank, moment, step, operation

    def __str__(self) -> str:
        return f"{self.moment}-{self.step}-{self.operation}-rank-{self.rank}"

    def on_step_begin(self, args, state, control, **_):
        self.strike("begins", state.global_step + 1)

    def on_step_end(self, args, state, control, **_):
        self.strike("ends", state.global_step)
        self.strike("written", state.global_step)

    def on_train_end(self, args, state, control, **_):
        self.strike("rewritten", state.global_step)

    def strike(self, moment: str, step: int) -> None:
        if (moment, step) == (self.moment, self.step):
            die_at_operation(self.operation) if self.operation else die()


def kills(seed: int, marks: Any = ()) -> Iterator[Any]:
    """Before the cut, in it and after it, each on either process."""
    draw, slow = random.Random(seed), pytest.mark.slow
    yield param(Kill(draw.randint(0, 1), "ends", draw.randint(1, CUT - 1)), marks=marks)
    yield param(Kill(0, "written", CUT, draw.randint(1, 21)), marks=slow)
    yield param(Kill(0, "rewritten", CUT, draw.randint(1, 24)), marks=marks)
    yield param(Kill(1, "rewritten"), marks=slow)  # gone while the other one writes
    # the rebuilt model has taken no step
    yield param(Kill(draw.randint(0, 1), "begins", CUT + 1), marks=marks)
    yield param(Kill(draw.randint(0, 1), "ends", draw.randint(CUT + 1, STEPS - 1)), marks=marks)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What two processes end with; with dropout, so that their generators matter."""
    return in_processes(in_one_of_two, tmp_path_factory.mktemp("whole"), DROPOUT)[0]["final"]


@pytest.mark.parametrize("kill", [*kills(1), *kills(2, pytest.mark.slow)], ids=str)
def test_a_process_killed_on_either_side_of_the_cut_changes_no_bit(kill, uninterrupted, tmp_path):
    assert until_one_dies(in_one_of_two, tmp_path, DROPOUT, kill)[kill.rank] == -signal.SIGKILL
    for found in in_processes(in_one_of_two, tmp_path, DROPOUT):
        assert found["final"].keys() == uninterrupted.keys()
        for name, tensor in uninterrupted.items():
            assert torch.equal(found["final"][name], tensor), name
