"""`eckart compress` and `eckart generate` as a person uses them."""

import json
import subprocess
import sys

import pytest
import torch

from eckart.io.models import load_model, load_tokenizer
from eckart.io.opening import open_model
from eckart.recipe import registry
from tests.journeys.runs import eckart
from tests.tiny import logits


@pytest.fixture(scope="module")
def compressed(place):
    return eckart("compress", place / "m", place / "d.jsonl", "keep=0.5", "-o", place / "small")


def test_compress_says_how_small_and_how_good(compressed, place):
    assert compressed.code == 0, compressed.err
    assert "14 of 14 matrices" in compressed.err
    facts = json.loads((place / "small" / "run.json").read_text())
    assert facts["eval"]["before"]["loss"] > 0 and facts["eval"]["after"]["loss"] > 0
    whole = sum(p.numel() for p in load_model(place / "m").parameters())
    assert facts["parameters"]["total"] < 0.9 * whole


def test_factored_folder_is_the_compressed_model(compressed, place):
    small = load_model(place / "small")
    kept = [n for n, _ in small.named_parameters() if "q_proj" in n]
    assert kept and all("factors" in n for n in kept)
    assert not torch.allclose(logits(small), logits(load_model(place / "m")), atol=1e-4)


def test_what_is_left_is_not_gone_on_with_but_told_what_is(compressed, place):
    run = eckart("finetune", place / "small", place / "d.jsonl")
    assert run.code == 2 and "a model of thin matrices cannot be fine-tuned\n" in run.err
    assert "heal.steps=300" in run.err and "--to dense" in run.err
    run = eckart("compress", place / "small", "keep=0.5")
    assert run.code == 2 and "made of thin matrices already" in run.err and "--to dense" in run.err


def test_without_eckart_transformers_refuses_the_folder(compressed, place):
    code = (
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "for cls in (AutoModelForCausalLM, LlamaForCausalLM):\n"
        f"    try: cls.from_pretrained({str(place / 'small' / 'final')!r})\n"
        "    except Exception as e: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["refused", "refused"], done.stdout + done.stderr


def test_healing_brings_the_loss_down(place):
    run = eckart(
        "compress", place / "m", place / "d.jsonl", "rank=2", "heal.steps=15",
        "heal.train.lr=1e-2", "-o", place / "is healed",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert f"next     eckart generate '{place}/is healed' -p" in run.out  # as a shell takes it
    scores = json.loads((place / "is healed" / "run.json").read_text())["eval"]
    assert scores["after"]["loss"] < scores["compressed"]["loss"] - 0.05
    reloaded = load_model(place / "is healed")
    assert any("factors" in n for n, _ in reloaded.named_parameters())


def test_healing_without_data_is_refused_before_anything_is_written(place):
    run = eckart("compress", place / "m", "heal.steps=5", "-o", place / "none")
    assert run.code == 2
    assert run.err.splitlines() == [
        "healing trains on text",
        "  heal.steps = 5  no DATA",
        "Type eckart compress MODEL DATA heal.steps=...",
    ]
    assert not (place / "none").exists()


def test_a_method_that_measures_asks_for_data_before_anything_is_loaded(place, monkeypatch):
    monkeypatch.setattr(registry.load("svd"), "needs", ("activations",))
    run = eckart("compress", place / "m")
    assert (run.code, run.err.splitlines()) == (
        2,
        [
            "svd measures activations on data",
            "  compress = svd  no DATA",
            f"Type eckart compress {place / 'm'} DATA method=svd",
        ],
    )


def test_a_size_that_saves_nothing_is_refused(place):
    run = eckart("compress", place / "m", "rank=30", "-o", place / "none")
    assert run.code == 2
    assert "no matrix would become smaller" in run.err and "  rank = 30" in run.err
    assert not (place / "none").exists()


def test_an_adapter_is_not_compressed(place):
    eckart("finetune", place / "m", place / "d.jsonl", "train.steps=2", "-o", place / "a")
    run = eckart("compress", place / "a" / "final", "-o", place / "none")
    assert run.code == 2 and "this is an adapter, not a model" in run.err
    assert "eckart convert" in run.err


def test_generate_goes_on_from_each_prompt(place):
    run = eckart("generate", place / "m", "-p", "abc", "-p", "xy", "-n", 5, "--json")
    assert run.code == 0, run.err
    texts = json.loads(run.out)["texts"]
    assert [t["prompt"] for t in texts] == ["abc", "xy"]
    model, tokenizer = open_model(place / "m").model, load_tokenizer(place / "m")
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    for _ in range(5):  # greedy, by hand
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert texts[0]["text"] == tokenizer.decode(ids[0, -5:], skip_special_tokens=True)


def test_sampling_depends_on_the_seed_alone(place):
    def text(*words):
        run = eckart("generate", place / "m", "-p", "abc", "-n", 8, "-t", 1.0, "--json", *words)
        return json.loads(run.out)["texts"][-1]["text"]

    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)


def test_generate_with_nothing_to_say_tells_what_to_type(place):
    run = eckart("generate", place / "m")
    assert run.code == 2
    assert "nothing to go on from" in run.err and "-p TEXT" in run.err
