"""The examples run as they stand, offline, and what they train loads elsewhere."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

from eckart.errors import UsageError
from eckart.io.models import load_model
from eckart.io.presets import build_model
from eckart.jobs.training.trainer import trainer
from eckart.methods.objective.distill import Distill
from eckart.methods.weights.lora import LoRA
from eckart.recipe import Recipe, attach

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STEPS = {"bare_loop": 12, "sft": 15, "dpo": 15, "peft_optimizer": 12}


@pytest.mark.parametrize("name, steps", STEPS.items())
def test_an_example_learns_and_plain_peft_loads_it(name, steps, tmp_path):
    out = tmp_path / "out"
    losses = example(name).main("", steps, str(out))
    assert losses[-1] < losses[0] - 0.1
    folder = out if name in ("bare_loop", "peft_optimizer") else out / "final"
    PeftModel.from_pretrained(build_model("llama-tiny", vocab=257), folder)


@pytest.mark.parametrize(
    "recipe, words",
    [
        (Recipe(weights=LoRA(rank=2, targets=("embedding",))), "the head +carries terms"),
        (Recipe(weights=LoRA(rank=2), objective=Distill()), "distill +would see no logits"),
    ],
)
def test_preferences_with_what_their_loss_passes_over_are_refused(recipe, words, tmp_path):
    model = build_model("llama-tiny", vocab=257)
    handle = attach(model, recipe, teacher=build_model("llama-tiny", vocab=257))
    with pytest.raises(UsageError, match=rf"DPOTrainer computes its loss from(.|\n)*{words}"):
        trainer(DPOTrainer)(handle, args=DPOConfig(str(tmp_path), bf16=False))


def test_the_trainer_example_resumes_where_it_was(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    losses = example("trainer").main("", 22, str(whole))
    assert losses[-1] < losses[0] - 0.1
    # the folder of a run that stopped after its checkpoint at step 20
    (parts / "checkpoints").mkdir(parents=True)
    (whole / "checkpoints" / "step-20").rename(parts / "checkpoints" / "step-20")
    again = example("trainer").main("", 22, str(parts))
    assert again == losses
    a, b = (load_model(folder / "final").state_dict() for folder in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_adapters_example_gives_each_row_its_own_words(tmp_path):
    said = example("many_adapters").main("", 12, str(tmp_path))
    assert list(said) == ["english", "german", "french", "base"]
    assert len(set(said.values())) > 1 and said["german"] != said["base"]
    PeftModel.from_pretrained(build_model("llama-tiny", vocab=257), tmp_path / "german")
