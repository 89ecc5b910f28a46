"""int8: a base of a quarter of the bytes, on which adapters learn as on the original."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from eckart.errors import MissingExtra, UsageError
from eckart.io import dense, factored, native
from eckart.io.models import load_model
from eckart.io.opening import open_model
from eckart.jobs.measuring.memory import size
from eckart.linear.sites import find_sites, quantised
from eckart.methods.precision.int8 import Int8, torchao
from eckart.methods.update.galore import GaLore
from eckart.methods.weights.bone import Bone
from eckart.methods.weights.dense import Dense
from eckart.methods.weights.dora import DoRA
from eckart.methods.weights.lora import LoRA
from eckart.recipe import Recipe, attach
from eckart.recipe.fingerprint import fingerprint
from tests.conftest import batch_for, randomise, tiny
from tests.journeys.runs import eckart, model_folder, texts
from tests.laws.matrix import logits, steps

METHODS = [LoRA(rank=4), LoRA(rank=4, init="pissa"), DoRA(rank=4), Bone(rank=4)]
METHODS += [Bone(rank=4, mode="bat")]  # multiplies the base's matrix itself


def on_int8(architecture, method, **options):
    return attach(tiny(architecture), Recipe(weights=method, precision=Int8(**options)))


def dense_twin(model):
    """The same model with every quantised matrix written out in fp32."""
    twin = tiny("qwen")
    state = {
        name: t.dequantize() if quantised(t) else t
        for name, t in model.state_dict().items()
        if name in twin.state_dict()
    }
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_terms_on_a_quantised_base_are_terms_on_the_matrix_it_stands_for(method):
    handle = on_int8("qwen", method)  # its maps have biases, which a gain leaves alone
    batch = batch_for("qwen")
    twin = attach(dense_twin(handle.model), Recipe(weights=method))
    # fp32, the scales applied after the product here and before it there
    torch.testing.assert_close(
        logits(handle.model, batch), logits(twin.model, batch), rtol=0, atol=2e-6
    )
    randomise(handle)
    twin.load_named_state(handle.named_state())
    y = logits(handle.model, batch)
    torch.testing.assert_close(y, logits(twin.model, batch), rtol=0, atol=2e-5)
    loss, theirs = (h.loss(batch, h.model(**batch)) for h in (handle, twin))
    loss.backward(), theirs.backward()
    for name, parameter in handle.trainable().items():
        expected = twin.trainable()[name].grad
        share = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=share)


def test_the_base_is_near_and_takes_a_quarter_of_the_bytes():
    handle = on_int8("llama", LoRA(rank=4))
    plain = tiny("llama")
    held = [m.weight for m in handle.model.modules() if quantised(getattr(m, "weight", None))]
    assert len(held) == 14 and not any(w.requires_grad for w in held)
    for path in handle.attached:
        W = plain.get_submodule(path).weight
        stands_for = handle.sites[path].weight()
        step = W.abs().amax(1, keepdim=True) / 127
        assert ((stands_for - W).abs() <= 0.51 * step).all()
    # a byte an entry and one fp32 scale a row, for maps of at least 32 inputs
    assert sum(map(size, held)) <= (1 / 4 + 4 / 4 / 32 + 0.1) * sum(4 * w.numel() for w in held)
    assert not quantised(handle.model.lm_head.weight)


def test_removing_leaves_the_quantised_base_as_it_was():
    handle = on_int8("llama", DoRA(rank=4))
    batch, fresh = batch_for("llama"), attach(
        tiny("llama"), Recipe(weights=LoRA(rank=2), precision=Int8())
    )  # fmt: skip
    randomise(handle)
    model = handle.remove()
    assert torch.equal(logits(model, batch), logits(fresh.remove(), batch))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    again = attach(model, Recipe(weights=LoRA(rank=2), precision=Int8()))  # it is in it already
    assert len(again.attached) == 14


def test_a_base_that_was_quantised_before_is_known_by_itself(tmp_path):
    quantize, config = torchao()
    model = tiny("llama")
    plain = fingerprint(model)
    quantize(model, config)
    assert {s.matrix_shape for s in find_sites(model)} >= {(48, 32), (32, 48)}
    assert fingerprint(model) != plain  # an adapter made on it is not one of the other
    handle = attach(model, Recipe(weights=LoRA(rank=4)))
    losses = steps(handle, handle.optimizer(1e-2), [batch_for("llama")] * 20)
    assert losses[-1] < losses[0] - 0.3
    native.save(handle, tmp_path / "a")
    other = tiny("llama")
    quantize(other, config)
    again = native.load(other, tmp_path / "a")
    assert torch.equal(logits(again.model, batch_for("llama")), logits(model, batch_for("llama")))


def test_what_cannot_be_is_said(monkeypatch):
    with pytest.raises(UsageError, match="these two do not combine\n  precision = int8"):
        Recipe(weights=Dense(), update=GaLore(), precision=Int8())
    with pytest.raises(UsageError, match="int8 finds no matrix that it can hold"):
        on_int8("gpt2", LoRA(rank=2))
    handle = on_int8("llama", LoRA(rank=2))
    with pytest.raises(UsageError, match="this base is quantised"):
        handle.merge()
    assert "merge it on the base as it was" in dense.obstacle(handle)
    assert "quantised" in factored.obstacle(handle)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingExtra, match=r"pip install 'eckart\[quant\]'"):
        on_int8("llama", LoRA(rank=2))


# --- the command line ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    model_folder(folder / "m")
    texts(folder / "d.jsonl")
    return folder


WORDS = ("method=lora", "precision=int8", "train.lr=1e-2", "train.save_every=10")


def test_a_run_gains_resumes_to_the_same_bits_and_merges_on_the_base_as_it_was(place, tmp_path):
    words = ("finetune", place / "m", place / "d.jsonl", *WORDS)
    ran = eckart(*words, "train.steps=20", "-o", place / "run", "--json")
    assert ran.code == 0, ran.err
    before, after = ran.document["eval"]["before"], ran.document["eval"]["after"]
    assert after["loss"] < before["loss"] - 0.2
    found = eckart("estimate", *words, "train.batch_size=4", "--json").document
    assert found["memory"]["weights"] < 0.75 * sum(4 * p.numel() for p in plain_parameters(place))
    (place / "run" / "checkpoints" / "step-20").rename(tmp_path / "away")
    whole = load_file(place / "run" / "final" / "adapter_model.safetensors")
    (place / "run" / "final").rename(tmp_path / "final")
    ran = eckart("finetune", "--resume", place / "run", "--json")
    assert ran.code == 0, ran.err
    again = load_file(place / "run" / "final" / "adapter_model.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    ran = eckart("convert", place / "run", "--to", "dense", "-o", tmp_path / "dense")
    assert ran.code == 0, ran.err
    merged = load_model(tmp_path / "dense")
    assert not any(quantised(p) for p in merged.parameters())
    ids = torch.randint(2, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = open_model(place / "run").model(ids).logits
    # fp32, rounded once
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("words", [("loram", "method.align_steps=2"), ("codyra",)], ids=str)
def test_stages_learn_on_a_quantised_base_and_go_on_from_each_other(words, place, tmp_path):
    texts(place / "e.jsonl", rows=40)
    data = f"data=[{place}/d.jsonl,{place}/e.jsonl]" if words == ("codyra",) else place / "d.jsonl"
    options = ("precision=int8", "train.steps=3", "-o", tmp_path / "r")
    ran = eckart("finetune", place / "m", data, f"method={words[0]}", *words[1:], *options)
    assert ran.code == 0, ran.err
    final = tmp_path / "r" / "final"
    whole = load_file(final / "adapter_model.safetensors")
    final.rename(tmp_path / "final")
    for stage in sorted((tmp_path / "r" / "stages").iterdir())[-2:]:
        stage.rename(tmp_path / stage.name)
    ran = eckart("finetune", "--resume", tmp_path / "r")
    assert ran.code == 0, ran.err
    again = load_file(final / "adapter_model.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def plain_parameters(place):
    return load_model(place / "m").parameters()


def test_without_torchao_it_ends_with_what_to_install(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    ran = eckart("finetune", place / "m", place / "d.jsonl", *WORDS, "-o", tmp_path / "r")
    assert ran.code == 6
    assert ran.err.endswith(
        "needs torchao\n  torchao  not installed\nType pip install 'eckart[quant]'.\n"
    )
