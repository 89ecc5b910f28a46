"""An adapter saved by eckart comes back the same, on its own base and on no other."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.tiny import attached
from transformers import LlamaConfig, LlamaForCausalLM

import eckart
from eckart.errors import FileError, UsageError
from eckart.io import native
from eckart.linear import Structured

GOLDEN = Path(__file__).parent / "golden" / "native_1"
METHODS = {
    "lora": eckart.LoRA(rank=4, overrides=({"match": "attn", "rank": 2},)),
    "pissa": eckart.LoRA(rank=4, init="pissa"),
    "dora": eckart.DoRA(rank=4),
    "dense": eckart.Dense(),
    "lowrank": eckart.LowRank(share=0.5),
}


@pytest.fixture
def saved(tmp_path):
    """A LoRA of the tiny Llama, on disk."""
    native.save(attached(tiny.llama(), METHODS["lora"]), tmp_path / "a")
    return tmp_path / "a"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder, model=None):
    """The text of the error, after checking that the model was left as it was."""
    model = model or tiny.llama()
    before, names = tiny.logits(model), set(model.state_dict())
    with pytest.raises(FileError) as fault:
        native.load(model, folder)
    assert set(model.state_dict()) == names and torch.equal(tiny.logits(model), before)
    assert not any(isinstance(m, Structured) for m in model.modules())
    assert type(model.config) is LlamaConfig
    return str(fault.value)


@pytest.mark.parametrize("kind", tiny.MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_gives_the_same_logits_bit_for_bit(kind, method, tmp_path):
    handle = attached(tiny.MODELS[kind](), METHODS[method])
    native.save(handle, tmp_path / "a")
    model = tiny.MODELS[kind]()
    base = tiny.logits(model)
    again = native.load(model, tmp_path / "a")
    assert torch.equal(tiny.logits(model), tiny.logits(handle.model))
    assert not torch.allclose(tiny.logits(model), base, atol=1e-2)
    assert set(again.trainable()) == set(handle.trainable())
    assert again.structure() == handle.structure()


def test_a_new_head_travels_with_the_adapter(tmp_path):
    method = eckart.LoRA(rank=2)
    handle = attached(tiny.bert(), method, also_train=("classifier",))
    native.save(handle, tmp_path / "a")
    assert {"classifier.weight", "classifier.bias"} <= set(
        load_file(tmp_path / "a/model.safetensors")
    )
    model = tiny.bert()
    native.load(model, tmp_path / "a")
    assert torch.equal(tiny.logits(model), tiny.logits(handle.model))


def test_two_saves_are_the_same_bytes(tmp_path):
    handle = attached(tiny.llama(), METHODS["dora"])
    native.save(handle, tmp_path / "a")
    native.save(handle, tmp_path / "b")
    native.save(native.load(tiny.llama(), tmp_path / "a"), tmp_path / "c")
    for name in (native.DESCRIPTION, native.TENSORS):
        first = (tmp_path / "a" / name).read_bytes()
        assert (tmp_path / "b" / name).read_bytes() == first
        assert (tmp_path / "c" / name).read_bytes() == first


def test_only_what_differs_from_the_base_is_written(saved):
    names = set(load_file(saved / "model.safetensors"))
    assert names and all(name.rsplit(".", 2)[1] == "lora" for name in names)
    assert {p.name for p in saved.iterdir()} == {"eckart.json", "model.safetensors"}


def test_a_folder_in_use_is_not_written_over(saved):
    handle = attached(tiny.llama(), METHODS["lora"])
    with pytest.raises(UsageError, match="not empty"):
        native.save(handle, saved)
    native.save(handle, saved, overwrite=True)


def test_the_loaded_adapter_trains_on(saved):
    model = tiny.llama()
    handle = native.load(model, saved)
    optimizer = handle.optimizer(lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tiny.ids(), labels=tiny.ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_remove_after_loading_gives_the_base_back(saved):
    model = tiny.llama()
    before = tiny.logits(model)
    native.load(model, saved).remove()
    assert torch.equal(tiny.logits(model), before)


# --- what is refused -----------------------------------------------------------------------


def test_another_base_is_refused(saved):
    text = refused(saved, tiny.llama(seed=1))
    assert text.startswith("this adapter was made for another base")


def test_a_base_of_another_dtype_is_the_same_base(saved):
    native.load(tiny.llama().to(torch.bfloat16), saved)


@pytest.mark.parametrize("kept", [True, False])
def test_a_missing_tensor_is_named(tmp_path, kept):
    method = METHODS["lora" if kept else "lowrank"]
    native.save(attached(tiny.llama(), method), tmp_path / "a")
    name = sorted(n for n in load_file(tmp_path / "a/model.safetensors") if n.endswith(".B"))[0]
    edit(tmp_path / "a", lambda t: t.pop(name))
    assert f"{name}  is missing" in refused(tmp_path / "a")


def test_a_tensor_without_a_place_is_named(saved):
    edit(saved, lambda t: t.update({"model.layers.9.lora.A": torch.zeros(2)}))
    assert "model.layers.9.lora.A  has no place" in refused(saved)


def test_a_misshapen_tensor_is_named(saved):
    name = "model.layers.0.self_attn.q_proj.lora.A"
    edit(saved, lambda t: t.update({name: torch.zeros(2, 31)}))
    assert f"{name}  shape (2, 31), expected (2, 32)" in refused(saved)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_damaged_file_is_refused(saved, size):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:size])
    assert "model.safetensors" in refused(saved)


def test_a_pickle_is_not_read(saved):
    (saved / "model.safetensors").unlink()
    (saved / "model.bin").write_bytes(pickle.dumps({}))
    assert "can run code" in refused(saved)


def test_a_later_format_is_refused(saved):
    content = json.loads((saved / "eckart.json").read_text())
    (saved / "eckart.json").write_text(json.dumps({**content, "format": 2}))
    assert refused(saved) == (
        "unknown format version\n"
        f"  {saved / 'eckart.json'}  format 2; this eckart reads 1\n"
        "Update eckart: pip install -U eckart."
    )


def test_a_description_that_is_not_json_is_refused(saved):
    (saved / "eckart.json").write_text('{"format": 1,')
    assert "this is not JSON" in refused(saved)


def changes(content, path=()):
    """Every way to drop one entry of a nested description, or to put another kind in its place."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield (*path, key), None
            yield (*path, key), "x"
            yield from changes(value, (*path, key))


