"""Models are recognised, checked before they are read, and built from names alone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from eckart.errors import FileError, UsageError
from eckart.io.models import (
    build_model,
    config_of,
    load_model,
    load_tokenizer,
    recognise,
)
from eckart.io.presets import PRESETS
from eckart.recipe.fingerprint import fingerprint


def small(kind="llama-tiny", **shape):
    config = config_of(kind, 64)
    config.num_hidden_layers = shape.pop("layers", 2)
    for key, value in shape.items():
        setattr(config, key, value)
    return config


@pytest.fixture
def saved(tmp_path):
    build_model(small(), seed=3).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_tiny_llama_has_the_size_it_is_known_by():
    assert build_model("llama-tiny").num_parameters() == 2_164_416


@pytest.mark.parametrize(
    "name, million", [("llama-60m", 58), ("llama-130m", 134), ("llama-350m", 368)]
)
def test_presets_have_the_sizes_of_the_galore_paper(name, million):
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        count = AutoModelForCausalLM.from_config(config_of(name)).num_parameters()
    assert round(count / 1e6) == million


def test_every_preset_builds_a_model():
    for name in set(PRESETS) - {"llama-60m", "llama-130m", "llama-350m", "llama-1b", "gpt2"}:
        assert build_model(name, vocab=32)


@pytest.mark.parametrize("kind", ["llama-tiny", "gpt2"])
def test_initial_values_depend_on_seed_and_name_alone(kind):
    torch.manual_seed(11)
    one = build_model(small(kind), seed=1).state_dict()
    torch.manual_seed(12)
    before = torch.get_rng_state()
    deeper = build_model(small(kind, layers=4), seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    other = build_model(small(kind), seed=2).state_dict()
    # GPT-2 scales its projections by the number of layers: the one value that depends on depth
    assert all(torch.equal(one[name], deeper[name]) for name in one if "c_proj" not in name)
    random = [name for name in one if one[name].float().std() > 0]
    assert random and not any(torch.equal(one[name], other[name]) for name in random)
    layers = [(name, name.replace(".0.", ".1.")) for name in random if ".0." in name]
    assert layers and not any(torch.equal(one[a], one[b]) for a, b in layers)


def test_gpt2_projections_keep_their_smaller_spread():
    model = build_model(small("gpt2", layers=8), seed=1)
    block = model.transformer.h[3]
    # 0.02 / sqrt(2 * 8 layers) = 0.005, from 768 x 768 draws: 0.1 % off at most
    assert block.attn.c_proj.weight.std().item() == pytest.approx(0.005, rel=0.01)
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_a_saved_model_comes_back_bit_for_bit_in_its_dtype(tmp_path):
    model = build_model(small(), seed=3, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "m")
    again = load_model(tmp_path / "m")
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in pairs)
    assert load_model(tmp_path / "m", dtype=torch.float32).dtype == torch.float32


def test_a_model_remembers_the_name_an_adapter_will_call_its_base(saved, monkeypatch):
    assert load_model(saved).config._name_or_path == str(saved)
    monkeypatch.setattr("eckart.io.models.download", lambda name: saved)
    assert load_model("owner/name@main").config._name_or_path == "owner/name"


def test_a_mistyped_path_names_its_neighbour(saved, tmp_path):
    with pytest.raises(FileError) as error:
        load_model(tmp_path / "n")
    assert error.value.text() == (f"no such file or folder\n  {tmp_path / 'n'}\nIn {tmp_path}: m.")
    (tmp_path / "models").mkdir()
    with pytest.raises(FileError, match="Did you mean models"):
        recognise(tmp_path / "modles" / "a")


def test_a_name_below_an_existing_folder_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(FileError, match="no such file"):
        recognise("models/llama")
    assert recognise("meta/llama").kind == "hub"
    assert recognise("llama-tiny").kind == "preset"


def test_offline_a_hub_name_is_an_error_in_words():
    with pytest.raises(FileError, match="HF_HUB_OFFLINE is set"):
        load_model("nobody/nothing-of-this-name")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_by_name(saved, name):
    (saved / "model.safetensors").rename(saved / name)
    with pytest.raises(FileError, match=name):
        load_model(saved)
    with pytest.raises(FileError, match="can run code"):
        recognise(saved / name)


def test_a_model_without_weights_says_how_to_start_from_random_ones(saved):
    (saved / "model.safetensors").unlink()
    assert recognise(saved).kind == "config"
    with pytest.raises(FileError, match="eckart pretrain"):
        load_model(saved)


def test_a_cut_off_file_names_the_tensors_it_lacks(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - 1000])
    with pytest.raises(FileError, match="ends before its tensors do") as error:
        load_model(saved)
    assert "model.safetensors" in str(error.value) and "cut off" in str(error.value)
    for damage in (b"", b"\0" * 64, whole[:20]):
        file.write_bytes(damage)
        with pytest.raises(FileError, match="not a safetensors file"):
            load_model(saved)


def test_missing_extra_and_misshapen_tensors_are_named(saved):
    def change(tensors):
        tensors["model.norm.weight"] = torch.ones(3)
        tensors["model.extra"] = torch.ones(3)
        del tensors["model.layers.0.mlp.up_proj.weight"]

    edit(saved, change)
    with pytest.raises(FileError, match="do not fit LlamaForCausalLM") as error:
        load_model(saved)
    for words in ("up_proj.weight  ", "model.extra  ", "[3] in the file, [192] in the model"):
        assert words in str(error.value)


def test_a_missing_shard_is_named(saved, tmp_path):
    model = load_model(saved)
    model.save_pretrained(tmp_path / "s", max_shard_size="1MB")
    shards = sorted((tmp_path / "s").glob("*.safetensors"))
    assert len(shards) > 1
    load_model(tmp_path / "s")
    shards[1].unlink()
    with pytest.raises(FileError, match=shards[1].name):
        load_model(tmp_path / "s")


def test_only_a_classification_head_may_be_missing_and_it_has_its_seed(tmp_path):
    build_model("bert-tiny", 64, seed=1, task="masked").save_pretrained(tmp_path / "b")
    heads = [
        load_model(tmp_path / "b", task="classification", seed=s, num_labels=3).classifier.weight
        for s in (5, 5, 6)
    ]
    assert heads[0].shape == (3, 128)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert load_model(tmp_path / "b", task="encoder")
    edit(tmp_path / "b", lambda t: t.pop("bert.encoder.layer.1.output.dense.weight"))
    with pytest.raises(FileError, match=r"layer\.1\.output\.dense\.weight"):
        load_model(tmp_path / "b", task="classification")


def test_malformed_config_names_file_and_line(saved):
    (saved / "config.json").write_text('{"model_type": "llama",\n oops}')
    with pytest.raises(FileError, match="line 2"):
        load_model(saved)


def test_adapters_and_runs_are_recognised(saved, tmp_path):
    def folder(name, file, content):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(content))
        return tmp_path / name

    peft = folder("p", "adapter_config.json", {"base_model_name_or_path": str(saved)})
    assert recognise(peft).kind == "peft" and recognise(peft).base == str(saved)
    assert recognise(folder("e", "eckart.json", {"base": str(saved)})).kind == "native"
    away = folder("runs", "adapter_config.json", {"base_model_name_or_path": saved.name})
    assert recognise(away).base == str(saved)  # trained in the folder above, opened from another
    assert recognise(folder("r", "run.json", {})).kind == "run"
    assert recognise(folder("f", "config.json", {"model_type": "eckart"})).kind == "factored"
    assert recognise(saved).kind == "model"
    with pytest.raises(UsageError, match="an adapter, not a model"):
        load_model(peft)
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileError, match="holds no model"):
        recognise(tmp_path / "photos")


def test_fingerprint_ignores_dtype_and_spelling_and_sees_values(saved, tmp_path):
    model = load_model(saved)
    name = fingerprint(model)
    assert fingerprint(load_model(saved, dtype=torch.bfloat16)) == name
    edit(saved, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert fingerprint(load_model(saved)) == name
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    assert fingerprint(model) != name
    assert fingerprint(build_model(small(), seed=4)) != name


def test_no_tokenizer_is_said(saved):
    with pytest.raises(FileError, match="has no tokenizer"):
        load_tokenizer(saved)
