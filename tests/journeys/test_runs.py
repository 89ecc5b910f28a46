"""`eckart runs` and `eckart doctor`: what there is, at a glance."""

import json

import pytest

from eckart.io.run import Run
from eckart.jobs import doctor
from tests.journeys.runs import eckart

RECIPE = {
    "weights": {"name": "lora", "rank": 8},
    "update": {"name": "adamw"},
    "objective": [{"name": "orthogonality"}],
}


def made(folder, exit=0, **facts):
    """A run's folder as a training leaves it."""
    run = Run.create(folder)
    run.log(step=1, loss=2.0)
    run.log(step=7, eval_loss=1.5)
    run.record(**{"command": "finetune", "recipe": RECIPE, **facts})
    run.finish(exit)
    return run


def test_runs_are_listed_with_recipe_state_and_score(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores = {"before": {"loss": 2.5}, "after": {"loss": 1.25, "accuracy": 0.75}}
    made("runs/0001", eval=scores)
    made("runs/0002", exit=130)
    made("runs/0003", exit=5, recipe={"weights": {"name": "dense"}, "update": {"name": "galore"}})
    going = Run.create("runs/0004")
    killed = Run.create("runs/old/0005")
    (tmp_path / "runs" / "0001" / "stages" / "00").mkdir(parents=True)
    (tmp_path / "runs" / "0001" / "stages" / "00" / "run.json").write_text("{}")
    facts = json.loads((killed.folder / "run.json").read_text())
    killed.finish()
    (killed.folder / "run.json").write_text(json.dumps(facts))  # exit: null, and nobody writes
    try:
        ran = eckart("runs")
        by_run = {each["run"]: each for each in eckart("runs", "--json").document["runs"]}
    finally:
        going.finish()
    head, *rows = ran.out.splitlines()
    assert ran.code == 0 and head.split("   ")[0] == "run"
    assert len(rows) == 5, "a run's stages are not runs of their own"
    line = next(row for row in rows if "0001" in row)
    assert "lora 8 + orthogonality" in line and "2.500 -> 1.250, 75 % right" in line
    assert {name: each["state"] for name, each in by_run.items()} == {
        "runs/0001": "done",
        "runs/0002": "interrupted",
        "runs/0003": "diverged",
        "runs/0004": "running",
        "runs/old/0005": "killed",
    }
    assert by_run["runs/0002"]["after"] == 1.5, "the last held-out loss where none was final"
    assert by_run["runs/0002"]["steps"] == 7
    assert by_run["runs/0003"]["recipe"] == "dense + galore"


def test_a_damaged_run_does_not_hide_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made("runs/0001")
    (tmp_path / "runs" / "0002").mkdir()
    (tmp_path / "runs" / "0002" / "run.json").write_text("{")
    assert {e["state"] for e in eckart("runs", "--json").document["runs"]} == {"done", "unreadable"}


def test_no_runs_are_said_to_be_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = eckart("runs")
    assert (ran.code, ran.out) == (3, "") and ran.err.startswith("no such folder\n  runs\n")
    assert eckart("runs", ".").out == "no runs in .\n"


def test_doctor_says_what_is_there_and_what_is_not(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "" if name == "scipy" else "99.0")
    ran = eckart("doctor")
    assert ran.code == 0 and ran.err == ""
    labels = [line[:10].strip() for line in ran.out.splitlines() if line[:10].strip()]
    wanted = ["eckart", "packages", "devices", "methods", "cache", "network", "extras"]
    assert labels == wanted
    assert (
        "claims        missing   eckart reproduce and bench" in ran.out
        and "pip install 'eckart[claims]'" in ran.out
    )
    assert "peft          there     PEFT itself" in ran.out


def test_doctor_names_what_is_missing_or_too_old(monkeypatch):
    found = {"torch": "", "trl": "0.5.0"}
    monkeypatch.setattr(doctor, "installed", lambda name: found.get(name, "99.0"))
    ran = eckart("doctor")
    assert ran.code == 6
    assert "problem   torch is missing: type pip install -U 'torch>=2.10'\n" in ran.out
    assert "problem   trl 0.5.0 is older than 1.10: type pip install -U 'trl>=1.10'\n" in ran.out
    assert eckart("doctor", "--json").document["packages"]["torch"]["found"] is None


@pytest.mark.parametrize(
    ("text", "wanted"), [("2.13.0+cpu", (2, 13, 0)), ("1.0rc1", (1, 0)), ("", ())]
)
def test_versions_are_compared_as_numbers(text, wanted):
    assert doctor.numbers(text) == wanted
