"""`eckart eval` as a person uses it: a table, intervals, and the drift from another model."""

import json
import math

import pytest

from tests.journeys.runs import eckart, labels, model_folder, texts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECKART_CACHE", str(folder / "cache"))
        model_folder(folder / "m")
        texts(folder / "d.jsonl")
        labels(folder / "l.jsonl")
        words = ("method=lora", "train.steps=12", "train.lr=1e-2")
        for data, run in (("d.jsonl", "run"), ("l.jsonl", "classes")):
            ran = eckart("finetune", folder / "m", folder / data, *words, "-o", folder / run)
            assert ran.code == 0, ran.err
        yield folder


def test_a_table_says_how_good_and_how_sure(place):
    ran = eckart("eval", place / "run", place / "d.jsonl")
    assert ran.code == 0, ran.err
    head, row = ran.out.splitlines()
    assert head.split() == ["eval", "loss", "perplexity", "bits/byte", "accuracy", "rows"]
    assert row.split()[0] == "d" and row.split()[-1] == "60" and "[" in row
    assert [line.split()[0] for line in ran.err.splitlines()] == ["model", "data", "rows"]
    assert "lora on" in ran.err


def test_the_numbers_of_a_training_come_out_again(place):
    """Packed rows in training, single ones here: the same held-out tokens, the same loss."""
    after = json.loads((place / "run" / "run.json").read_text())["eval"]["after"]
    ran = eckart("eval", place / "run", place / "d.jsonl", "data.eval=0.02", "--json")
    found = ran.document["eval"]
    assert ran.err == "" and found["loss"] == pytest.approx(after["loss"], abs=1e-4)
    assert found["bits_per_byte"] == pytest.approx(after["bits_per_byte"], abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_against_the_base_the_difference_is_paired(place):
    ran = eckart("eval", place / "run", place / "d.jsonl", "--against", place / "m", "--json")
    alone = eckart("eval", place / "m", place / "d.jsonl", "--json").document["eval"]
    found = ran.document["eval"]
    assert found["other_loss"] == pytest.approx(alone["loss"], abs=1e-6)
    assert found["difference"] == pytest.approx(found["loss"] - alone["loss"], abs=1e-9)
    low, high = found["intervals"]["difference"]
    assert low < found["difference"] < high < 0, "twelve steps help, surely"
    assert found["kl"] > 0 and 0 <= found["same_first_choice"] <= 1
    itself = eckart("eval", place / "m", place / "d.jsonl", "--against", place / "m")
    assert "change   loss +0.000" in itself.out and "first choice at 100.0 %" in itself.out


def test_metrics_that_are_not_asked_for_are_not_told(place):
    ran = eckart("eval", place / "run", place / "d.jsonl", "eval.metrics=[bits_per_byte]")
    assert ran.out.splitlines()[0].split() == ["eval", "loss", "bits/byte", "rows"]
    ran = eckart("eval", place / "classes", place / "l.jsonl", "eval.metrics=[perplexity]")
    assert ran.code == 2 and "no metric of this data is called perplexity\n" in ran.err


def test_several_sources_have_a_row_each(place):
    data = f"data=[{place / 'd.jsonl'},{place / 'l.jsonl'}]"
    ran = eckart("eval", place / "m", data, "data.format=text")
    assert [line.split()[0] for line in ran.out.splitlines()] == ["eval", "d", "l", "all"]


def test_classes_have_an_accuracy(place):
    ran = eckart("eval", place / "classes", place / "l.jsonl", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["eval"]["accuracy"] > 0.9 and "perplexity" not in ran.document["eval"]


def test_a_model_without_a_head_is_not_measured_on_labels(place):
    ran = eckart("eval", place / "m", place / "l.jsonl")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.endswith(
        "the model has no head for classes\n"
        f"  {place / 'm'}  causal\n"
        f"  {'labels':<{len(str(place / 'm'))}}  no, yes\n"
        "Fine-tune it on these labels first: eckart finetune MODEL DATA\n"
    )
    ran = eckart("eval", place / "run", place / "l.jsonl")
    assert ran.code == 3 and "the adapter has no head for classes" in ran.err


def test_whole_answers_count_where_rows_are_questions(place, tmp_path):
    file = tmp_path / "q.jsonl"
    rows = [{"prompt": "low", "completion": " rank"}, {"prompt": "a", "completion": " model"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = eckart("eval", place / "m", file)
    assert ran.code == 0 and "exact" in ran.out
    assert "warning  2 rows are few: the intervals are too narrow\n" in ran.err


def test_two_tokenizers_are_not_compared_token_by_token(place, tmp_path):
    from eckart.io.corpora import train_tokenizer

    other = model_folder(tmp_path / "other")
    train_tokenizer(["low rank is enough"] * 3, vocab_size=280).save_pretrained(other)
    ran = eckart("eval", place / "m", place / "d.jsonl", "--against", other)
    assert ran.code == 2 and ran.err.startswith("these two have different tokenizers\n")
    assert ran.err.endswith("Type eckart eval for each, and compare bits per byte.\n")
