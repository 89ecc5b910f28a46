"""`train.layerwise=true`: gradients are projected and freed as they come."""

import json

import pytest
import torch
from safetensors.torch import load_file

from eckart.io.run import read_metrics
from eckart.jobs.training.fit import RunTraining
from tests.journeys.runs import eckart
from tests.journeys.test_finetune_processes import environment, interrupted_after

__all__ = ["environment"]  # a fixture of every test here

GALORE = ["update=galore", "update.rank=4", "update.every=4", "train.steps=8", "train.save_every=4",
          "train.best=false"]  # fmt: skip


def words(place, out, *more):
    return ["finetune", place / "m", place / "d.jsonl", "-o", out, *GALORE, *more]


def assert_same_result(one, two, near):
    a, b = (load_file(run / "final" / "model.safetensors") for run in (one, two))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (b[name] - tensor).norm() <= near * tensor.norm(), name
    norms = [[m["grad_norm"] for m in read_metrics(r) if "grad_norm" in m] for r in (one, two)]
    assert len(norms[0]) > 2 and norms[0] == pytest.approx(norms[1], rel=near)


@pytest.mark.slow
def test_on_two_processes_what_one_trains_without_it(place, tmp_path, monkeypatch):
    """And resumes in the middle of a period, to the bit."""
    one = eckart(*words(place, tmp_path / "one", "train.batch_size=4"))
    share = ["train.batch_size=2", "train.layerwise=true"]
    two = eckart(*words(place, tmp_path / "two", *share, "train.processes=2"))
    assert one.code == two.code == 0, two.out + two.err
    # fp32: two orders of the same sums, divided by Adam where gradients are small
    assert_same_result(tmp_path / "one", tmp_path / "two", 1e-3)

    share = ["train.batch_size=2", "train.accumulate=2", "train.layerwise=true"]
    whole = eckart(*words(place, tmp_path / "whole", *share))
    interrupted_after(6, words(place, tmp_path / "cut", *share), monkeypatch)
    resumed = eckart("finetune", "--resume", tmp_path / "cut")
    assert whole.code == resumed.code == 0, resumed.err
    assert_same_result(tmp_path / "whole", tmp_path / "cut", 0)
    assert_same_result(tmp_path / "one", tmp_path / "cut", 1e-3)


@pytest.mark.parametrize(
    "more, what, fix",
    [
        (["update=adamw"], "layer-wise mode frees nothing here",
         "Leave layer-wise mode out, or take update=galore."),
        (["update=fira", "train.clip=1"], "this update rule cannot be clipped layer by layer",
         "Set train.clip=null, or leave layer-wise mode out."),
        (["update=fira", "train.accumulate=2"],
         "this update rule cannot accumulate micro-batches layer by layer",
         "Type train.accumulate=1, or leave train.layerwise out."),
        (["update=fira", "train.processes=2"],
         "this update rule cannot share its work layer by layer",
         "Leave train.layerwise out, type train.processes=1, or take update=galore."),
        (["update=galore", "objective=orthogonality"],
         "a penalty needs gradients that layer-wise mode has freed",
         "Leave train.layerwise out, or the penalty."),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_loaded(more, what, fix, tmp_path):
    ran = eckart("finetune", tmp_path / "no", tmp_path / "no.jsonl", "train.layerwise=true", *more)
    assert ran.code == 2
    assert what in ran.err and fix in ran.err


def test_a_rule_that_needs_whole_gradients_accumulates_and_clips_nothing(place, tmp_path):
    more = ["update=fira", "update.rank=4", "train.steps=4"]
    out = tmp_path / "run"
    ran = eckart("finetune", place / "m", place / "d.jsonl", "-o", out, *more,
                 "train.layerwise=true")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "accumulate: 1" in (out / "resolved.yaml").read_text()
    assert "clip     none   layer by layer a gradient is gone" in ran.err
    assert "clip: null  # layer by layer" in (out / "resolved.yaml").read_text()
    assert all("grad_norm" in m for m in read_metrics(out) if "learning_rate" in m)
    assert json.loads((out / "run.json").read_text())["exit"] == 0
    assert RunTraining.refresh_from  # the property that chose the first micro-batch


def test_weights_that_are_rounded_by_chance_train_in_bf16_and_resume_to_the_bit(
    place, tmp_path, monkeypatch
):
    wide = ["update.rounding=stochastic", "update.state_dtype=float32", "--json"]
    one = eckart(*words(place, tmp_path / "one", *wide))
    assert one.code == 0, one.err
    interrupted_after(6, words(place, tmp_path / "two", *wide), monkeypatch)
    assert eckart("finetune", "--resume", tmp_path / "two").code == 0
    assert_same_result(tmp_path / "one", tmp_path / "two", 0)
    found = load_file(tmp_path / "one" / "final" / "model.safetensors").values()
    assert {t.dtype for t in found} == {torch.bfloat16}


def test_rounding_by_chance_is_refused_where_what_is_trained_is_fp32(place, tmp_path):
    more = ["update=adamw", "weights=lora", "update.rounding=stochastic"]
    ran = eckart("finetune", place / "m", place / "d.jsonl", "-o", tmp_path / "run", *more)
    assert ran.code == 2 and ran.err.strip() == (
        "stochastic rounding is for bf16 weights\n"
        "  update.rounding  stochastic\n"
        "  weights = lora   trains tensors of its own, in fp32\n"
        "Leave update.rounding out, or type weights=dense."
    )
    assert not (tmp_path / "run").exists()
