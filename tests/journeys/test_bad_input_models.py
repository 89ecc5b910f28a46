"""Models and adapters that are incomplete, damaged or for another base: named, never guessed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.journeys.adapters import adapter
from tests.journeys.bad import complains, enter
from tests.journeys.runs import model_folder, workplace

AGAIN = "Download or copy it again.\n"
PICKLE = (
    "weights in this format can run code and are not read\n"
    "  {}  pickle\n"
    "Save the model as safetensors: model.save_pretrained(folder).\n"
)


def changed(folder, name, change):
    """Write a folder's tensors after `change` of the dict."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def cut(folder, name):
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[: len(raw) // 2])


def damage_models(place):
    """A copy of the model for each thing that can be wrong with it."""

    def copy(name):
        return shutil.copytree(place / "m", place / name)

    weights = "model.safetensors"
    (copy("shape") / weights).unlink()
    (copy("pickled") / weights).rename(place / "pickled" / "pytorch_model.bin")
    (copy("no-config") / "config.json").unlink()
    (copy("torn-config") / "config.json").write_text('{"model_type": "llama",')
    for file in copy("no-tokenizer").glob("*token*"):
        file.unlink()
    (copy("torn-tokenizer") / "tokenizer.json").write_text('{"a":')
    (copy("empty") / weights).write_bytes(b"")
    (copy("garbage") / weights).write_bytes(b"\x07" * 100)
    cut(copy("cut"), weights)
    changed(copy("lost"), weights, lambda t: t.pop("lm_head.weight"))
    changed(copy("extra"), weights, lambda t: t.update({"model.x.weight": torch.ones(2)}))
    changed(copy("misshapen"), weights, lambda t: t.update({"lm_head.weight": torch.ones(3, 3)}))
    names = dict.fromkeys(load_file(place / "m" / weights), "model-1.safetensors")
    (copy("sharded") / weights).unlink()
    (place / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": names})
    )
    (place / "nothing").mkdir()


MODELS = {
    "missing folder": (
        "finetune ./mm d.jsonl",
        3,
        "no such file or folder\n  mm\nDid you mean m?\n",
    ),
    "no hub model without a network": (
        "finetune nosuch d.jsonl",
        3,
        "this is no path here, and the hub cannot be reached\n"
        "  nosuch  HF_HUB_OFFLINE is set\n"
        "Type a path such as ./model.\n",
    ),
    "mistyped preset": (
        "pretrain llama-tinny d.jsonl",
        3,
        "this is no path here, and the hub cannot be reached\n"
        "  llama-tinny  HF_HUB_OFFLINE is set\n"
        "Did you mean llama-tiny?\n",
    ),
    "a folder without a model": (
        "finetune nothing d.jsonl",
        3,
        "this folder holds no model\n"
        "  nothing  no config.json, adapter_config.json, eckart.json or run.json\n"
        "Type the folder that has one of them.\n",
    ),
    "model without weights": (
        "finetune shape d.jsonl",
        3,
        "this is a shape without weights\n"
        "  shape  config\n"
        "Start from random weights: eckart pretrain shape DATA\n",
    ),
    "a preset has no weights": (
        "generate llama-tiny -p x",
        2,
        "this is a shape without weights\n"
        "  llama-tiny  preset\n"
        "Start from random weights: eckart pretrain llama-tiny DATA\n",
    ),
    "pickled weights": (
        "finetune pickled d.jsonl",
        3,
        PICKLE.format("pickled/pytorch_model.bin"),
    ),
    "a pickle by its name": (
        "finetune pickled/pytorch_model.bin d.jsonl",
        3,
        PICKLE.format("pickled/pytorch_model.bin"),
    ),
    "no config": (
        "finetune no-config d.jsonl",
        3,
        "this folder holds no model\n"
        "  no-config  no config.json, adapter_config.json, eckart.json or run.json\n"
        "Type the folder that has one of them.\n",
    ),
    "malformed config": (
        "finetune torn-config d.jsonl",
        3,
        "this is not JSON\n"
        "  torn-config/config.json  line 1: Expecting property name enclosed in double quotes: "
        "line 1 column 24 (char 23)\n",
    ),
    "no tokenizer": (
        "finetune no-tokenizer d.jsonl",
        3,
        "the model has no tokenizer\n  no-tokenizer  no tokenizer.json\n",
    ),
    "malformed tokenizer": (
        "finetune torn-tokenizer d.jsonl",
        3,
        "the tokenizer cannot be read\n"
        "  torn-tokenizer  Expecting value: line 1 column 6 (char 5)\n",
    ),
    "empty safetensors": (
        "finetune empty d.jsonl",
        3,
        "this is not a safetensors file\n  empty/model.safetensors  empty file\n",
    ),
    "corrupt safetensors": (
        "finetune garbage d.jsonl",
        3,
        "this is not a safetensors file\n  garbage/model.safetensors  header damaged or cut off\n",
    ),
    "truncated safetensors": (
        "finetune cut d.jsonl",
        3,
        "the file ends before its tensors do\n"
        "  cut/model.safetensors                  64,996 of 129,992 bytes\n"
        "  model.embed_tokens.weight              cut off\n"
        "  model.layers.0.input_layernorm.weight  cut off\n"
        "  model.layers.0.mlp.down_proj.weight    cut off\n"
        "  model.layers.0.mlp.gate_proj.weight    cut off\n"
        "  model.layers.0.mlp.up_proj.weight      cut off\n"
        "  and 15 more                            cut off\n" + AGAIN,
    ),
    "missing shard": (
        "finetune sharded d.jsonl",
        3,
        "a file of the model is missing\n  sharded/model-1.safetensors  named in its index\n",
    ),
    "missing tensor": (
        "finetune lost d.jsonl",
        3,
        "the weights do not fit LlamaForCausalLM\n  lost\n  lm_head.weight  missing\n",
    ),
    "tensor too many": (
        "finetune extra d.jsonl",
        3,
        "the weights do not fit LlamaForCausalLM\n"
        "  extra\n"
        "  model.x.weight  not part of this architecture\n",
    ),
    "misshapen tensor": (
        "finetune misshapen d.jsonl",
        3,
        "the weights do not fit LlamaForCausalLM\n"
        "  misshapen\n"
        "  lm_head.weight  [3, 3] in the file, [257, 32] in the model\n",
    ),
}


def damage_adapters(place):
    """A copy of the adapter, in both forms, for each thing that can be wrong with it."""
    for form, weights, description in (
        ("native", "model.safetensors", "eckart.json"),
        ("peft", "adapter_model.safetensors", "adapter_config.json"),
    ):
        whole = adapter(place / form, Path("m"), "lora", form, rank=2)

        def copy(name, whole=whole):
            return shutil.copytree(whole, whole.with_name(f"{whole.name}-{name}"))

        def described(folder, description=description, **facts):
            content = json.loads((folder / description).read_text())
            (folder / description).write_text(json.dumps({**content, **facts}))

        first = min(load_file(whole / weights))
        other = "base_model.model.model.x.lora_A.weight" if form == "peft" else "model.x"
        changed(copy("lost"), weights, lambda t, first=first: t.pop(first))
        changed(copy("extra"), weights, lambda t, o=other: t.update({o: torch.ones(2, 2)}))
        changed(copy("misshapen"), weights, lambda t, f=first: t.update({f: torch.ones(3, 3)}))
        cut(copy("cut"), weights)
        (copy("gone") / weights).unlink()
        pickled = copy("pickled")
        (pickled / weights).rename(pickled / "adapter_model.bin")
        (copy("torn") / description).write_text('{"r": 2,')
        key = "base" if form == "native" else "base_model_name_or_path"
        described(copy("moved"), **{key: "./gone"})
        described(copy("other"), **{key: f"other-{form}"})
        described(copy("later"), format=9, peft_type="IA3")
    model_folder(place / "other-native", seed=5)
    model_folder(place / "other-peft", hidden_size=64)


A, B = "model.layers.0.self_attn.{}_proj.lora_A", "model.layers.0.self_attn.{}_proj.lora_B"
ADAPTERS = {
    "native: missing tensor": (
        "generate native-lost -p x",
        3,
        "the saved tensors do not fit the model\n"
        "  model.layers.0.mlp.down_proj.lora.A  is missing\n",
    ),
    "native: tensor too many": (
        "generate native-extra -p x",
        3,
        "the saved tensors do not fit the model\n  model.x  has no place\n",
    ),
    "native: misshapen tensor": (
        "generate native-misshapen -p x",
        3,
        "the saved tensors do not fit the model\n"
        "  model.layers.0.mlp.down_proj.lora.A  shape (3, 3), expected (2, 48)\n",
    ),
    "native: truncated": (
        "generate native-cut -p x",
        3,
        "the file ends before its tensors do\n"
        "  native-cut/model.safetensors            5,092 of 10,184 bytes\n"
        "  model.layers.0.self_attn.o_proj.lora.A  cut off\n"
        "  model.layers.0.self_attn.o_proj.lora.B  cut off\n"
        "  model.layers.0.self_attn.q_proj.lora.A  cut off\n"
        "  model.layers.0.self_attn.q_proj.lora.B  cut off\n"
        "  model.layers.0.self_attn.v_proj.lora.A  cut off\n"
        "  and 15 more                             cut off\n" + AGAIN,
    ),
    "native: no file": (
        "generate native-gone -p x",
        3,
        "a file of the adapter is missing\n  native-gone/model.safetensors\n",
    ),
    "native: a pickle": (
        "generate native-pickled -p x",
        3,
        PICKLE.format("native-pickled/adapter_model.bin"),
    ),
    "native: malformed description": (
        "generate native-torn -p x",
        3,
        "this is not JSON\n"
        "  native-torn/eckart.json  line 1: Expecting property name enclosed in double quotes: "
        "line 1 column 9 (char 8)\n",
    ),
    "native: base gone": (
        "generate native-moved -p x",
        3,
        "no such file or folder\n  gone\nDid you mean peft-gone?\n",
    ),
    "native: wrong base": (
        "generate native-other -p x",
        3,
        "this adapter was made for another base\n"
        "  native-other      for other-native, fingerprint d4918a7eb8ac\n"
        "  LlamaForCausalLM  fingerprint 4d3d38f2473f\n"
        "Load the base that it names, unchanged.\n",
    ),
    "native: a later version": (
        "generate native-later -p x",
        3,
        "unknown format version\n"
        "  native-later/eckart.json  format 9; this eckart reads 1\n"
        "Update eckart: pip install -U eckart.\n",
    ),
    "peft: missing tensor": (
        "generate peft-lost -p x",
        3,
        "the adapter does not fit the model\n"
        "  peft-lost\n"
        "  model.layers.0.mlp.down_proj.lora_A  is missing\n",
    ),
    "peft: tensor too many": (
        "generate peft-extra -p x",
        3,
        "the adapter does not fit the model\n  peft-extra\n  model.x.lora_A.weight  has no place\n",
    ),
    "peft: misshapen tensor": (
        "generate peft-misshapen -p x",
        3,
        "the adapter does not fit the model\n"
        "  peft-misshapen\n"
        "  model.layers.0.mlp.down_proj.lora_A  shape [3, 3], expected [2, 48]\n",
    ),
    "peft: wrong base": (
        "generate peft-other -p x",
        3,
        "this adapter was made for another base\n"
        "  peft-other        for other-peft, fingerprint d4918a7eb8ac\n"
        "  LlamaForCausalLM  fingerprint 8a9c5effd3a9\n"
        "Load the base that it names, unchanged.\n",
    ),
    "peft: no file": (
        "generate peft-gone -p x",
        3,
        "a file of the adapter is missing\n  peft-gone/adapter_model.safetensors\n",
    ),
    "peft: a pickle": (
        "generate peft-pickled -p x",
        3,
        PICKLE.format("peft-pickled/adapter_model.bin"),
    ),
    "peft: base gone": (
        "generate peft-moved -p x",
        3,
        "no such file or folder\n  gone\nDid you mean peft-gone?\n",
    ),
    "peft: malformed config": (
        "generate peft-torn -p x",
        3,
        "this is not JSON\n"
        "  peft-torn/adapter_config.json  line 1: Expecting property name enclosed in double "
        "quotes: line 1 column 9 (char 8)\n",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("models"), rows=12)
    damage_models(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # so that adapters name their base as m
        damage_adapters(folder)
    return folder


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_read_is_named(place, monkeypatch, case):
    enter(place, monkeypatch)
    complains(*MODELS[case])


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_named(place, monkeypatch, case):
    enter(place, monkeypatch)
    complains(*ADAPTERS[case])


def test_a_type_of_adapter_without_counterpart_is_refused_with_those_known(place, monkeypatch):
    from eckart.recipe import registry

    types = {e.declares.get("peft_type") for e in registry.methods().values()} - {None}
    enter(place, monkeypatch)
    complains(
        "generate peft-later -p x",
        3,
        "this type of adapter is not known here\n"
        "  peft-later/adapter_config.json  peft_type = IA3\n"
        f"Known: {', '.join(sorted(types))}.\n",
    )
