"""`train.processes=2`: two processes are one run, with the numbers of one process."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from eckart.io.run import latest_checkpoint, read_metrics
from eckart.jobs.training.fit import RunTraining
from tests.journeys.runs import eckart

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def words(place, out, *more):
    return ["finetune", place / "m", place / "d.jsonl", "train.steps=10", "-o", out, *more]


def test_two_processes_train_what_one_does(place, tmp_path):
    one = eckart(*words(place, tmp_path / "one", "train.batch_size=4", "--json"))
    two = eckart(
        *words(place, tmp_path / "two", "train.batch_size=2", "train.processes=2", "--json")
    )
    assert one.code == two.code == 0, two.out + two.err
    a, b = (load_file(tmp_path / n / "final" / "adapter_model.safetensors") for n in ("one", "two"))
    for name, tensor in a.items():
        # fp32: sums of two halves against one sum, divided by Adam where gradients are small
        error = (b[name] - tensor).norm() / tensor.norm()
        assert error < 1e-3, name
    losses = [m["loss"] for m in read_metrics(tmp_path / "two") if "loss" in m]
    assert losses == pytest.approx(
        [m["loss"] for m in read_metrics(tmp_path / "one") if "loss" in m], abs=1e-4
    )
    assert two.document["eval"]["after"]["loss"] == pytest.approx(
        one.document["eval"]["after"]["loss"], abs=1e-4
    )


@pytest.mark.slow
def test_an_error_is_said_once_with_its_code(place, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "eckart", "finetune", str(place / "m"), str(tmp_path / "no.jsonl"),
         "train.processes=2", "-o", str(tmp_path / "r")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 3
    assert ran.stderr.count("no.jsonl") == 1 and "Traceback" not in ran.stderr


def test_more_processes_than_the_machine_has_places_for_are_refused(place, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    ran = eckart(*words(place, tmp_path / "r", "train.processes=99"))
    assert ran.code == 2
    assert ran.err.splitlines()[-3:] == [
        "more processes than this machine has places for",
        "  train.processes = 99  8 cores",
        "Type train.processes=8 at most.",
    ]
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_ctrl_c_saves_on_all_and_resumes(place, tmp_path):
    out = tmp_path / "run"
    typed = [sys.executable, "-m", "eckart", *map(str, words(place, out, "train.processes=2"))]
    typed = [w.replace("train.steps=10", "train.steps=400") for w in typed]
    process = subprocess.Popen(typed, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "/400  loss" in line:
            process.send_signal(signal.SIGINT)
            break
    said = process.stderr.read()
    assert process.wait() == 130, said
    assert json.loads((out / "run.json").read_text())["exit"] == 130
    step = int(latest_checkpoint(out).name[5:])
    assert 1 <= step < 400 and f"interrupted at step {step}" in said
    ran = eckart("finetune", "--resume", out, f"train.steps={step + 3}")
    assert ran.code == 0, ran.err
    assert max(m["step"] for m in read_metrics(out)) == step + 3


def interrupted_after(step, typed, monkeypatch):
    """Run a command in this process until it dies in the forward pass after a step."""
    original = RunTraining.compute_loss

    def failing(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunTraining, "compute_loss", failing)
        assert eckart(*typed).code == 130


@pytest.mark.parametrize(
    "update",
    [
        ["method=lora"],
        pytest.param(["update=galore", "update.rank=4", "update.every=3"], marks=pytest.mark.slow),
        pytest.param(["update=lisa", "update.blocks=1", "update.every=3"], marks=pytest.mark.slow),
        pytest.param(["update=lora-pro"], marks=pytest.mark.slow),
    ],
    ids=lambda words: words[0].partition("=")[2],
)
def test_a_run_goes_on_with_another_number_of_processes_and_back(place, tmp_path, update):
    """Checkpoints are whole whoever wrote them; a step keeps its rows."""
    constant = [*update, "train.schedule=constant", "train.warmup=0", "train.best=false"]
    one = eckart(*words(place, tmp_path / "one", *constant, "train.batch_size=4"))
    out = tmp_path / "run"
    begun = [*constant, "train.processes=2", "train.batch_size=2", "train.steps=4"]
    assert eckart(*words(place, out, *begun)).code == 0
    went = eckart("finetune", "--resume", out, "train.steps=7", "train.processes=1")
    assert went.code == 0, went.err
    assert "accumulate: 2" in (out / "resolved.yaml").read_text()
    two = ["--resume", out, "train.steps=10", "train.processes=2"]
    wrong = eckart("finetune", *two, "train.accumulate=3")
    assert wrong.code == 2 and "a resumed run keeps the rows of its steps" in wrong.err
    assert "Type train.batch_size=2 train.accumulate=1." in wrong.err
    back = eckart("finetune", *two)
    assert one.code == back.code == 0, back.err
    (name,) = (file.name for file in (out / "final").glob("*model.safetensors"))
    a, b = (load_file(folder / "final" / name) for folder in (tmp_path / "one", out))
    for name, tensor in a.items():
        assert (b[name] - tensor).norm() < 1e-3 * tensor.norm(), name  # fp32, as above
    losses = [[m["loss"] for m in read_metrics(f) if "loss" in m] for f in (tmp_path / "one", out)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
