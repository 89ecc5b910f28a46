"""A new method is one file in a folder: listed, validated, trained, resumed, exported.

No other line of the package changes; here the folder is a temporary one.
"""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from eckart.io.export import export, load
from eckart.io.opening import open_model
from eckart.recipe import Recipe, attach, registry
from tests.conftest import batch_for, tiny
from tests.journeys.runs import eckart, model_folder, texts
from tests.laws.matrix import steps
from tests.tiny import logits

METHOD = '''
"""Half: a low-rank update whose A is frozen at its random start.

    y = W x + B A x        A [r, n] frozen, B [m, r] trained, zero at first

Take it when only half of LoRA's numbers may be trained.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from eckart.linear import LowRank
from eckart.recipe import Cost, Paper, Weights


@dataclass(frozen=True)
class Half(Weights):
    """Trains one thin factor."""

    rank: Annotated[int, Ge(1)] = 4
    """r, the rank of the update."""

    default_lr: ClassVar = 0.02
    paper: ClassVar = Paper("Half", "https://example.org/half")
    promises: ClassVar = ("starts_at_base", "restores_base", "merges", "exports_low_rank")

    def build_one(self, site):
        (m, n), r = site.shape, self.rank
        A = torch.randn(*site.leading, r, n, generator=site.generator) / n**0.5
        return {"thin": LowRank(torch.zeros(*site.leading, m, r), A, trained=("B",))}

    def cost(self, m, n):
        return Cost(parameters=self.rank * m, frozen=self.rank * n)
'''

BRANCH = '''
"""Branch: a trained matrix and a narrow nonlinear branch beside it.

    y = W x + B silu(A x)        all trained, B zero at first
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from eckart.linear import LowRank
from eckart.recipe import Weights


@dataclass(frozen=True)
class Branch(Weights):
    """Trains everything."""

    rank: Annotated[int, Ge(1)] = 4
    """r, the width of the branch."""

    base: ClassVar = "trained"
    rest: ClassVar = "trained"
    offers: ClassVar = ("matrices",)
    promises: ClassVar = ("starts_at_base",)

    def build_one(self, site):
        (m, n), r = site.shape, self.rank
        A = torch.randn(*site.leading, r, n, generator=site.generator) / n**0.5
        return {"branch": LowRank(torch.zeros(*site.leading, m, r), A, phi="silu")}
'''

