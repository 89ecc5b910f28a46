"""Adapters in kohya's names: read by their own rule, written so that the rule holds, or refused."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import batch_for, cast, randomise, tiny
from tests.journeys.adapters import adapter
from tests.journeys.runs import eckart, model_folder, texts
from tests.laws.matrix import logits

from eckart.errors import FileError, UsageError
from eckart.io import kohya
from eckart.io.export import export, load
from eckart.io.models import recognise
from eckart.methods.weights.bone import Bone
from eckart.methods.weights.dora import DoRA
from eckart.methods.weights.lora import LoRA
from eckart.recipe import Recipe, attach

ODD = ({"match": "mlp.up", "rank": 2, "alpha": 3.0},)
METHODS = [
    LoRA(rank=4, overrides=ODD),
    LoRA(rank=4, scaling="rslora", alpha=7.0),
    LoRA(rank=3, init="pissa"),
    Bone(rank=4),
]


def trained(architecture, method):
    handle = attach(tiny(architecture), Recipe(weights=method))
    randomise(handle)
    return handle


def by_its_own_rule(model, file):
    """W + alpha / r * up @ down on each map that a file names: what its readers do."""
    tensors = load_file(file)
    paths = {path.replace(".", "_"): path for path, _ in model.named_modules()}
    stems = {key.split(".")[0] for key in tensors}
    for stem in stems:
        module = model.get_submodule(paths[stem.removeprefix("lora_te_")])
        down, up = (tensors[f"{stem}.lora_{side}.weight"].double() for side in ("down", "up"))
        delta = float(tensors[f"{stem}.alpha"]) / down.shape[0] * up.flatten(1) @ down.flatten(1)
        if type(module).__name__ == "Conv1D":
            delta = delta.T
        weight = module.weight.data
        weight.copy_((weight.double() + delta.reshape(weight.shape)).to(weight.dtype))
    return model, stems


def wide(model, batch):
    """The logits in fp64 of a model whose numbers stay as they are."""
    return logits(copy.deepcopy(model).double(), cast(batch, torch.float64))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.slug} {getattr(m, 'init', '')}")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "vit"])
def test_what_is_written_is_the_function_by_the_names_own_rule(architecture, method, tmp_path):
    method = LoRA(rank=4, targets=("linear", "conv")) if architecture == "vit" else method
    handle, batch = trained(architecture, method), batch_for(architecture)
    export(handle, tmp_path / "a", "kohya")
    plain, stems = by_its_own_rule(tiny(architecture), tmp_path / "a" / kohya.TENSORS)
    assert len(stems) == len(handle.attached)
    y = logits(handle.model, batch)
    # fp32, the matrices rounded once
    torch.testing.assert_close(logits(plain, batch), y, rtol=0, atol=1e-5 * float(y.abs().max()))
    again = load(tmp_path / "a", tiny(architecture))
    ours, theirs = (wide(model, batch) for model in (again.model, handle.model))
    # evaluated in fp64: what is left is the scale's rounding into fp32 factors
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(y.abs().max()))
    kohya.save(again, tmp_path / "b")
    files = [tmp_path / place / kohya.TENSORS for place in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_plain_factors_go_through_bit_for_bit(tmp_path):
    handle = trained("llama", LoRA(rank=4, overrides=ODD))
    kohya.save(handle, tmp_path / "a")
    again = kohya.load(tiny("llama"), tmp_path / "a")
    before, after = handle.named_state(), again.named_state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.structure()["sites"] == handle.structure()["sites"]
    assert torch.equal(
        logits(again.model, batch_for("llama")), logits(handle.model, batch_for("llama"))
    )
    with safe_open(tmp_path / "a" / kohya.TENSORS, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "Dynamic",
            "ss_network_alpha": "Dynamic",
            "ss_sd_model_name": "",
        }


def by_hand(**changes):
    """A file as others write it: half precision, one map without its alpha."""
    g = torch.Generator().manual_seed(0)
    q, down = "lora_te_model_layers_0_self_attn_q_proj", "lora_te_model_layers_1_mlp_down_proj"
    tensors = {
        f"{q}.lora_down.weight": torch.randn(2, 32, generator=g).half(),
        f"{q}.lora_up.weight": torch.randn(32, 2, generator=g).half(),
        f"{q}.alpha": torch.tensor(1.0).half(),
        f"{down}.lora_down.weight": torch.randn(3, 48, generator=g).half(),
        f"{down}.lora_up.weight": torch.randn(32, 3, generator=g).half(),
    }
    return {k: t for k, t in (tensors | changes).items() if t is not None}


def test_a_file_made_by_hand_is_read_as_its_rule_says(tmp_path):
    tensors = by_hand()
    save_file(tensors, tmp_path / "x.safetensors")
    assert recognise(tmp_path / "x.safetensors").kind == "kohya"
    handle = kohya.load(tiny("llama"), tmp_path / "x.safetensors")
    terms = {path: by_name["lora"] for path, by_name in handle.terms().items()}
    q, down = terms["model.layers.0.self_attn.q_proj"], terms["model.layers.1.mlp.down_proj"]
    assert (q.scale, down.scale) == (0.5, 1.0)  # alpha / r, and 1 where there is no alpha
    stem = "lora_te_model_layers_0_self_attn_q_proj"
    expected = (
        0.5
        * tensors[f"{stem}.lora_up.weight"].float()
        @ (tensors[f"{stem}.lora_down.weight"].float())
    )
    torch.testing.assert_close(q.dense(), expected)
    assert q.A.dtype == torch.float32


Q = "lora_te_model_layers_0_self_attn_q_proj"
DOWN_PROJ = "lora_te_model_layers_1_mlp_down_proj"
BROKEN = {
    "names no map of it": {"lora_te_model_layers_9_self_attn_q_proj.lora_down.weight": 1,
                           "lora_te_model_layers_9_self_attn_q_proj.lora_up.weight": 1},
    r"lora_up\.weight +is missing": {f"{Q}.lora_up.weight": None},
    r"LoHa, (.|\n)*hada_w1_a +has no counterpart": {f"{Q}.hada_w1_a": 1},
    r"LoKr, (.|\n)*lokr_w1 +has no counterpart": {f"{Q}.lokr_w1": 1},
    r"mlp_down_proj\.dora_scale +is missing": {f"{Q}.dora_scale": (32, 1)},
    r"dora_scale +shape \[1, 32\], expected \[32, 1\](.|\n)*wd_on_out": {
        f"{Q}.dora_scale": (1, 32), f"{DOWN_PROJ}.dora_scale": (32, 1)},
    "no known prefix": {"text_model.q_proj.lora_down.weight": 1},
    r"shape \[2, 31\], expected \[2, 32\]": {f"{Q}.lora_down.weight": (2, 31)},
    r"for several models\n .*te, unet": {"lora_unet_q.lora_down.weight": 1},
}  # fmt: skip


def test_dora_is_read_as_its_rule_says(tmp_path):
    g = torch.Generator().manual_seed(1)
    lengths = {f"{stem}.dora_scale": torch.rand(32, 1, generator=g) for stem in (Q, DOWN_PROJ)}
    tensors = by_hand(**lengths)
    save_file(tensors, tmp_path / "x.safetensors")
    handle = kohya.load(tiny("llama"), tmp_path / "x.safetensors")
    assert isinstance(handle.weights, DoRA)
    plain = tiny("llama")
    paths = {path.replace(".", "_"): path for path, _ in plain.named_modules()}
    for stem in (Q, DOWN_PROJ):
        module = plain.get_submodule(paths[stem.removeprefix("lora_te_")])
        down, up = (tensors[f"{stem}.lora_{side}.weight"].double() for side in ("down", "up"))
        scale = float(tensors.get(f"{stem}.alpha", down.shape[0])) / down.shape[0]
        changed = module.weight.data.double() + scale * up @ down
        rows = tensors[f"{stem}.dora_scale"].double() / changed.norm(dim=1, keepdim=True)
        module.weight.data.copy_((rows * changed).float())
    y = logits(handle.model, batch_for("llama"))
    # fp32, the matrices rounded once
    torch.testing.assert_close(
        logits(plain, batch_for("llama")), y, rtol=0, atol=1e-5 * float(y.abs().max())
    )


@pytest.mark.parametrize("words", BROKEN)
def test_what_does_not_fit_is_named(words, tmp_path):
    shapes = {k: {1: (2, 2)}.get(v, v) for k, v in BROKEN[words].items()}
    changes = {k: None if v is None else torch.ones(v) for k, v in shapes.items()}
    save_file(by_hand(**changes), tmp_path / "x.safetensors")
    model = tiny("llama")
    with pytest.raises(FileError, match=words):
        kohya.load(model, tmp_path / "x.safetensors")
    assert list(model.state_dict()) == list(tiny("llama").state_dict())


def test_a_part_of_a_file_for_several_models_is_read_by_its_name(tmp_path):
    more = {"lora_unet_q.lora_down.weight": torch.ones(2, 2)}
    save_file(by_hand(**more), tmp_path / "x.safetensors")
    assert len(kohya.load(tiny("llama"), tmp_path / "x.safetensors", part="te").attached) == 2
    with pytest.raises(FileError, match="has no such part"):
        kohya.load(tiny("llama"), tmp_path / "x.safetensors", part="te2")


def test_what_the_names_cannot_say_is_refused(tmp_path):
    with pytest.raises(UsageError, match="this cannot be written as kohya"):
        export(trained("llama", DoRA(rank=2)), tmp_path / "a", "kohya")
    with pytest.raises(UsageError, match="experts has no name there"):
        kohya.save(trained("mixtral", LoRA(rank=2)), tmp_path / "a")
    with pytest.raises(UsageError, match="a tied map has no name there"):
        kohya.save(trained("gemma", LoRA(rank=2, targets=("embedding",))), tmp_path / "a")
    with pytest.raises(UsageError, match=r"one name for two maps\n  a_b_c  a\.b_c and a_b\.c"):
        kohya.flattened(["a.b_c", "a_b.c"])


def test_names_are_one_to_one_on_every_model(architecture):
    names = kohya.flat_names(tiny(architecture))
    assert len(set(names.values())) == len(names) >= 10


def test_convert_goes_both_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    model_folder(tmp_path / "m")
    texts(tmp_path / "d.jsonl")
    adapter(tmp_path / "lora", tmp_path / "m", "lora", rank=4)
    data = f"data={tmp_path / 'd.jsonl'}"
    ran = eckart(
        "convert", tmp_path / "lora", data, "--to", "kohya", "-o", tmp_path / "k", "--json"
    )
    assert ran.code == 0, ran.err
    assert ran.document["exact"] is True and ran.document["drift"]["kl"] < 1e-6
    ran = eckart("convert", tmp_path / "k", data, "--to", "native", "-o", tmp_path / "n")
    assert ran.code == 0, ran.err
    a, b = (load_file(tmp_path / place / "model.safetensors") for place in ("lora", "n"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    file = tmp_path / "k" / kohya.TENSORS
    ran = eckart("convert", file, f"base={tmp_path / 'm'}", "--to", "peft", "-o", tmp_path / "p")
    assert ran.code == 0, ran.err
    adapter(tmp_path / "dora", tmp_path / "m", "dora", rank=4)
    words = ("convert", tmp_path / "dora", data, "--to", "kohya", "-o", tmp_path / "dk")
    ran = eckart(*words)
    assert ran.code == 2 and "--to kohya has no exact form here" in ran.err
    ran = eckart(*words, "rank=32", "--json")
    assert ran.code == 0 and ran.document["drift"]["kl"] < 1e-6, ran.err  # all of the rank
    assert eckart("generate", tmp_path / "k", "-p", "low", "-n", 3).code == 0
