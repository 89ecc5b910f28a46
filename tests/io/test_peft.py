"""PEFT's files, both ways: equal tensors, equal logits in stock PEFT, nothing lost in silence."""

import dataclasses
import json
import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.tiny import attached
from torch import nn

import eckart
from eckart.errors import FileError, UsageError
from eckart.io import peft as ours
from eckart.io.peft_layout import meant, short_names, to_patterns

METHODS = {
    "lora": eckart.LoRA(rank=4, alpha=7.0),
    "rslora": eckart.LoRA(rank=4, scaling="rslora"),
    "ranks": eckart.LoRA(rank=4, overrides=({"match": "attn", "rank": 3, "alpha": 5.0},)),
    "pissa": eckart.LoRA(rank=4, init="pissa"),
    "dora": eckart.DoRA(rank=4),
}
BLOCKS, AND_TOKENS = ("linear",), ("linear", "embedding")
# PEFT scales no rows of fused experts or of a tied embedding: see the refusals below
CASES = [
    (kind, method, targets)
    for kind in tiny.MODELS
    for method in METHODS
    for targets in (BLOCKS, AND_TOKENS)
    if not (
        method == "dora"
        and (kind == "mixtral" or (kind in ("gemma", "gpt2") and targets == AND_TOKENS))
    )
]


def in_stock_peft(model, folder):
    """Loaded by PEFT, which must not speak of missing or unexpected keys."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(model, folder)
    words = " ".join(str(w.message) for w in said)
    assert "missing" not in words and "unexpected" not in words
    return loaded


def assert_same_logits(a, b):
    # fp32, another order of the same products; relative to the largest logit
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(b.abs().max()))


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def edit(folder, tensors=None, **config):
    if tensors is not None:
        held = tensors_of(folder)
        tensors(held)
        save_file(held, folder / "adapter_model.safetensors")
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | config))


@pytest.fixture
def saved(tmp_path):
    ours.save(attached(tiny.llama(), METHODS["lora"]), tmp_path / "a")
    return tmp_path / "a"


# --- both ways -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind, method, targets", CASES)
def test_stock_peft_computes_the_same_and_saves_what_we_read(kind, method, targets, tmp_path):
    make = tiny.MODELS[kind]
    handle = attached(make(), dataclasses.replace(METHODS[method], targets=targets))
    expected, base = tiny.logits(handle.model), tiny.logits(make())
    assert not torch.allclose(expected, base, atol=1e-2)
    ours.save(handle, tmp_path / "ours")
    theirs = in_stock_peft(make(), tmp_path / "ours")
    assert_same_logits(tiny.logits(theirs), expected)

    theirs.save_pretrained(tmp_path / "theirs")
    again = ours.load(make(), tmp_path / "theirs")
    assert_same_logits(tiny.logits(again.model), expected)


@pytest.mark.parametrize("method", ["lora", "rslora", "ranks", "dora"])
@pytest.mark.parametrize("kind", tiny.MODELS)
def test_there_and_back_is_the_same_bytes(kind, method, tmp_path):
    targets = ("attn",) if method == "dora" else AND_TOKENS
    handle = attached(tiny.MODELS[kind](), dataclasses.replace(METHODS[method], targets=targets))
    ours.save(handle, tmp_path / "a")
    again = ours.load(tiny.MODELS[kind](), tmp_path / "a")
    ours.save(again, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    before, after = handle.named_state(), again.named_state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_trained_by_peft_goes_on_here(tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "down_proj"])
    theirs = get_peft_model(tiny.llama(), config)
    tiny.move(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    handle = ours.load(tiny.llama(), tmp_path)
    assert_same_logits(tiny.logits(handle.model), tiny.logits(theirs))
    assert (handle.weights.rank, handle.weights.alpha) == (3, 5.0)
    assert handle.weights.scaling == "rslora"
    assert handle.weights.targets == ("down_proj", "q_proj")
    assert len(handle.trainable()) == 8


def test_a_new_head_goes_into_modules_to_save(tmp_path):
    handle = attached(tiny.bert(), eckart.LoRA(rank=2), also_train=("classifier",))
    ours.save(handle, tmp_path / "a")
    assert config_of(tmp_path / "a")["modules_to_save"] == ["classifier"]
    assert_same_logits(
        tiny.logits(in_stock_peft(tiny.bert(), tmp_path / "a")), tiny.logits(handle.model)
    )
    again = ours.load(tiny.bert(), tmp_path / "a")
    assert_same_logits(tiny.logits(again.model), tiny.logits(handle.model))
    assert again.also_train == ("classifier",)


class Pictures(nn.Module):
    """Two convolutions and a head."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.second = nn.Conv2d(8, 6, 3)
            self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).mean((-1, -2)))


