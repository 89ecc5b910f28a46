"""Files that are whole and say nonsense: refused in words, each naming its file."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import randomise, tiny

from eckart.errors import EckartError
from eckart.io import kohya, native, peft
from eckart.io.corpora import bytes_tokenizer
from eckart.io.export import load
from eckart.io.headers import format_errors
from eckart.io.models import load_model
from eckart.io.text import read
from eckart.methods.weights.lora import LoRA
from eckart.recipe import Recipe, attach

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One model and one adapter of it in three forms."""
    root = tmp_path_factory.mktemp("saved")
    tiny("llama").save_pretrained(root / "model")
    handle = attach(tiny("llama"), Recipe(weights=LoRA(rank=2, targets=("attn.q",))))
    randomise(handle)
    for form, module in (("native", native), ("peft", peft), ("kohya", kohya)):
        module.save(handle, root / form)
    return root


def entry(name, **values):
    """A change of a JSON file's content below a key, or of all of it."""

    def change(folder, file):
        content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (content[name] if name else content).update(values)
        (folder / file).write_text(json.dumps(content))

    return change


def first_tensor(**values):
    """A change of what a safetensors header says of its first tensor."""

    def change(folder, file):
        data = (folder / file).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        header[next(name for name in header if name != "__metadata__")].update(values)
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return change


def tensor(suffix, value):
    """Another tensor in the place of the first of its kind."""

    def change(folder, file):
        tensors = load_file(folder / file)
        stem = min(tensors).partition(".")[0]
        save_file({**tensors, f"{stem}.{suffix}": value}, folder / file)

    return change


ADAPTER, HEADER = "adapter_config.json", "model.safetensors"
CASES = {
    "offsets": ("model", HEADER, first_tensor(data_offsets=[])),
    "a list of shards": ("model", INDEX, entry("", weight_map=[])),
    "a number for a shard": ("model", INDEX, entry("", weight_map={"a": 5})),
    "no fingerprint": ("native", "eckart.json", entry("", fingerprint=None)),
    "a word for rows": ("native", "eckart.json", entry("structure", vocabulary="x")),
    "no alpha": ("peft", ADAPTER, entry("", lora_alpha=None)),
    "a word for dropout": ("peft", ADAPTER, entry("", lora_dropout="x")),
    "a number for targets": ("peft", ADAPTER, entry("", target_modules=5)),
    "half an expression": ("peft", ADAPTER, entry("", target_modules="(")),
    "a list of ranks": ("peft", ADAPTER, entry("", rank_pattern=[1])),
    "two alphas": ("kohya", kohya.TENSORS, tensor(kohya.ALPHA, torch.ones(2))),
    "a vector for a factor": ("kohya", kohya.TENSORS, tensor(kohya.DOWN, torch.ones(2))),
    "whole numbers": ("kohya", kohya.TENSORS, tensor(kohya.DOWN, torch.ones(2, 32).int())),
}


@pytest.mark.parametrize("what", CASES)
def test_files_that_say_nonsense_are_named(what, saved, tmp_path):
    kind, file, change = CASES[what]
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    change(folder, file)
    with pytest.raises(EckartError) as refusal:
        load_model(folder) if kind == "model" else load(folder, tiny("llama"))
    assert str(folder) in str(refusal.value)


ROWS = {
    "labels do not fit input_ids": {"input_ids": [1, 2], "labels": 5},
    "a row is not valid Unicode": {"text": "\ud800 half"},
}


@pytest.mark.parametrize("what", ROWS)
def test_rows_that_say_nonsense_are_named(what, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[what]))
    with pytest.raises(EckartError, match=what) as refusal:
        read(str(path), bytes_tokenizer(), 16, cache=False)
    assert "rows.jsonl, line 1" in str(refusal.value)


@pytest.mark.parametrize("field", [{"weight": float("nan")}, {"name": 5}, {"encoding": 5}])
def test_a_data_entry_that_says_nonsense_is_refused(field, tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("some text\n" * 9)
    with pytest.raises(EckartError, match=f"data.* {next(iter(field))} is not"):
        read({"path": str(path), **field}, bytes_tokenizer(), 16, cache=False)


def test_memory_that_runs_out_while_reading_is_no_fault_of_the_file(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), format_errors(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="can't allocate"), format_errors(tmp_path):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")
