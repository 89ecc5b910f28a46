"""A merged model is an ordinary transformers model; the live one goes on."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.tiny import attached
from transformers import AutoModelForCausalLM

import eckart
from eckart.errors import UsageError
from eckart.io import dense

METHODS = {
    "lora": eckart.LoRA(rank=4, targets=("linear", "embedding")),
    "pissa": eckart.LoRA(rank=4, init="pissa"),
    "dora": eckart.DoRA(rank=4),
    "dense": eckart.Dense(),
    "lowrank": eckart.LowRank(),
}


@pytest.mark.parametrize("kind", tiny.MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_folder_is_an_ordinary_model_with_the_same_logits(kind, method, tmp_path):
    plain = tiny.MODELS[kind]()
    plain.save_pretrained(tmp_path / "plain")
    handle = attached(tiny.MODELS[kind](), METHODS[method])
    expected = tiny.logits(handle.model)
    dense.save(handle, tmp_path / "a")
    assert torch.equal(tiny.logits(handle.model), expected)  # the live model is as it was

    assert "eckart" not in (tmp_path / "a" / "config.json").read_text()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        p.name for p in (tmp_path / "plain").iterdir()
    }
    held = load_file(tmp_path / "a" / "model.safetensors")
    assert set(held) == set(load_file(tmp_path / "plain" / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(model) is type(plain)
    # fp32: one product by the sum instead of a sum of products, over a few layers
    bound = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(tiny.logits(model), expected, rtol=0, atol=bound)


def test_the_live_model_trains_on_after_it_was_written(tmp_path):
    handle = attached(tiny.gemma(), METHODS["lora"])
    dense.save(handle, tmp_path / "a")
    assert json.loads(handle.model.config.to_json_string())["model_type"] == "eckart"
    handle.model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    assert all(p.grad is not None for p in handle.trainable().values())


def test_a_tie_is_kept(tmp_path):
    handle = attached(tiny.gemma(), METHODS["lora"])
    dense.save(handle, tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "a" / "model.safetensors")


def test_generation_settings_are_kept(tmp_path):
    handle = attached(tiny.llama(), METHODS["lora"])
    handle.model.generation_config.max_new_tokens = 7
    dense.save(handle, tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.generation_config.max_new_tokens == 7


def small_update(dtype):
    """A LoRA whose update is about a hundredth as large as the weights."""
    handle = eckart.attach(tiny.llama().to(dtype), eckart.Recipe(weights=eckart.LoRA(rank=8)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, terms in handle.terms().items():
            term, W = terms["lora"], handle.sites[path].weight(torch.float32)
            term.B.normal_(generator=generator)
            term.B.mul_(0.01 * W.norm() / term.dense().norm())
    return handle


def test_a_small_update_in_bf16_is_warned_of_with_its_loss(tmp_path):
    handle = small_update(torch.bfloat16)
    # adapters-interchange: 17 % at a hundredth, for a Gaussian matrix; W's size is not exact here
    with pytest.warns(UserWarning, match=r"rounding to bfloat16 loses 1[5-9] % of the update"):
        dense.save(handle, tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.dtype == torch.bfloat16


def test_in_fp32_nothing_is_lost_and_nothing_said(tmp_path):
    handle = small_update(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense.save(handle, tmp_path / "a", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.dtype == torch.float32
    path = "model.layers.0.self_attn.q_proj"
    exact = handle.sites[path].module.merged()
    assert torch.equal(model.get_submodule(path).weight, exact.float())


def test_a_nonlinear_term_is_refused_and_named(tmp_path):
    handle = attached(tiny.llama(), METHODS["lora"])
    handle.terms()["model.layers.0.self_attn.q_proj"]["lora"].phi = "relu"
    with pytest.raises(UsageError) as fault:
        dense.save(handle, tmp_path / "a")
    assert "model.layers.0.self_attn.q_proj.lora is not a linear map" in str(fault.value)
    assert not (tmp_path / "a").exists()