@pytest.mark.parametrize("method", [eckart.LoRA(rank=3), eckart.DoRA(rank=3)])
def test_convolutions(method, tmp_path):
    method = dataclasses.replace(method, targets=("conv", "head"))
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    handle = attached(Pictures(), method)
    ours.save(handle, tmp_path / "a")
    assert_same_logits(in_stock_peft(Pictures(), tmp_path / "a")(x), handle.model(x))
    again = ours.load(Pictures(), tmp_path / "a")
    assert_same_logits(again.model(x), handle.model(x))


# --- what is written -----------------------------------------------------------------------


def test_nothing_is_added_to_peft_s_files(saved):
    assert {p.name for p in saved.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert set(config_of(saved)) <= fields
    assert config_of(saved)["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]


def test_ranks_and_alphas_are_written_together(tmp_path):
    ours.save(attached(tiny.llama(), METHODS["ranks"]), tmp_path / "a")
    config = config_of(tmp_path / "a")
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    assert (config["r"], config["lora_alpha"]) == (3, 5)  # the most frequent pair
    assert set(config["rank_pattern"].values()) == {4}
    assert set(config["alpha_pattern"].values()) == {32}


def test_a_rank_that_was_cut_keeps_its_scale(tmp_path):
    """k_proj is 16 x 32: its rank is 16 where 20 was asked for, and s stays alpha / 20."""
    handle = attached(tiny.llama(), eckart.LoRA(rank=20, alpha=10.0))
    ours.save(handle, tmp_path / "a")
    key = "model\\.layers\\.0\\.self_attn\\.k_proj"
    config = config_of(tmp_path / "a")
    assert config["rank_pattern"][key] == 16 and config["alpha_pattern"][key] == 8
    theirs = in_stock_peft(tiny.llama(), tmp_path / "a")
    assert_same_logits(tiny.logits(theirs), tiny.logits(handle.model))


def test_a_start_from_the_weight_is_written_for_the_original_base(tmp_path):
    handle = attached(tiny.llama(), METHODS["pissa"])
    ours.save(handle, tmp_path / "a")
    config = config_of(tmp_path / "a")
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config.get("init_lora_weights", True) is True


def test_uniform_files_have_one_rank_and_no_scale(tmp_path):
    """What vLLM and llama.cpp read: they know neither pattern nor rsLoRA."""
    handle = attached(tiny.llama(), METHODS["ranks"])
    ours.save(handle, tmp_path / "a", uniform=True)
    config = config_of(tmp_path / "a")
    assert config["r"] == config["lora_alpha"] == 4
    assert "rank_pattern" not in config and "use_rslora" not in config
    shapes = {t.shape[0] for k, t in tensors_of(tmp_path / "a").items() if "lora_A" in k}
    assert shapes == {4}
    theirs = in_stock_peft(tiny.llama(), tmp_path / "a")
    assert_same_logits(tiny.logits(theirs), tiny.logits(handle.model))


def test_what_is_no_plain_product_has_no_uniform_file(tmp_path):
    with pytest.raises(UsageError, match="not of low rank"):
        ours.save(attached(tiny.llama(), METHODS["dora"]), tmp_path / "a", uniform=True)


def test_names_are_shortened_only_where_they_mean_the_same():
    paths = ["a.0.q", "a.1.q", "a.0.v", "b.0.v", "v"]
    assert short_names(["a.0.q", "a.1.q"], paths) == ["q"]
    assert short_names(["a.0.v"], paths) == ["a.0.v"]
    for chosen in (["a.0.q"], ["b.0.v"], ["a.0.v", "b.0.v", "v"], ["a.1.q", "v"]):
        names = short_names(chosen, paths)
        wrong = {p for p in paths if meant(names, p)} ^ set(chosen)
        # `v` at the root is the end of every path that ends in .v: no name means it alone
        assert wrong <= ({"a.0.v", "b.0.v"} if "v" in chosen else set())


def test_entries_without_a_pattern_must_agree():
    with pytest.raises(ValueError, match="use_dora is True elsewhere and False at b"):
        to_patterns({"a": {"r": 1, "use_dora": True}, "b": {"r": 1, "use_dora": False}})


# --- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, method, options, reason",
    [
        ("llama", eckart.Dense(), {}, "it changes the base itself"),
        ("llama", eckart.LowRank(), {}, "it changes the base itself"),
        ("mixtral", eckart.DoRA(rank=2), {}, "PEFT scales no rows of fused experts"),
        (
            "gemma",
            eckart.DoRA(rank=2, targets=AND_TOKENS),
            {},
            "PEFT scales no rows of a tied embedding",
        ),
    ],
)
def test_what_has_no_exact_form_is_refused(kind, method, options, reason, tmp_path):
    handle = attached(tiny.MODELS[kind](), method, **options)
    with pytest.raises(UsageError, match=reason):
        ours.save(handle, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_parameter_trained_beside_is_not_lost_in_silence(tmp_path):
    handle = attached(tiny.llama(), METHODS["lora"])
    handle.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(UsageError, match=r"model\.norm\.weight is trained too"):
        ours.save(handle, tmp_path / "a")


def refused(folder, model=None):
    model = model or tiny.llama()
    before, names = tiny.logits(model), set(model.state_dict())
    with pytest.raises(FileError) as fault:
        ours.load(model, folder)
    assert set(model.state_dict()) == names and torch.equal(tiny.logits(model), before)
    return re.sub(" +", " ", str(fault.value))


Q = "model.layers.0.self_attn.q_proj"


def test_another_base_of_the_same_shape_is_refused(saved):
    other = tiny.llama()
    with torch.no_grad():
        other.model.norm.weight += 1.0
    with pytest.raises(FileError, match="made for another base"):
        ours.load(other, saved)
    edit(saved, tensors=lambda held: None)  # as any other program writes it: no word of a base
    assert ours.load(other, saved).attached


def test_a_copy_in_fp16_is_the_same_base(saved):
    assert ours.load(tiny.llama().half(), saved).attached


def test_a_missing_tensor_is_named(saved):
    edit(saved, lambda t: t.pop(f"base_model.model.{Q}.lora_B.weight"))
    assert f"{Q}.lora_B is missing" in refused(saved)


def test_a_missing_layer_is_named(saved):
    def both(tensors):
        for name in "AB":
            tensors.pop(f"base_model.model.{Q}.lora_{name}.weight")

    edit(saved, both)
    assert f"{Q} (all of it) is missing" in refused(saved)


@pytest.mark.parametrize("name", [f"{Q}.lora_R.weight", "model.layers.9.q_proj.lora_A.weight"])
def test_a_tensor_without_a_place_is_named(saved, name):
    edit(saved, lambda t: t.update({f"base_model.model.{name}": torch.zeros(4, 4)}))
    assert "has no place" in refused(saved)


def test_a_misshapen_tensor_is_named(saved):
    key = f"base_model.model.{Q}.lora_A.weight"
    edit(saved, lambda t: t.update({key: torch.zeros(4, 31)}))
    assert f"{Q}.lora_A shape [4, 31], expected [4, 32]" in refused(saved)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"peft_type": "VERA"}, "peft_type = VERA"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ],
)
def test_what_has_no_counterpart_here_is_refused(saved, change, words):
    edit(saved, **change)
    assert words in refused(saved)