REST = '''
"""Rest: the leading part of each matrix is trained, what is left of it becomes the base.

    y = (W - B A) x + B A x        B A the truncated SVD of W
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from eckart.decompose import balanced, truncated_svd
from eckart.linear import Dense, LowRank
from eckart.recipe import Weights


@dataclass(frozen=True)
class Rest(Weights):
    """Trains the leading part."""

    rank: Annotated[int, Ge(1)] = 4
    """r, the rank of that part."""

    promises: ClassVar = ("restores_base", "merges")

    def build_one(self, site):
        W = site.weight()
        B, A = balanced(*truncated_svd(W, self.rank))
        return {"dense": Dense(W - B @ A), "leading": LowRank(B, A)}
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    (folder / "methods" / "weights").mkdir(parents=True)
    for name, text in {"half": METHOD, "branch": BRANCH, "rest": REST}.items():
        (folder / "methods" / "weights" / f"{name}.py").write_text(text.lstrip())
    model_folder(folder / "m")
    texts(folder / "d.jsonl")
    return folder


@pytest.fixture(autouse=True)
def dropped_in(place, monkeypatch):
    monkeypatch.setenv("ECKART_METHODS", str(place / "methods"))
    assert "half" in registry.methods()


def finetune(place, out, *words):
    return eckart("finetune", place / "m", place / "d.jsonl", "method=half", *words, "-o", out)


@pytest.fixture(scope="module")
def whole_run(place):
    os.environ["ECKART_METHODS"] = str(place / "methods")
    return finetune(place, place / "run", "train.steps=8", "train.save_every=4")


def test_it_is_listed_with_its_fields(place):
    listed = eckart("methods", "half")
    assert listed.code == 0 and "weights.rank = 4" in listed.out
    assert "Take it when only half of LoRA's numbers may be trained." in listed.out


def test_its_fields_are_validated(place):
    wrong = finetune(place, place / "none", "weights.rnak=3")
    assert wrong.code == 2 and "Did you mean weights.rank?" in wrong.err
    wrong = finetune(place, place / "none", "weights.rank=0")
    assert wrong.code == 2 and not (place / "none").exists()


def test_it_trains_and_its_default_rate_is_taken(whole_run, place):
    assert whole_run.code == 0, whole_run.err
    facts = json.loads((place / "run" / "run.json").read_text())
    assert facts["eval"]["after"]["loss"] < facts["eval"]["before"]["loss"]
    assert "lr: 0.02  # the default of half" in (place / "run" / "resolved.yaml").read_text()


def test_a_killed_run_goes_on_to_the_same_tensors(whole_run, place):
    code = (
        "import os, signal, sys\n"
        "from eckart.jobs.training import fit\n"
        "from eckart.cli import main\n"
        "step = fit.Interrupt.on_step_end\n"
        "def killed(self, args, state, control, **k):\n"
        "    if state.global_step == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, args, state, control, **k)\n"
        "fit.Interrupt.on_step_end = killed\n"
        "main()\n"
    )
    words = ["finetune", place / "m", place / "d.jsonl", "method=half", "train.steps=8",
             "train.save_every=4", "-o", place / "killed"]  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", code, *map(str, words)], check=False)
    assert ended.returncode == -9
    resumed = eckart("finetune", "--resume", place / "killed")
    assert resumed.code == 0, resumed.err
    ours = open_model(place / "killed").model.state_dict()
    theirs = open_model(place / "run").model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_its_result_loads_in_plain_peft_as_lora(whole_run, place):
    from peft import PeftModel

    from eckart.io.models import load_model

    theirs = PeftModel.from_pretrained(load_model(place / "m"), place / "run" / "final")
    # fp32; a low-rank update becomes LoRA's factors exactly, summed in another order
    torch.testing.assert_close(
        logits(theirs), logits(open_model(place / "run").model), rtol=0, atol=2e-6
    )


def test_it_converts_to_a_dense_model(whole_run, place):
    done = eckart("convert", place / "run", "--to", "dense", "-o", place / "dense")
    assert done.code == 0, done.err
    merged, adapted = open_model(place / "dense").model, open_model(place / "run").model
    # fp32 rounding of merged weights of order 0.1 through two layers
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=2e-6)


def test_one_that_trains_the_matrix_beside_a_branch_says_what_its_maps_are_not(place):
    words = ["method=branch", "weights.targets=[attn]", "train.steps=2", "-o", place / "branched"]
    ran = eckart("pretrain", place / "m", place / "d.jsonl", *words)
    assert ran.code == 0, ran.err
    seen = eckart("inspect", place / "branched", "--json")
    assert set(seen.document["roles"]) == {"mlp.gate", "mlp.up", "mlp.down"}
    refused = eckart("convert", place / "branched", "--to", "dense", "-o", place / "folded")
    assert refused.code == 2 and "_proj.branch is not a linear map" in refused.err


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_one_that_changes_the_base_gives_it_back(architecture, place, tmp_path):
    model, batch = tiny(architecture, torch.float64), batch_for(architecture)
    base, outputs = copy.deepcopy(model.state_dict()), logits(model)
    handle = attach(model, Recipe(weights=registry.load("rest")()))
    # fp64: the matrix is what it was but for the rounding of a difference
    torch.testing.assert_close(logits(model), outputs, rtol=0, atol=1e-12)
    steps(handle, handle.optimizer(lr=1e-2), [batch] * 2)
    outputs = logits(model)
    export(handle, tmp_path / "rest", format="native")
    again = load(tmp_path / "rest", tiny(architecture, torch.float64))
    assert torch.equal(logits(again.model), outputs)
    assert all(torch.equal(t, base[name]) for name, t in again.remove().state_dict().items())
    torch.testing.assert_close(logits(handle.merge()), outputs, rtol=0, atol=1e-12)