def changed(content, path, value):
    content = json.loads(json.dumps(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


def test_no_damage_to_the_description_shows_a_traceback_or_leaves_half_an_adapter(tmp_path):
    shape = {"num_hidden_layers": 1, "intermediate_size": 32}
    model = tiny.llama(**shape)
    native.save(
        attached(tiny.llama(**shape), eckart.LoRA(rank=2, targets=("attn.q",))), tmp_path / "a"
    )
    file = tmp_path / "a" / "eckart.json"
    content, names = json.loads(file.read_text()), set(model.state_dict())
    count = 0
    for path, value in changes(content):
        file.write_text(json.dumps(changed(content, path, value)))
        try:
            native.load(model, tmp_path / "a").remove()
        except FileError:
            count += 1
        assert set(model.state_dict()) == names, path
        assert all(p.requires_grad for p in model.parameters()), path
    assert count > 40  # the rest is harmless: versions, help texts, a base's name


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    assert "holds no eckart adapter" in refused(tmp_path)


# --- files of earlier versions -------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "lowrank"])
def test_files_of_format_1_are_read_for_ever(name):
    expected = load_file(GOLDEN / "expected.safetensors")
    model = LlamaForCausalLM.from_pretrained(GOLDEN / "base")
    native.load(model, GOLDEN / name)
    # fp32 logits of a one-layer model; another BLAS may add in another order
    torch.testing.assert_close(
        tiny.logits(model, expected["tokens"]), expected[name], rtol=1e-5, atol=1e-6
    )
