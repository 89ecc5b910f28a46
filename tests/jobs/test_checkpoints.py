"""A training that is killed goes on as if nothing had happened; a torn checkpoint is none."""

from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from eckart.errors import FileError
from eckart.io.folder import close_with_manifest, write_json
from eckart.io.run import checkpoint_folders, latest_checkpoint
from eckart.io.tensors import read_tensors, write_tensors
from eckart.jobs.training.checkpoints import (
    MODEL,
    OPTIMIZER,
    STATE,
    apart,
    load_model_state,
    read_state,
    whole,
)
from eckart.optim import LowRankOptimizer
from eckart.recipe import Handle, Recipe, attach
from tests.conftest import randomise, tiny
from tests.jobs.loops import LR, handle_of, logged, mixed
from tests.laws.matrix import attached, slugs, small, steps
from tests.processes import in_a_fresh_one, in_processes

SAVES = {"save_strategy": "steps", "save_steps": 3}


class StopAt(TrainerCallback):
    """Ends a training as a user's interrupt would, without a checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


class SaveAlways(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_save = True


def killed(
    recipes: str, folder: Path, kills: int, in_saves: int, seed: int
) -> dict[str, list[dict]]:
    """Train, kill, resume in processes of their own; by recipe, what came of each kill."""
    return in_a_fresh_one("tests.jobs.killed", recipes, folder, kills, in_saves, seed)


def check(by_recipe: dict[str, list[dict]]) -> None:
    assert by_recipe
    for results in by_recipe.values():
        assert [r["equal"] for r in results] == [True] * len(results), results
        assert any(r["signal"] == 9 for r in results)
        assert any(r["resumed_at"] for r in results)
        assert any(r["torn"] for r in results), "no kill hit a save"
        assert not any(r["left_over"] for r in results)


@pytest.mark.slow
def test_every_update_rule_killed_between_two_of_its_events_ends_in_the_same_bits(tmp_path):
    """Weights and state; from a checkpoint that lies between two of them, too."""
    found = killed(",".join(slugs("update")), tmp_path, kills=0, in_saves=0, seed=0)
    assert found == {
        slug: [{"signal": 9, "resumed_at": 8, "torn": 0, "left_over": 0, "equal": True}]
        for slug in slugs("update")
    }


def test_killed_and_resumed_ends_in_the_same_bits(tmp_path):
    check(killed("lora,galore", tmp_path, kills=1, in_saves=2, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lora", "galore"])
def test_twenty_kills_of_which_five_in_a_save(recipe, tmp_path):
    check(killed(recipe, tmp_path, kills=15, in_saves=5, seed=2))


@pytest.mark.parametrize("cls", [Trainer, SFTTrainer], ids=lambda c: c.__name__)
def test_a_checkpoint_holds_what_differs_and_resumes_exactly(cls, tmp_path):
    whole = handle_of()
    mixed(whole, cls, tmp_path / "a", 7, 2, **SAVES).train()
    part = handle_of()
    stopped = mixed(part, cls, tmp_path / "b", 7, 2, **SAVES)
    stopped.add_callback(StopAt(5))
    stopped.train()
    folder = latest_checkpoint(tmp_path / "b")
    assert folder is not None and folder.name == "step-3"
    biggest = max(t.numel() * t.element_size() for t in whole.model.parameters())
    assert (folder / "model.safetensors").stat().st_size < biggest + 40_000
    assert not list(folder.glob("*.pt")) + list(folder.glob("*.bin")) + list(folder.glob("*.pth"))
    again = handle_of()
    resumed = mixed(again, cls, tmp_path / "b", 7, 2, **SAVES)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in whole.named_state().items():
        assert torch.equal(again.named_state()[name], tensor), name


class SpoilAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        if state.global_step + 1 == self.step:
            for p in (p for p in model.parameters() if p.grad is not None):
                p.grad.fill_(torch.inf)


def test_a_step_that_a_gradient_scaler_skips_stays_skipped_in_a_resumed_run(tmp_path):
    """In none of the counts of the rule that takes turns. Accelerate makes a scaler for fp16, on
    a GPU: here it is given one."""

    def of(folder):
        update = small("altlora", schedule="alternate", turn=2)
        handle = attach(tiny("llama"), Recipe(weights=small("lora"), update=update))
        training = mixed(handle, Trainer, tmp_path / folder, 7, 1, **SAVES)
        training.accelerator.scaler = torch.amp.GradScaler("cpu", 64.0, growth_interval=2)
        training.add_callback(SpoilAt(2))
        return training

    whole, stopped, resumed = of("a"), of("b"), of("b")
    whole.train()
    stopped.add_callback(StopAt(5))
    stopped.train()
    resumed.train(resume_from_checkpoint=True)
    for training in (whole, resumed):
        assert {group["taken"] for group in training.inner_optimizer.param_groups} == {6}
        assert training.handle.events.step == 6 and training.state.global_step == 7
    assert resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    for name, tensor in whole.handle.named_state().items():
        assert torch.equal(resumed.handle.named_state()[name], tensor), name


@pytest.mark.parametrize("length", [{}, {"max_steps": -1, "num_train_epochs": 0.5}])
def test_a_checkpoint_of_the_last_step_is_taken_up_without_another_step(length, tmp_path):
    """Trainer takes one more; at a constant rate the weights would move."""
    more = {**SAVES, "lr_scheduler_type": "constant", **length}
    first, again = handle_of(), handle_of()
    mixed(first, Trainer, tmp_path, 6, 1, **more).train()
    resumed = mixed(again, Trainer, tmp_path, 6, 1, **more)
    assert resumed.train(resume_from_checkpoint=True).global_step == 6
    for name, tensor in first.named_state().items():
        assert torch.equal(again.named_state()[name], tensor), name
    assert {s["step"] for s in resumed.inner_optimizer.state.values()} == {6}


def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(tmp_path):
    mixed(handle_of(), Trainer, tmp_path, 6, 1, **SAVES).train()
    newest = checkpoint_folders(tmp_path)[0]
    assert newest.name == "step-6"
    file = newest / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"\0" * 8)
    assert latest_checkpoint(tmp_path).name == "step-3"
    with pytest.raises(FileError, match="this checkpoint is not whole"):
        mixed(handle_of(), Trainer, tmp_path, 6, 1).train(resume_from_checkpoint=str(newest))


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    mixed(handle_of(), Trainer, tmp_path, 3, 1, **SAVES).train()
    other = handle_of(model="qwen")
    with pytest.raises(FileError, match="made on another base"):
        load_model_state(other, latest_checkpoint(tmp_path))


def test_resuming_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(FileError, match="no whole checkpoint to resume from"):
        mixed(handle_of(), Trainer, tmp_path, 3, 1).train(resume_from_checkpoint=True)


def test_a_new_learning_rate_holds_from_the_resume_on(tmp_path):
    first = mixed(handle_of(lr_ratio=2.0), Trainer, tmp_path, 6, 1, **SAVES)
    first.add_callback(StopAt(4))
    first.train()
    args = {"learning_rate": LR / 10, **SAVES}
    second = mixed(handle_of(lr_ratio=2.0), Trainer, tmp_path, 6, 1, **args)
    second.train(resume_from_checkpoint=True)
    expected = [LR * (1 - s / 6) for s in range(3)] + [LR / 10 * (1 - s / 6) for s in range(3, 6)]
    both = zip(logged(second, "learning_rate"), logged(second, "learning_rate_2"), strict=True)
    assert [max(pair) / 2 for pair in both] == pytest.approx(expected)


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    options = {
        "save_strategy": "steps", "save_steps": 100, "eval_strategy": "steps", "eval_steps": 1,
        "save_total_limit": 2, "metric_for_best_model": "loss", "greater_is_better": False,
    }  # fmt: skip
    trained = mixed(handle_of(), Trainer, tmp_path, 6, 1, **options)
    evaluate = trained.evaluate
    trained.evaluate = lambda **k: {**evaluate(**k), "eval_loss": next(scores)}
    trained.add_callback(SaveAlways())
    trained.train()
    names = [p.name for p in checkpoint_folders(tmp_path)]
    assert names == ["step-6", "step-5", "step-2"]
    best = {n: t.clone() for n, t in trained.handle.named_state().items()}
    trained._load_best_model()
    assert any(not torch.equal(t, best[n]) for n, t in trained.handle.named_state().items())


def test_a_new_best_is_saved_whenever_it_comes(tmp_path):
    scores = iter([3.0, 1.0, 2.0])
    options = {
        "save_strategy": "steps", "save_steps": 100, "eval_strategy": "steps", "eval_steps": 1,
        "metric_for_best_model": "loss", "greater_is_better": False,
    }  # fmt: skip
    trained = mixed(handle_of(), Trainer, tmp_path, 3, 1, **options)
    evaluate = trained.evaluate
    trained.evaluate = lambda **k: {**evaluate(**k), "eval_loss": next(scores)}
    trained.train()
    assert "step-2" in [p.name for p in checkpoint_folders(tmp_path)]


def prepared(slug: str, sharded: bool) -> tuple[Handle, LowRankOptimizer, dict]:
    """A tiny model that a method trains, whole or under FSDP2, and a batch for it."""
    model, handle, batch = attached(slug, "llama", torch.float64)
    randomise(handle)
    for module in [*model.model.layers, model] if sharded else []:
        fully_shard(module)
    return handle, handle.optimizer(lr=LR, clip=1.0), batch


def save(handle: Handle, optimizer: LowRankOptimizer, folder: Path, writes: bool) -> None:
    """A checkpoint's files; all processes gather, one writes."""
    tensors = whole(handle.named_state())
    moments, numbers = apart(optimizer.named_state_dict())
    events = handle.events.state_dict()
    if writes:
        folder.mkdir(parents=True)
        write_tensors(folder / MODEL, tensors)
        write_tensors(folder / OPTIMIZER, moments)
        state = {"structure": handle.structure(), "optimizer": numbers, "events": events}
        write_json(folder / STATE, state)
        close_with_manifest(folder)


