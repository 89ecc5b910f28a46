"""A method of several stages on the command line: what a dry run says, and that it only says."""

import json

from tests.journeys.runs import eckart, model_folder, texts


def test_a_dry_run_names_the_stages_and_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    model_folder(tmp_path / "m")
    texts(tmp_path / "d.jsonl")
    run = eckart(
        "finetune", tmp_path / "m", tmp_path / "d.jsonl", "method=codyra", "train.steps=2",
        "--dry-run", "--json", "-o", tmp_path / "run",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert len(json.loads(run.out)["stages"]) >= 2
    assert not (tmp_path / "run").exists()
