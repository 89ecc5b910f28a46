"""Stopped by Ctrl-C, killed, or simply short: `--resume RUN` alone goes on to the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eckart.io.run import latest_checkpoint, read_metrics
from tests.journeys.runs import eckart

ROOT = Path(__file__).parents[2]
RECIPE = ["method=lora", "weights.dropout=0.1", "train.steps=24", "train.save_every=4"]


@pytest.fixture(scope="module")
def whole(place):
    ran = eckart("finetune", place / "m", place / "d.jsonl", *RECIPE, "-o", place / "whole")
    assert ran.code == 0, ran.err
    return load_file(place / "whole" / "final" / "adapter_model.safetensors")


def stopped(place: Path, out: Path, with_signal: int, at: str) -> subprocess.Popen:
    """A command of its own process, sent a signal when a line of progress begins with `at`."""
    words = ["finetune", place / "m", place / "d.jsonl", *RECIPE, "-o", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "eckart", *map(str, words)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = []
    for line in process.stderr:
        said.append(line)
        if line.strip().startswith(at):
            process.send_signal(with_signal)
            break
    process.said = "".join(said) + process.stderr.read()
    process.wait()
    return process


def same(out: Path, whole: dict[str, torch.Tensor]) -> bool:
    found = load_file(out / "final" / "adapter_model.safetensors")
    return found.keys() == whole.keys() and all(torch.equal(found[n], t) for n, t in whole.items())


def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(place, whole, tmp_path):
    out = tmp_path / "run"
    process = stopped(place, out, signal.SIGINT, "6/24")
    assert process.returncode == 130, process.said
    assert "interrupted at step" in process.said and "a checkpoint is saved" in process.said
    assert f"eckart finetune --resume {out}" in process.said
    assert json.loads((out / "run.json").read_text())["exit"] == 130
    step = int(latest_checkpoint(out).name[5:])
    assert 6 <= step < 24 and f"interrupted at step {step};" in process.said
    ran = eckart("finetune", "--resume", out)
    assert ran.code == 0, ran.err
    assert same(out, whole)
    steps = [line["step"] for line in read_metrics(out) if "loss" in line]
    assert steps == list(range(1, 25)), "every step is logged once"
    facts = json.loads((out / "run.json").read_text())
    reference = json.loads((place / "whole" / "run.json").read_text())
    assert facts["exit"] == 0 and facts["eval"] == reference["eval"]


def test_a_killed_run_goes_on(place, whole, tmp_path):
    out = tmp_path / "run"
    process = stopped(place, out, signal.SIGKILL, "9/24")
    assert process.returncode == -9
    assert json.loads((out / "run.json").read_text())["exit"] is None
    assert not (out / "final").exists()
    ran = eckart("finetune", "--resume", out)
    assert ran.code == 0, ran.err
    assert same(out, whole)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(place, whole, tmp_path):
    out = tmp_path / "run"
    assert stopped(place, out, signal.SIGKILL, "1/24").returncode == -9
    assert latest_checkpoint(out) is None
    ran = eckart("finetune", "--resume", out)
    assert ran.code == 0, ran.err
    assert same(out, whole)


def test_a_run_killed_after_its_last_step_has_only_its_result_written(place, whole, tmp_path):
    out = Path(shutil.copytree(place / "whole", tmp_path / "run"))
    shutil.rmtree(out / "final")
    ran = eckart("finetune", "--resume", out)
    assert ran.code == 0, ran.err
    assert same(out, whole) and read_metrics(out) == read_metrics(place / "whole")


def test_a_finished_run_is_not_trained_again_but_can_be_made_longer(place, whole, tmp_path):
    ran = eckart("finetune", "--resume", place / "whole")
    assert ran.code == 2, ran.err
    assert "this run is finished" in ran.err and "train.steps=48" in ran.err


def test_a_resumed_run_keeps_its_methods(place, whole):
    """Refused before the run's own config.yaml would say what its checkpoints are not."""
    before = (place / "whole" / "config.yaml").read_text()
    words = ["weights.rank=4", "weights.dropout=0", "train.steps=48"]
    ran = eckart("finetune", "--resume", place / "whole", *words)
    assert ran.code == 2 and ran.err.strip() == (
        "a resumed run keeps its methods\n"
        "  weights.dropout  the run 0.1, now 0.0\n"
        "  weights.rank     the run 16, now 4\n"
        f"Leave them out, or begin a new run from this one: eckart finetune {place / 'whole'}"
    )
    assert (place / "whole" / "config.yaml").read_text() == before
    ran = eckart("finetune", "--resume", place / "whole", "update=galore", "weights=dense")
    assert ran.code == 2 and "  update   the run adamw, now galore" in ran.err


def test_resuming_what_is_no_run_says_so(tmp_path):
    ran = eckart("finetune", "--resume", tmp_path / "nothing")
    assert ran.code in (2, 3) and "nothing" in ran.err