def take_up(handle: Handle, optimizer: LowRankOptimizer, folder: Path) -> None:
    load_model_state(handle, folder)
    state, moments = read_state(folder), read_tensors(folder / OPTIMIZER)
    optimizer.load_named_state_dict({**moments, **state["optimizer"]})
    handle.events.load_state_dict(state["events"])


def sharded(rank: int, out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Two steps under FSDP2, a checkpoint, and two more in a fresh model that loaded it."""
    handle, optimizer, batch = prepared("lora", True)
    steps(handle, optimizer, [batch] * 2)
    save(handle, optimizer, out, writes=rank == 0)
    torch.distributed.barrier()
    again, other, _ = prepared("lora", True)
    take_up(again, other, out)
    steps(handle, optimizer, [batch] * 2)
    steps(again, other, [batch] * 2)
    return {"whole": whole(handle.named_state()), "loaded": whole(again.named_state())}


def test_a_sharded_model_saves_whole_tensors_and_takes_them_back(tmp_path):
    found = in_processes(sharded, tmp_path / "step-2")
    alone, optimizer, batch = prepared("lora", False)
    steps(alone, optimizer, [batch] * 4)
    for by_rank in found:
        for name, tensor in by_rank["whole"].items():
            assert torch.equal(by_rank["loaded"][name], tensor), name
            # fp64: the same batch on both, averaged
            torch.testing.assert_close(tensor, alone.named_state()[name], rtol=0, atol=1e-9)


def leg(rank: int, run: Path, begin: int, count: int) -> dict[str, dict[str, torch.Tensor]]:
    """Two steps of every update rule from the files of a step on, and the next files: tensors of
    weights and state after them."""
    found = {}
    for slug in slugs("update"):
        handle, optimizer, batch = prepared(slug, count > 1)
        if begin:
            take_up(handle, optimizer, run / slug / f"step-{begin}")
        steps(handle, optimizer, [batch] * 2)
        save(handle, optimizer, run / slug / f"step-{begin + 2}", writes=rank == 0)
        found[slug] = whole(handle.named_state()) | apart(optimizer.named_state_dict())[0]
    return found


@pytest.mark.slow
def test_every_update_rule_goes_from_two_processes_to_one_and_back(tmp_path):
    """From files to files, between a rule's own events: its periods have three steps."""
    in_processes(leg, tmp_path, 0, 2)
    leg(0, tmp_path, 2, 1)
    found = in_processes(leg, tmp_path, 4, 2)
    for slug in slugs("update"):
        handle, optimizer, batch = prepared(slug, False)
        steps(handle, optimizer, [batch] * 6)
        wanted = handle.named_state() | apart(optimizer.named_state_dict())[0]
        for tensors in (by_rank[slug] for by_rank in found):
            assert tensors.keys() == wanted.keys(), slug
            for name, tensor in wanted.items():  # fp64, six steps of sums over shards
                close = {"rtol": 0, "atol": 1e-9, "equal_nan": True}  # a cosine yet to come
                torch.testing.assert_close(tensors[name], tensor, **close, msg=f"{slug} {name}")
