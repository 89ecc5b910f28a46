"""`eckart estimate` as a person uses it: bytes and operations before anything is loaded."""

import json
import re

import pytest
import yaml

from eckart.io.corpora import bytes_tokenizer
from eckart.io.models import load_model
from eckart.jobs import proposals
from eckart.jobs.measuring.speed import HELD
from tests import tiny
from tests.journeys.adapters import adapter
from tests.journeys.runs import eckart, model_folder, workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("estimate"))
    adapter(folder / "adapter", folder / "m", "lora", rank=3)
    model_folder(folder / "shape")
    (folder / "shape" / "model.safetensors").unlink()
    (folder / "shape" / "tokenizer.json").unlink()
    tiny.gpt2(vocab_size=257).save_pretrained(folder / "gpt2")
    bytes_tokenizer().save_pretrained(folder / "gpt2")
    return folder


def test_a_configuration_is_all_that_is_read(place):
    ran = eckart("estimate", "finetune", place / "shape", "method=lora")
    assert ran.code == 0, ran.err
    assert [line.split()[0] for line in ran.err.splitlines()] == ["model", "method", "batch"]
    lines = ran.out.splitlines()
    named = [line[9:21].strip() for line in lines[:7]]
    parts = ["weights", "factors", "gradients", "state", "activations", "together", "at once"]
    assert named == parts and "   fits: " in lines[5]
    assert lines[7].startswith("work     ") and lines[7].endswith(" TFLOP a step")
    assert re.fullmatch(
        r"time     \S+ s a step \(\S+ to \S+\); by one layer on \d+ x \d+ tokens on this machine",
        lines[8],
    )
    assert lines[9].strip() == HELD


def test_few_rows_make_the_batch_that_a_training_takes(place, tmp_path):
    said = eckart("estimate", "finetune", place / "m", place / "d.jsonl", "--json").document
    ran = eckart("finetune", place / "m", place / "d.jsonl", "train.steps=1", "-o", tmp_path / "r")
    assert ran.code == 0, ran.err
    assert (
        said["estimated_memory_bytes"]
        == json.loads((tmp_path / "r" / "run.json").read_text())["estimated_memory_bytes"]
    )
    train = yaml.safe_load((tmp_path / "r" / "resolved.yaml").read_text())["train"]
    assert said["batch"]["rows"] == train["batch_size"] < 16  # as many as there would be of more
    alone = eckart("estimate", "finetune", place / "shape", place / "d.jsonl", "--json").document
    assert alone["batch"]["rows"] == 16, "no tokenizer to count by"


def test_the_time_is_work_over_a_measured_speed(place):
    words = ("method=lora", "data.seq_len=32", "train.accumulate=1")
    one, four = (
        eckart(
            "estimate", "finetune", place / "m", *words, f"train.batch_size={n}", "--json"
        ).document
        for n in (1, 4)
    )
    for found in (one, four):
        seconds, work = found["seconds"], found["flops"]["per_step"]
        fastest, slowest = seconds["interval"]
        assert 0 < fastest <= seconds["per_step"] <= slowest
        passes = work / seconds["flops_per_second"]
        assert seconds["per_step"] == pytest.approx(passes + seconds["optimizer"])
        held = sum(v for k, v in found["memory"].items() if k not in ("activations", "gradients"))
        assert found["peak_bytes"] > held + found["memory"]["activations"]
    assert four["flops"]["per_step"] == 4 * one["flops"]["per_step"]