def test_an_adapter_on_one_end_of_a_tied_pair_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(tiny.gemma(), LoraConfig(r=2, target_modules=["embed_tokens"]))
        theirs.save_pretrained(tmp_path)
    assert "both ends of a tied pair" in refused(tmp_path, tiny.gemma())


def test_a_head_that_is_not_its_embedding_transposed_is_refused(tmp_path):
    method = dataclasses.replace(METHODS["lora"], targets=AND_TOKENS)
    ours.save(attached(tiny.gemma(), method), tmp_path / "a")
    edit(tmp_path / "a", lambda t: t["base_model.model.lm_head.lora_A.weight"].add_(1))
    assert "lm_head.lora_A.weight has no place" in refused(tmp_path / "a", tiny.gemma())


def test_another_embedding_in_the_file_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["embed_tokens"]))
        theirs.save_pretrained(tmp_path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    ours.load(tiny.llama(), tmp_path).remove()
    edit(tmp_path, lambda t: t[key].add_(1))
    assert "has no place" in refused(tmp_path)


def test_a_renamed_type_is_read_and_said(saved):
    """Bone became MISS in PEFT 0.17; later PEFT raises KeyError on the old files."""
    old = {f"base_model.model.{Q}.bone_block": torch.zeros(4, 32)}
    edit(saved, lambda t: (t.clear(), t.update(old)), peft_type="BONE")
    with pytest.warns(UserWarning, match="BONE is called MISS now"):
        config, tensors = ours.read(saved)
    assert config["peft_type"] == "MISS" and list(tensors) == [f"{Q}.miss_block"]
