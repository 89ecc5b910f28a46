"""A rank that shrinks in mid-run: as if the lost components had been held at zero from then on."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from eckart.io.run import latest_checkpoint
from eckart.jobs import cut
from eckart.jobs.checkpoints import read_state
from eckart.linear import LowRank
from eckart.recipe import Recipe, attach, attach_from, registry
from tests.conftest import tiny
from tests.jobs.loops import LR, SEED, collate, logged, mixed, order, rows
from tests.processes import in_processes

STEPS, CUT = 9, 4


@pytest.fixture(autouse=True)
def dropped_in():
    folder = registry.add_folder(Path(__file__).parent / "methods")
    yield
    registry.folders.remove(folder)


def recipe() -> Recipe:
    method: Any = registry.load("shrinking")
    return Recipe(weights=method(cut_after=CUT))


def fresh() -> Any:
    handle = attach(tiny("llama", torch.float64), recipe(), seed=SEED)
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


def training(handle: Any, out: Path, batch: int = 2) -> Any:
    saves = {"save_strategy": "steps", "save_steps": 3}
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
    state = read_state(checkpoint)
    assert ("cut_at" in state) == (where == "after it")
    again = attach_from(tiny("llama", torch.float64), state["structure"], recipe=recipe())
    again.model.to(torch.float64)
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


def in_one_of_two(rank: int, out: Path, stop_before_cut: bool) -> Any:
    """One process of a DDP training; it may end just before the cut."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    registry.add_folder(Path(__file__).parent / "methods")
    checkpoint = latest_checkpoint(out)
    if checkpoint is None:
        handle = fresh()
    else:
        structure = read_state(checkpoint)["structure"]
        handle = attach_from(tiny("llama", torch.float64), structure, recipe=recipe())
        handle.model.to(torch.float64)
    trained = training(handle, out, batch=1)
    assert trained.args.world_size == 2
    if stop_before_cut:
        trained.cut_here = lambda folder: (_ for _ in ()).throw(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            trained.train()
        return None
    trained.train(resume_from_checkpoint=checkpoint is not None)
    assert type(trained.model_wrapped).__name__ == "DistributedDataParallel"
    final = copy.deepcopy({n: t.detach() for n, t in handle.named_state().items()})
    return {"final": final, "noise": torch.initial_seed()}


def test_two_processes_cut_as_one(reference, tmp_path):
    both = in_processes(in_one_of_two, tmp_path, False)
    assert both[0]["noise"] != both[1]["noise"], "dropout must not be the same on both"
    for found in both:
        for name, tensor in reference[1].items():
            torch.testing.assert_close(found["final"][name], tensor, rtol=0, atol=1e-9)


def test_two_processes_stopped_before_the_cut_end_the_same(reference, tmp_path):
    in_processes(in_one_of_two, tmp_path, True)
    assert "cut_at" not in read_state(latest_checkpoint(tmp_path))
    for found in in_processes(in_one_of_two, tmp_path, False):
        for name, tensor in reference[1].items():
            torch.testing.assert_close(found["final"][name], tensor, rtol=0, atol=1e-9)
