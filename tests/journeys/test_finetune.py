"""`eckart finetune` as a person uses it, from the first line to a folder that PEFT loads."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from eckart.io.models import load_model
from eckart.io.opening import open_model
from eckart.io.run import read_metrics
from eckart.jobs.settings.config import resolve
from eckart.jobs.training import fit
from tests.journeys.runs import eckart, labels
from tests.tiny import logits


@pytest.fixture(scope="module")
def first_run(place):
    return eckart(
        "finetune", place / "m", place / "d.jsonl", "method=lora", "train.steps=20",
        "train.lr=1e-2", "-o", place / "run",
    )  # fmt: skip


def test_a_first_run_says_what_it_does_and_gains(first_run, place):
    assert first_run.code == 0, first_run.err
    said = [line.split()[0] for line in first_run.err.splitlines() if line[:1].strip()]
    assert said == ["model", "data", "method", "memory", "lr", "steps", "memory"]
    assert "20/20  loss" in first_run.err
    done, following = first_run.out.splitlines()
    assert done.startswith("done") and "plain PEFT loads it" in done
    assert following.startswith("next     eckart generate")
    facts = json.loads((place / "run" / "run.json").read_text())
    assert facts["exit"] == 0
    assert facts["eval"]["after"]["loss"] < facts["eval"]["before"]["loss"] - 0.2


def test_the_resolved_configuration_runs_again_to_the_same_bits(first_run, place, tmp_path):
    ran = eckart("finetune", "-c", place / "run" / "resolved.yaml", "-o", tmp_path / "again")
    assert ran.code == 0, ran.err
    one, two = (
        load_file(run / "final" / "adapter_model.safetensors")
        for run in (place / "run", tmp_path / "again")
    )
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


def test_it_stops_when_patience_runs_out_and_the_best_is_the_result(place, tmp_path):
    other = tmp_path / "other.jsonl"  # what is learnt of one text hurts on another, in the end
    other.write_text("".join(json.dumps({"text": f"{i} zyx wvu {i}"}) + "\n" for i in range(8)))
    out = tmp_path / "run"
    ran = eckart(
        "finetune", place / "m", place / "d.jsonl", f"data.eval=[{other}]", "train.steps=100",
        "train.lr=3e-2", "eval.every=2", "train.patience=3", "-o", out, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    scores = {m["step"]: m["eval_loss"] for m in read_metrics(out) if "eval_loss" in m}
    best = min(scores, key=lambda step: scores[step])
    assert ran.document["steps"] == max(scores) == best + 3 * 2 < 100
    assert ran.document["eval"]["after"]["loss"] == pytest.approx(scores[best], abs=1e-6)


def test_the_adapter_loads_in_plain_peft_to_the_same_function(first_run, place):
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(load_model(place / "m"), place / "run" / "final")
    ours = open_model(place / "run").model
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(ours), logits(load_model(place / "m")), atol=1e-3)


def test_held_out_numbers_agree_with_each_other(first_run, place):
    after = json.loads((place / "run" / "run.json").read_text())["eval"]["after"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    # a byte tokenizer: one token per byte, and an end for each text
    assert after["bits_per_byte"] == pytest.approx(after["loss"] / math.log(2), rel=0.1)


def test_metrics_have_one_line_per_log_step_with_our_norm(first_run, place):
    lines = read_metrics(place / "run")
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 21))
    assert all(line["grad_norm"] > 0 and line["learning_rate"] >= 0 for line in trained)
    assert trained[-1]["loss"] < trained[0]["loss"]


def test_every_auto_is_settled_with_a_reason_and_resolves_again(first_run, place):
    text = (place / "run" / "resolved.yaml").read_text()
    assert "auto" not in [
        line.split("#")[0].split(":")[-1].strip()
        for line in text.splitlines()
        if "format" not in line
    ]
    assert "seq_len: 48  # the model's context" in text
    again = resolve("finetune", files=[place / "run" / "resolved.yaml"])
    assert again.train.steps == 20 and again.train.batch_size == 4


def test_the_json_object_is_all_that_stands_on_stdout(place, tmp_path):
    ran = eckart(
        "finetune", place / "m", place / "d.jsonl", "train.steps=3", "-o", tmp_path / "r", "--json"
    )
    assert ran.code == 0 and ran.err == ""
    wanted = {
        "run", "command", "exit", "recipe", "seconds", "tokens_per_second", "peak_memory_bytes",
        "estimated_memory_bytes", "parameters", "eval", "warnings",
    }  # fmt: skip
    assert wanted <= ran.document.keys()
    found = ran.document
    assert found["recipe"]["weights"]["name"] == "lora"
    assert found["parameters"]["trainable"] == 14848
    # the same categories, estimated before and counted after: equal to the state's scalars
    assert found["peak_memory_bytes"] == pytest.approx(found["estimated_memory_bytes"], rel=0.02)


def test_a_dry_run_decides_everything_and_writes_nothing(place, tmp_path):
    out = tmp_path / "r"
    ran = eckart("finetune", place / "m", place / "d.jsonl", "-o", out, "--dry-run", "--json")
    assert ran.code == 0 and not out.exists()
    assert ran.document["steps"] > 0 and ran.document["run"] is None


def test_a_trained_model_is_a_plain_folder(place, tmp_path):
    out = tmp_path / "r"
    ran = eckart(
        "finetune", place / "m", place / "d.jsonl", "update=galore", "update.rank=4",
        "train.steps=4", "-o", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    config = json.loads((out / "final" / "config.json").read_text())
    assert config["model_type"] == "llama" and "quantization_config" not in config
    assert (out / "final" / "tokenizer.json").exists()
    before, after = (
        load_file(place / "m" / "model.safetensors"),
        load_file(out / "final" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_is_gone_on_with(first_run, place, tmp_path):
    ran = eckart(
        "finetune",
        place / "run",
        place / "d.jsonl",
        "train.steps=5",
        "-o",
        tmp_path / "r",
        "--json",
    )
    assert ran.code == 0, ran.out
    ended = json.loads((place / "run" / "run.json").read_text())["eval"]["after"]["loss"]
    assert ran.document["eval"]["before"]["loss"] == pytest.approx(ended, abs=1e-5)
    assert (tmp_path / "r" / "final" / "adapter_config.json").exists()


def test_another_method_on_an_adapter_is_refused(first_run, place, tmp_path):
    ran = eckart("finetune", place / "run", place / "d.jsonl", "method=dora", "-o", tmp_path / "r")
    assert ran.code == 2
    assert "an adapter is trained further by its own method" in ran.err
    assert "eckart convert" in ran.err and not (tmp_path / "r").exists()


def test_a_classifier_learns_its_classes(place, tmp_path):
    data = labels(tmp_path / "l.jsonl")
    ran = eckart(
        "finetune", place / "m", data, "train.steps=40", "train.lr=1e-2", "data.eval=0.2",
        "-o", tmp_path / "r", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.out
    assert ran.document["eval"]["after"]["accuracy"] == 1.0
    tensors = load_file(tmp_path / "r" / "final" / "adapter_model.safetensors")
    assert any("score" in name for name in tensors), "the new head is part of the result"
    ran = eckart("generate", tmp_path / "r", "-p", "low low low low")
    assert ran.code == 0 and ran.out.startswith("low low low low\n  no "), ran.err
    ran = eckart("convert", tmp_path / "r", "--to", "dense", "-o", tmp_path / "m")
    assert ran.code == 0 and "nats a class" in ran.out, ran.err
    ran = eckart("eval", tmp_path / "m", data, "--json")
    assert ran.document["eval"]["accuracy"] == 1.0
    for source in (tmp_path / "r", tmp_path / "m"):  # its head is gone on with
        words = ("train.steps=1", "train.lr=1e-6", "-o", tmp_path / f"on-{source.name}", "--json")
        ran = eckart("finetune", source, data, *words)
        assert ran.code == 0 and ran.document["eval"]["before"]["accuracy"] == 1.0, ran.out


def test_classes_are_known_by_their_names_in_any_order(place, tmp_path):
    """A head of three classes, drawn from a seed of its own, and data with two of them."""
    said = [("low low", "no"), ("rank rank", "yes"), ("is is", "also")]
    rows = [{"text": text, "label": label} for text, label in said * 12]
    for name, some in (("all.jsonl", rows), ("two.jsonl", rows[1::3] + rows[::3])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    words = ("method=lora-sb", "weights.rank=8", "train.steps=40", "train.lr=1e-2", "--seed", 3)
    ran = eckart("finetune", place / "m", tmp_path / "all.jsonl", *words, "-o", tmp_path / "r")
    assert ran.code == 0, ran.err
    ran = eckart("eval", tmp_path / "r", tmp_path / "two.jsonl", "--json")
    assert ran.code == 0 and ran.document["eval"]["accuracy"] > 0.9, ran.out
    ran = eckart("convert", tmp_path / "r", "--to", "native", "-o", tmp_path / "n")
    assert ran.code == 0 and "the same first choice at 100.0 %" in ran.out, ran.err


def test_an_occupied_folder_is_refused_before_anything_is_loaded(first_run, place):
    ran = eckart("finetune", place / "nowhere", place / "d.jsonl", "-o", place / "run")
    assert ran.code == 2 and "the folder is not empty" in ran.err


def test_a_shape_without_weights_is_sent_to_pretrain(place, tmp_path):
    ran = eckart("finetune", "llama-tiny", place / "d.jsonl", "-o", tmp_path / "r")
    assert ran.code == 2 and "eckart pretrain llama-tiny DATA" in ran.err


def test_a_rate_that_is_too_high_ends_with_the_module(place, tmp_path):
    ran = eckart(
        "finetune", place / "m", place / "d.jsonl", "method=dense", "train.steps=30",
        "train.lr=1e30", "train.warmup=0", "train.clip=null", "data.eval=0",
        "train.save_every=1", "-o", tmp_path / "r",
    )  # fmt: skip
    assert ran.code == 5, ran.err
    assert "is NaN at step" in ran.err or "is infinite at step" in ran.err
    assert "; first in model." in ran.err
    # the one checkpoint there was holds the weights that went wrong
    assert ran.err.endswith(
        "  last good checkpoint  none was saved before\n"
        "Start again with a lower rate: train.lr=5e+29\n"
    )
    assert not list((tmp_path / "r" / "checkpoints").iterdir())
    assert json.loads((tmp_path / "r" / "run.json").read_text())["exit"] == 5


def test_a_divergence_names_module_step_and_the_last_good_checkpoint_which_goes_on(
    place, tmp_path, monkeypatch
):
    told, out = fit.Interrupt.on_step_end, tmp_path / "r"

    def spoilt(self, args, state, control, **more):
        if state.global_step == 3:
            more["model"].model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
        return told(self, args, state, control, **more)

    monkeypatch.setattr(fit.Interrupt, "on_step_end", spoilt)
    words = ("train.steps=5", "train.batch_size=2", "train.save_every=1", "train.lr=2e-3")
    words += ("method=dense", "data.eval=0")
    ran = eckart("finetune", place / "m", place / "d.jsonl", *words, "-o", out)
    assert ran.code == 5 and ran.err.endswith(
        "loss is NaN at step 4; first in model.layers.1.mlp.up_proj.weight (weight)\n"
        f"  last good checkpoint  {out}/checkpoints/step-2\n"
        f"Go on with a lower rate: eckart finetune --resume {out} train.lr=0.001\n"
    ), ran.err
    monkeypatch.setattr(fit.Interrupt, "on_step_end", told)
    assert eckart("finetune", "--resume", out, "train.lr=0.001").code == 0


def test_the_page_of_a_run_is_whole_in_itself(first_run, place):
    page = (place / "run" / "report.html").read_text()
    assert "Singular values of what was learned" in page
    assert "the model&#39;s context" in page or "the model's context" in page
    assert 'src="http' not in page and 'href="http' not in page


def test_a_distillation_of_a_model_that_changes_itself_keeps_a_teacher(place, tmp_path):
    words = ("method=dense", "objective=distill", "train.steps=3", "train.lr=1e-3")
    ran = eckart("finetune", place / "m", place / "d.jsonl", *words, "-o", tmp_path / "r")
    assert ran.code == 0, ran.err
    assert "teacher 0.128" in ran.err
    alone = eckart("finetune", place / "m", place / "d.jsonl", *words[:1], *words[2:], "--dry-run")
    assert "teacher" not in alone.err
