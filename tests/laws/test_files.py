"""What is written comes back as the same function, for every method, architecture and format."""

import re
import warnings

import pytest
import torch
from peft import PeftModel

from eckart.io import dense, factored, native, peft
from tests.conftest import randomise, tiny
from tests.laws.matrix import attached, logits, weights_methods


def trained(slug, architecture):
    model, handle, batch = attached(slug, architecture)
    randomise(handle)
    return model, handle, batch


def assert_same(found, expected, share=1e-5):
    # fp32, sums in another order, over two layers; relative to the largest output
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


@pytest.mark.parametrize("slug", weights_methods())
def test_native(slug, architecture, tmp_path):
    model, handle, batch = trained(slug, architecture)
    native.save(handle, tmp_path / "a")
    again = native.load(tiny(architecture), tmp_path / "a")
    assert_same(logits(again.model, batch), logits(model, batch), share=1e-6)
    with torch.inference_mode():  # who generates first may train afterwards
        again.model(**batch)
    again.model(**batch)["loss"].backward()
    assert again.structure() == handle.structure()
    native.save(again, tmp_path / "b")
    for name in (native.DESCRIPTION, native.TENSORS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("slug", weights_methods())
def test_factored(slug, architecture, tmp_path):
    model, handle, batch = trained(slug, architecture)
    if not handle.attached:
        assert "ordinary model" in factored.obstacle(handle)
        return
    factored.save(handle, tmp_path / "a")
    import eckart.hf  # noqa: F401

    again = type(model).from_pretrained(tmp_path / "a")
    assert_same(logits(again, batch), logits(model, batch), share=1e-6)


@pytest.mark.parametrize("slug", weights_methods())
def test_dense(slug, architecture, tmp_path):
    model, handle, batch = trained(slug, architecture)
    if not handle.weights.promised("merges"):
        assert dense.obstacle(handle)
        return
    dense.save(handle, tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a")
    assert_same(logits(again, batch), logits(model, batch))
    assert type(again.config) is type(tiny(architecture).config)


@pytest.mark.parametrize("slug", weights_methods())
def test_peft(slug, architecture, tmp_path):
    """A method that keeps its base and promises low rank can always be written for stock PEFT."""
    model, handle, batch = trained(slug, architecture)
    reason = peft.obstacle(handle)
    if reason:
        beside_a_base = handle.weights.base == "frozen"
        assert not (beside_a_base and handle.weights.promised("exports_low_rank")), reason
        return
    peft.save(handle, tmp_path / "a")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = PeftModel.from_pretrained(tiny(architecture), tmp_path / "a")
    # PEFT 0.21 misses copies, in every module, of what it then reads once at the root
    shared = {f"{name}.default" for name in handle.weights.peft_shared}
    lost = [key for w in said for key in re.findall(r"'(base_model\.[^']+)'", str(w.message))]
    assert not [key for key in lost if not key.endswith(tuple(shared) or "\n")]
    assert "unexpected" not in " ".join(str(w.message) for w in said)
    assert_same(logits(theirs, batch), logits(model, batch))
    again = peft.load(tiny(architecture), tmp_path / "a")
    assert_same(logits(again.model, batch), logits(model, batch))
