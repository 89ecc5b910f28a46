"""`eckart estimate` as a person uses it: bytes and operations before anything is loaded."""

import json

import pytest

from eckart.io.models import load_model
from tests.journeys.adapters import adapter
from tests.journeys.runs import eckart, model_folder, texts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimate")
    model_folder(folder / "m")
    texts(folder / "d.jsonl")
    adapter(folder / "adapter", folder / "m", "lora", rank=3)
    model_folder(folder / "shape")
    (folder / "shape" / "model.safetensors").unlink()
    (folder / "shape" / "tokenizer.json").unlink()
    return folder


def test_a_configuration_is_all_that_is_read(place):
    ran = eckart("estimate", "finetune", place / "shape", "method=lora")
    assert ran.code == 0, ran.err
    assert [line.split()[0] for line in ran.err.splitlines()] == ["model", "method", "batch"]
    lines = ran.out.splitlines()
    named = [line[9:21].strip() for line in lines[:6]]
    parts = ["weights", "factors", "gradients", "state", "activations", "together"]
    assert named == parts and "   fits: " in lines[5]
    assert lines[6].startswith("work     ") and lines[6].endswith(" TFLOP a step")


def test_what_is_estimated_is_what_a_training_takes(place, tmp_path):
    """Rows of the full length: then activations agree too."""
    file = tmp_path / "long.jsonl"
    row = json.dumps({"text": "low rank is enough for most of what a model learns " * 2})
    file.write_text((row + "\n") * 40)
    words = ("method=lora", "train.batch_size=4", "train.steps=2", "data.seq_len=32")
    ran = eckart("finetune", place / "m", file, *words, "-o", tmp_path / "r", "--json")
    found = eckart("estimate", "finetune", place / "m", *words, "--json").document
    assert found["estimated_memory_bytes"] == ran.document["estimated_memory_bytes"]
    assert found["parameters"]["trainable"] == ran.document["parameters"]["trainable"]
    assert found["parameters"]["by_role"] == ran.document["parameters"]["by_role"]
    assert found["batch"] == {"rows": 4, "accumulate": 1, "seq_len": 32}


def test_an_adapter_is_estimated_by_its_own_method(place):
    found = eckart("estimate", "finetune", place / "adapter", "--json").document
    assert found["recipe"]["weights"]["name"] == "lora"
    assert found["parameters"]["trainable"] == 14848 * 3 // 16


def test_a_preset_is_estimated_without_data(place):
    found = eckart("estimate", "pretrain", "llama-60m", "method=galore", "--json").document
    memory = found["memory"]
    assert memory["weights"] == pytest.approx(4 * found["parameters"]["total"], rel=1e-3)
    assert memory["gradients"] == 4 * found["parameters"]["trainable"]
    adamw = eckart("estimate", "pretrain", "llama-60m", "--json").document["memory"]
    assert adamw["state"] == 2 * adamw["gradients"] and memory["state"] < 0.75 * adamw["state"]
    assert found["flops"]["per_step"] > 0


def test_what_does_not_fit_is_said_with_what_would_help(place, monkeypatch):
    monkeypatch.setattr("eckart.jobs.estimate.room", lambda place: (400_000, 500_000))
    words = ("weights=dense", "train.batch_size=8", "train.accumulate=1")
    ran = eckart("estimate", "finetune", place / "m", *words)
    assert ran.code == 0 and "does NOT fit: 0.4 MB free of 0.5 MB" in ran.out
    tried = ran.out[ran.out.index("try") :].splitlines()
    assert [line[9:].split("   saves ")[0] for line in tried] == [
        "train.batch_size=1 train.accumulate=8",
        "train.checkpointing=true",
        "weights=lora",
    ]


def test_a_compression_is_as_small_as_it_is_said_to_be(place, tmp_path):
    words = (place / "m", "rank=4")
    found = eckart("estimate", "compress", *words, "--json").document
    ran = eckart("compress", *words, "-o", tmp_path / "c")
    assert ran.code == 0, ran.err
    model = load_model(tmp_path / "c" / "final")
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    assert found["memory"]["after"] == held < found["memory"]["before"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (
            ("finetune",),
            2,
            "eckart estimate needs a model\nType eckart estimate finetune MODEL key=value\n",
        ),
        (
            ("generate", "m"),
            2,
            "eckart estimate does not know generate\nChoices: finetune, pretrain, compress.\n",
        ),
        (
            ("finetune", "m", "weights.rnak=2"),
            2,
            "unknown key weights.rnak     command line\n"
            "Did you mean weights.rank? All keys: eckart methods lora\n",
        ),
        (("finetune", "./mm"), 3, "no such file or folder\n  mm\nDid you mean m?\n"),
    ],
)
def test_what_cannot_be_estimated_is_said(place, monkeypatch, words, code, text):
    monkeypatch.chdir(place)
    ran = eckart("estimate", *words)
    assert (ran.code, ran.out, ran.err) == (code, "", text)