def test_recipes_that_fit_are_proposed_with_the_reason(place, monkeypatch):
    words = ("finetune", place / "m", "data.seq_len=32", "train.batch_size=4", "train.accumulate=1")
    asked, fresh = (list(proposals.candidates(from_scratch=new)) for new in (False, True))
    adapters = {name for name, *_ in asked} - {name for name, *_ in fresh}
    assert "weights=lora" in adapters and ("weights=lowrank" in dict(c[:2] for c in fresh))
    assert len(asked) > 15 and len({name for name, *_ in asked}) == len(asked)
    few = [c for c in asked if c[0] in ("weights=lora", "weights=dense")]
    monkeypatch.setattr(proposals, "candidates", lambda **_: few)

    def found(size):
        return eckart("estimate", *words, "--fit", size, "--json").document

    best, second = found("1GB")["proposals"]
    assert (
        best["words"] == "weights=dense" and best["reason"] == "trains everything, 4 rows at once"
    )
    assert second["words"] == "weights=lora" and second["trainable"] < best["trainable"]
    tight = found(f"{best['bytes'] * 2 // 3}B")["proposals"][0]
    assert tight["rows"] < 4 and tight["bytes"] <= best["bytes"] * 2 // 3
    packed = (*words[:2], place / "d.jsonl", *words[2:], "precision=bf16")
    half = eckart("estimate", *packed, "--fit", "1GB", "--json").document
    alone = eckart("estimate", *packed, "weights=dense", "--json").document
    assert half["proposals"][0]["words"] == "weights=dense", "in fp32, under autocast"
    assert half["proposals"][0]["bytes"] == pytest.approx(alone["estimated_memory_bytes"], rel=1e-3)
    none = eckart("estimate", *words, "--fit", "1kB")
    assert none.code == 4 and none.err.startswith("no recipe fits\n")
    assert eckart("estimate", *words, "--fit", "lots").err.startswith("cannot read lots as a size")


@pytest.mark.parametrize(
    ("model", "method", "sine"),
    [
        ("m", ("method=lora",), 1024),
        ("m", ("weights=dense", "precision=bf16"), 1024),  # under autocast
        ("m", ("update=galore", "train.layerwise=true"), 1024),
        ("gpt2", ("method=lora",), 0),
    ],
)
def test_what_is_estimated_is_what_a_training_takes(place, tmp_path, model, method, sine):
    """Rows of the full length: then activations agree too, but for the rotations of positions,
    which rows of data bring for each of them (a sine and a cosine of so many bytes, here)."""
    file = tmp_path / "long.jsonl"
    text = ("low rank is enough for most of what a model learns " * 2)[:95]
    row = json.dumps({"text": text})  # and the end: three rows, none of which is packed
    file.write_text((row + "\n") * 40)
    words = (*method, "train.batch_size=4", "train.steps=2", "data.seq_len=32")
    ran = eckart("finetune", place / model, file, *words, "-o", tmp_path / "r", "--json")
    found = eckart("estimate", "finetune", place / model, *words, "--json").document
    said, known = found["memory"], ran.document["memory"]["estimated"]
    assert known["activations"] - said.pop("activations") == (4 - 1) * 2 * sine
    assert said == {name: known[name] for name in said}
    measured = ran.document["memory"]["measured"]
    assert measured.pop("activations") == pytest.approx(known["activations"], rel=1e-4)  # a label
    assert measured == {name: known[name] for name in measured}
    assert found["parameters"]["trainable"] == ran.document["parameters"]["trainable"]
    assert found["parameters"]["by_role"] == ran.document["parameters"]["by_role"]
    assert found["batch"] == {"rows": 4, "accumulate": 1, "seq_len": 32}


def test_a_mask_between_texts_is_estimated_where_the_first_row_needs_none(place, tmp_path):
    row = json.dumps({"text": "low rank is enough for most of what a model learns " * 3})
    (tmp_path / "long.jsonl").write_text((row + "\n") * 40)  # 48, 48, 48 and 10 tokens
    words = ("finetune", place / "m", tmp_path / "long.jsonl", "train.steps=1")
    ran = eckart(*words, "-o", tmp_path / "r", "--json").document["memory"]
    known, measured = (ran[kind]["activations"] for kind in ("estimated", "measured"))
    assert measured == pytest.approx(known, rel=1e-4)
    said = eckart("estimate", *words, "--json").document["memory"]
    assert said["activations"] == pytest.approx(known, rel=0.01)  # sines, as above


def test_padded_rows_are_as_long_as_the_data_has_them(place, tmp_path):
    rows = [{"text": "a film " * (2 + i % 5), "label": i % 2} for i in range(40)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("finetune", place / "m", tmp_path / "labelled.jsonl", "train.batch_size=4")
    found = eckart("estimate", *words, "--json").document
    planned = eckart(*words, "--dry-run", "--json").document
    assert 10 < found["batch"]["seq_len"] < 60  # of 512 that the model reads
    assert found["estimated_memory_bytes"] == planned["estimated_memory_bytes"]


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
        "train.checkpointing=true",
        "train.batch_size=4 train.accumulate=2",
        "data.seq_len=24",
    ], "what a training that ran out of memory says"


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
