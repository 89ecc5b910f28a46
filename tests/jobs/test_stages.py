"""Jobs of several stages: done in order, resumed inside one, never done twice."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eckart.errors import UsageError
from eckart.io.models import load_model
from eckart.io.opening import open_model
from eckart.jobs.training import stages
from eckart.jobs.training.fit import RunTraining
from eckart.jobs.training.stages import schedule
from eckart.recipe import Stage, registry
from tests.journeys.runs import eckart, model_folder, texts
from tests.tiny import logits


@pytest.fixture(autouse=True)
def dropped_in():
    folder = registry.add_folder(Path(__file__).parent / "methods")
    yield
    registry.folders.remove(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    model_folder(folder / "m")
    texts(folder / "a.jsonl")
    lines = [json.loads(line)["text"][::-1] for line in (folder / "a.jsonl").open()]
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    return folder


def test_stages_that_stand_together_are_repeated_for_each_task():
    listed = (
        Stage("prune", "operate"),
        Stage("learn", "train", repeat="tasks"),
        Stage("fold", "operate", repeat="tasks"),
        Stage("end", "operate"),
    )
    found = schedule(listed, ["x", "y"])
    assert [p.name for p in found] == [
        "00-prune", "01-learn-x", "02-fold-x", "03-learn-y", "04-fold-y", "05-end",
    ]  # fmt: skip
    assert [p.name for p in found if p.last] == ["02-fold-x", "04-fold-y"]


def test_a_stage_can_only_name_what_comes_before_it():
    with pytest.raises(UsageError, match="names later; before it: original, first"):
        schedule((Stage("first", "train"), Stage("second", "train", base="later")), [])


def test_prune_tune_recover(place, tmp_path):
    out = tmp_path / "run"
    ran = eckart("finetune", place / "m", place / "a.jsonl", "weights=halved", "-o", out)
    assert ran.code == 0, ran.err
    assert "prune, tune, more, recover" in ran.err
    names = sorted(p.name for p in (out / "stages").iterdir())
    assert names == ["00-prune", "01-tune", "02-more", "03-recover"]
    original = load_file(place / "m" / "model.safetensors")
    pruned = load_file(out / "stages" / "01-tune" / "state" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert (pruned[name] == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    # what was learnt on the pruned model stands on the original one
    learnt = load_file(out / "stages" / "02-more" / "state" / "output.safetensors")
    ended = open_model(out)
    assert torch.equal(ended.model.state_dict()[name], original[name])
    path = name.removesuffix(".weight")
    product = 2.0 * learnt[f"{path}.halved.B"] @ learnt[f"{path}.halved.A"]
    term = next(iter(ended.handle.terms()[path].values()))
    torch.testing.assert_close(term.dense(), product)
    assert not torch.allclose(logits(ended.model), logits(load_model(place / "m")), atol=1e-3)
    lost = load_file(out / "stages" / "03-recover" / "state" / "output.safetensors")["lost"]
    matrices = [t for n, t in original.items() if "proj" in n]
    assert int(lost) == pytest.approx(sum(t.numel() for t in matrices) / 2, rel=0.01)


def test_a_migrated_optimizer_goes_on_counting(place, tmp_path):
    out = tmp_path / "run"
    assert eckart("finetune", place / "m", place / "a.jsonl", "weights=halved", "-o", out).code == 0

    def counts(stage: str, step: int) -> set[int]:
        state = json.loads(
            (out / "stages" / stage / "checkpoints" / f"step-{step}" / "state.json").read_text()
        )
        return {v for k, v in state["optimizer"].items() if k.endswith("/step")}

    assert counts("01-tune", 8) == {8}
    assert counts("02-more", 4) == {12}


@pytest.mark.parametrize("stage, step", [("01-tune", 6), ("02-more", 2)])
def test_a_job_stopped_inside_a_stage_ends_in_the_same_bits(
    place, stage, step, tmp_path, monkeypatch
):
    words = ["finetune", place / "m", place / "a.jsonl", "weights=halved", "train.save_every=2"]
    assert eckart(*words, "-o", tmp_path / "whole").code == 0
    original = RunTraining.compute_loss

    def failing(self, *args, **kwargs):
        if stage in str(self.run_folder) and self.state.global_step == step and self.model.training:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    out = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(RunTraining, "compute_loss", failing)
        assert eckart(*words, "-o", out).code == 130
    assert not (out / "stages" / stage / "state").exists() and not (out / "final").exists()
    done: list[str] = []
    operate = stages.operate
    monkeypatch.setattr(stages, "operate", lambda c, w: done.append(w.stage.name) or operate(c, w))
    ran = eckart("finetune", "--resume", out)
    assert ran.code == 0, ran.err
    assert done == ["recover"], "prune was whole and is not done again"
    a, b = (
        load_file(tmp_path / n / "final" / "adapter_model.safetensors") for n in ("whole", "parts")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_each_task_is_learnt_and_all_are_measured_after_it(place, tmp_path):
    out = tmp_path / "run"
    data = f"data.train=[{place / 'a.jsonl'},{place / 'b.jsonl'}]"
    ran = eckart(
        "finetune", place / "m", data, "weights=one-by-one", "data.eval=0.1", "-o", out, "--json"
    )
    assert ran.code == 0, ran.out
    tasks = ran.document["tasks"]
    assert [t["after"] for t in tasks] == ["a", "b"]
    assert all(set(t["held_out"]) == {"a", "b"} for t in tasks)
    scores = ran.document["eval"]["before"]
    before = scores["tasks"]
    assert scores["loss"] == pytest.approx((before["a"]["loss"] + before["b"]["loss"]) / 2)
    assert tasks[0]["held_out"]["a"]["loss"] < before["a"]["loss"] - 0.1
    assert tasks[1]["held_out"]["b"]["loss"] < tasks[0]["held_out"]["b"]["loss"]
    load_model(out / "final")  # folded each time: a plain model
