"""A method of several stages on the command line: what it says, and the page that it leaves."""

import json

import pytest

from eckart.io.corpora import bytes_tokenizer
from tests.journeys.runs import eckart, labels, texts, workplace
from tests.tiny import bert


@pytest.fixture
def place(tmp_path):
    return workplace(tmp_path)


def test_a_dry_run_names_the_stages_and_trains_nothing(place):
    run = eckart(
        "finetune", place / "m", place / "d.jsonl", "method=codyra", "train.steps=2",
        "--dry-run", "--json", "-o", place / "run",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert len(json.loads(run.out)["stages"]) >= 2
    assert not (place / "run").exists()


def test_a_model_that_cannot_be_pruned_is_refused_and_leaves_no_run(place):
    bert(vocab_size=257).save_pretrained(place / "bert")
    bytes_tokenizer().save_pretrained(place / "bert")
    data = labels(place / "c.jsonl")
    ran = eckart("finetune", place / "bert", data, "method=loram", "-o", place / "run")
    assert ran.code == 2 and "heads" in ran.err, ran.err
    assert not (place / "run").exists()


def test_it_says_its_memory_and_leaves_a_page_as_any_other_run(place):
    texts(place / "e.jsonl", rows=30)
    data = f"data.train=[{place / 'd.jsonl'},{place / 'e.jsonl'}]"
    out = place / "run"
    ran = eckart("finetune", place / "m", data, "method=codyra", "train.steps=3", "-o", out)
    assert ran.code == 0, ran.err
    trained = [path.parent.name for path in sorted((out / "stages").glob("*/run.json"))]
    assert len(trained) == 2, "one for each task"
    said = [line.split()[1] for line in ran.err.splitlines() if line.startswith("memory")]
    assert said == trained
    facts = json.loads((out / "run.json").read_text())
    for name in trained:
        memory = json.loads((out / "stages" / name / "run.json").read_text())["memory"]
        # the estimate takes every row for as long as the longest of sixteen: up to 11 % more
        whole = sum(memory["estimated"].values())
        assert sum(memory["measured"].values()) == pytest.approx(whole, rel=0.15)
        assert whole <= facts["estimated_memory_bytes"]
    assert facts["peak_memory_bytes"] > 0
    done = next(line for line in ran.out.splitlines() if line.startswith("done"))
    assert "measured" in done and "estimated" in done and "loads it" in done
    page = (out / "report.html").read_text()
    assert "Tensor bytes" in page and f"{trained[0]} measured" in page
    assert "nats" in page and 'src="http' not in page


def test_a_head_that_was_learnt_on_a_pruned_model_comes_along_to_the_whole_one(place):
    data = labels(place / "l.jsonl")
    words = ("method=loram", "train.steps=30", "train.lr=1e-2", "-o", place / "run")
    ran = eckart("finetune", place / "m", data, *words)
    assert ran.code == 0, ran.err
    ran = eckart("eval", place / "run", data, "--json")
    assert ran.code == 0, ran.err
    assert ran.document["eval"]["accuracy"] > 0.9
