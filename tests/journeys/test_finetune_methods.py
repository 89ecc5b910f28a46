"""Every method through the command line: it trains, resumes, and loads as what was measured."""

import dataclasses
from typing import Any

import pytest
from safetensors.torch import load_file

from eckart.io.models import load_tokenizer
from eckart.io.opening import open_model
from eckart.io.text import read
from eckart.jobs.training import held_out
from eckart.jobs.training.fit import RunTraining
from eckart.recipe import registry
from tests.journeys.runs import eckart

SMALL = {"rank": 4, "every": 2, "gap": 2}  # fits the narrowest map of the tiny model


def small(slug: str) -> list[str]:
    """The words that choose a method in a size for the tiny model."""
    cls: Any = registry.load(slug)
    names = {f.name for f in dataclasses.fields(cls)}
    return [f"method={slug}"] + [f"method.{k}={v}" for k, v in SMALL.items() if k in names]


def slugs() -> list[Any]:
    """Every method; one of each axis by default, seconds each."""
    found = registry.methods(registry.BUILTIN).values()
    default = (registry.DEFAULTS["weights"], registry.DEFAULTS["update"])
    return [
        pytest.param(entry.name, marks=[] if entry.name in default else pytest.mark.slow)
        for entry in found
        if entry.axis in ("weights", "update")
    ]


@pytest.mark.parametrize("slug", slugs())
def test_a_method_trains_resumes_and_loads(slug, place, tmp_path, monkeypatch):
    words = ["finetune", place / "m", place / "d.jsonl", *small(slug), "train.save_every=2"]
    words += ["train.steps=4"]
    whole = eckart(*words, "-o", tmp_path / "whole", "--json")
    assert whole.code == 0, whole.out
    original = RunTraining.compute_loss

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunTraining, "compute_loss", failing)
        assert eckart(*words, "-o", tmp_path / "parts").code == 130
    resumed = eckart("finetune", "--resume", tmp_path / "parts", "--json")
    assert resumed.code == 0, resumed.out
    after = whole.document["eval"]["after"]["loss"]
    assert resumed.document["eval"]["after"]["loss"] == after
    final = tmp_path / "whole" / "final"
    assert any(load_file(file) for file in final.glob("*.safetensors"))
    data = read(str(place / "d.jsonl"), load_tokenizer(final), 48)
    loaded = held_out.measure(open_model(final).model, data, 2, ())["loss"]
    # fp32 in another order of sums where terms were folded
    assert loaded == pytest.approx(after, abs=1e-4)
