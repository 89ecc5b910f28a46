"""eckart.export and eckart.load: every format out and in, and the ones a method cannot have."""

import pytest
import torch
from tests import tiny
from tests.tiny import attached

import eckart
from eckart.errors import FileError, UsageError
from eckart.io.corpora import bytes_tokenizer
from eckart.io.export import WRITERS, possible


@pytest.fixture
def base(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny.llama().save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize(
    "method, formats",
    [
        (eckart.LoRA(rank=2), ["peft", "dense", "factored", "native", "kohya"]),
        (eckart.DoRA(rank=2), ["peft", "dense", "factored", "native"]),
        (eckart.LowRank(), ["dense", "factored", "native"]),
        (eckart.Dense(), ["dense", "native"]),
    ],
)
def test_each_method_says_which_formats_it_can_have(method, formats):
    assert possible(attached(tiny.llama(), method)) == formats


@pytest.mark.parametrize("format", ["peft", "native", "factored"])
def test_out_and_in_without_naming_the_base(base, tmp_path, format):
    handle = attached(base, eckart.LoRA(rank=3))
    eckart.export(handle, tmp_path / "a", format=format)
    again = eckart.load(tmp_path / "a")
    assert torch.equal(tiny.logits(again.model), tiny.logits(handle.model))


@pytest.mark.parametrize("format", ["peft", "native"])
def test_an_adapter_goes_onto_the_model_that_is_given(tmp_path, format):
    handle = attached(tiny.llama(), eckart.LoRA(rank=3))
    eckart.export(handle, tmp_path / "a", format=format)
    model = tiny.llama()
    assert eckart.load(tmp_path / "a", model=model).model is model
    assert torch.equal(tiny.logits(model), tiny.logits(handle.model))
    with pytest.raises(UsageError, match="does not say which base"):
        eckart.load(tmp_path / "a")


def test_peft_is_the_default(tmp_path):
    eckart.export(attached(tiny.llama(), eckart.LoRA(rank=2)), tmp_path / "a")
    assert (tmp_path / "a" / "adapter_config.json").is_file()


@pytest.mark.parametrize("format", WRITERS)
def test_a_tokenizer_is_saved_along(tmp_path, format):
    handle = attached(tiny.llama(), eckart.LoRA(rank=2))
    eckart.export(handle, tmp_path / "a", format=format, tokenizer=bytes_tokenizer())
    assert (tmp_path / "a" / "tokenizer.json").is_file()


def test_an_impossible_format_is_refused_with_the_possible_ones(tmp_path):
    with pytest.raises(UsageError) as fault:
        eckart.export(attached(tiny.llama(), eckart.LowRank()), tmp_path / "a", format="peft")
    assert str(fault.value) == (
        "this cannot be written as peft\n"
        "  lowrank  it changes the base itself, and PEFT's files hold what is added to one\n"
        "Possible: dense, factored, native."
    )
    assert not (tmp_path / "a").exists()


def test_an_unknown_format_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="Did you mean dense"):
        eckart.export(attached(tiny.llama(), eckart.LoRA(rank=2)), tmp_path / "a", format="dens")


def test_an_ordinary_model_is_not_for_load(base, tmp_path):
    with pytest.raises(UsageError, match="carries nothing of eckart"):
        eckart.load(tmp_path / "base")
    with pytest.raises(FileError, match="no such file or folder"):
        eckart.load("nothing")


def test_a_whole_model_wants_no_base(tmp_path):
    handle = attached(tiny.llama(), eckart.LoRA(rank=2))
    eckart.export(handle, tmp_path / "a", format="factored")
    with pytest.raises(UsageError, match="whole model, not an adapter"):
        eckart.load(tmp_path / "a", model=tiny.llama())
