"""Every adapter as plain LoRA: of its exact rank where it has one, else truncated, error known.

As itself, as PEFT's own type and merged: tests/laws/test_files.py, over all architectures.
"""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from eckart.io import peft
from eckart.jobs.measuring.approximate import of_update
from tests.conftest import randomise, tiny
from tests.laws.matrix import attached, logits, small, weights_methods

ADAPTERS = [slug for slug in weights_methods() if small(slug).base == "frozen"]


def carried(slug):
    model, handle, batch = attached(slug, "llama")
    randomise(handle)
    changes = {}
    for path in handle.attached:
        site = handle.sites[path]
        changes[path] = site.module.merged(site.param) - site.weight(torch.float64)
    return model, handle, batch, changes


@pytest.mark.parametrize("slug", ADAPTERS)
def test_plain_lora_has_the_exact_rank_and_no_scale(slug, tmp_path):
    model, handle, batch, changes = carried(slug)
    if not handle.weights.promised("exports_low_rank"):
        assert "not of low rank" in peft.obstacle(handle, uniform=True)
        return
    peft.save(handle, tmp_path, uniform=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = [int(torch.linalg.matrix_rank(change, rtol=1e-6)) for change in changes.values()]
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == max(ranks)
    assert not {"rank_pattern", "alpha_pattern", "use_rslora", "use_dora"} & config.keys()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for path, change in changes.items():
        B, A = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "BA")
        # fp32 factors, the scale multiplied beforehand
        assert torch.linalg.norm(B @ A - change) <= 1e-6 * torch.linalg.norm(change), path
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # a key that is missing or left over is a warning there
        theirs = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    y = logits(model, batch)
    # fp32, sums in another order, over two layers; relative to the largest output
    torch.testing.assert_close(logits(theirs, batch), y, rtol=0, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("slug", ADAPTERS)
def test_a_smaller_rank_is_the_best_one_and_its_error_is_known(slug):
    model, handle, _, changes = carried(slug)
    found = of_update(model, handle, tiny("llama"))
    errors = found.errors(2)
    written = found.at(2)
    assert written.attached.keys() == changes.keys()
    for path, change in changes.items():
        (term,) = written.terms()[path].values()
        off = torch.linalg.norm(term.dense().double() - change)
        s = torch.linalg.svdvals(change)
        # the tail of the spectrum (Eckart and Young); fp32 factors of the leading part
        assert abs(off - s[2:].norm()) <= 1e-6 * s.norm(), path
        assert errors[path] == pytest.approx(float(off / s.norm()), abs=1e-6)
    whole = found.at(found.most)
    for path, change in changes.items():
        (term,) = whole.terms()[path].values()
        off = torch.linalg.norm(term.dense().double() - change)
        assert off <= 2e-6 * torch.linalg.norm(change), path  # an SVD in fp32
