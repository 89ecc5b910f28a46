"""A factored model is at home in transformers: loaded, trained, generated from, saved again."""

import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.tiny import attached
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

import eckart
import eckart.hf
from eckart.errors import FileError, UsageError
from eckart.io import factored
from eckart.io.corpora import bytes_tokenizer
from eckart.linear import Structured

METHODS = {
    "lora": eckart.LoRA(rank=4, targets=("linear", "embedding")),
    "dora": eckart.DoRA(rank=4),
    "pissa": eckart.LoRA(rank=4, init="pissa"),
    "lowrank": eckart.LowRank(),
}


def assert_same_logits(a, b):
    # The same tensors; DoRA's norms are sums that another alignment in memory may reorder
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def two_steps(model):
    """Two steps of a plain loop, so that what is saved next was trained after loading."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture
def saved(tmp_path):
    """A factored tiny Llama without its dense matrices, and its logits."""
    handle = attached(tiny.llama(), METHODS["lowrank"])
    factored.save(handle, tmp_path / "a")
    return tmp_path / "a", tiny.logits(handle.model)


# --- the law: load, train two steps, save, load ----------------------------------------------


@pytest.mark.parametrize("kind", tiny.MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_load_train_save_load(kind, method, tmp_path):
    handle = attached(tiny.MODELS[kind](), METHODS[method])
    factored.save(handle, tmp_path / "a", max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1

    first = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert_same_logits(tiny.logits(first), tiny.logits(handle.model))
    assert trained(first) == trained(handle.model)
    assert type(first) is type(tiny.MODELS[kind]())
    assert first.config.model_type == tiny.MODELS[kind]().config.model_type

    before = tiny.logits(first)
    two_steps(first)
    assert not torch.allclose(tiny.logits(first), before, atol=1e-3)
    first.save_pretrained(tmp_path / "b")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert_same_logits(tiny.logits(second), tiny.logits(first))
    assert json_of(tmp_path / "a") == json_of(tmp_path / "b")


def json_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_a_class_of_its_own_loads_it_as_well(kind, tmp_path):
    handle = attached(tiny.MODELS[kind](), METHODS["lora"])
    factored.save(handle, tmp_path / "a")
    model = type(handle.model).from_pretrained(tmp_path / "a")
    assert_same_logits(tiny.logits(model), tiny.logits(handle.model))
    assert not hasattr(model.config, "transformers_weights")


def test_the_body_alone_and_another_head(saved):
    folder, _ = saved
    whole = AutoModelForCausalLM.from_pretrained(folder)
    body = AutoModel.from_pretrained(folder)
    expected = whole.model(tiny.ids()).last_hidden_state
    assert torch.equal(body(tiny.ids()).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert torch.equal(classifier.model(tiny.ids()).last_hidden_state, expected)
    assert any(isinstance(m, Structured) for m in classifier.modules())


# --- at home in transformers ------------------------------------------------------------------


def test_generate_pipeline_and_a_device_map(saved):
    folder, expected = saved
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert torch.equal(tiny.logits(model), expected)
    longer = model.generate(tiny.ids(1, 4), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert longer.shape == (1, 7)
    step = tiny.logits(model, longer[:, :-1])[:, -1].argmax(-1)
    assert step.item() == longer[0, -1]


def test_a_tokenizer_is_written_beside(tmp_path):
    tokenizer = bytes_tokenizer()
    handle = attached(tiny.llama(vocab_size=len(tokenizer)), METHODS["lora"])
    factored.save(handle, tmp_path / "a", tokenizer=tokenizer)
    answer = pipeline("text-generation", str(tmp_path / "a"), device="cpu")("ab", max_new_tokens=2)
    assert answer[0]["generated_text"].startswith("ab")


def test_a_loaded_model_shows_no_trace_of_a_quantizer(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    assert not hasattr(model, "hf_quantizer") and not getattr(model, "is_quantized", False)
    assert getattr(model.config, "quantization_config", None) is None
    assert model.double().dtype == torch.float64  # transformers forbids it to quantised models


def test_the_handle_of_a_loaded_model(saved):
    handle = eckart.hf.handle_of(AutoModelForCausalLM.from_pretrained(saved[0]))
    assert handle.weights == METHODS["lowrank"]
    merged = handle.merge()
    bound = 1e-5 * float(saved[1].abs().max())
    torch.testing.assert_close(tiny.logits(merged), saved[1], rtol=0, atol=bound)
    assert eckart.hf.handle_of(tiny.llama()) is None


def test_fp32_terms_stay_fp32_beside_a_bf16_base(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    handle = attached(base, METHODS["lora"])
    factored.save(handle, tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    kinds = {name.rsplit(".", 1)[-1]: p.dtype for name, p in model.named_parameters()}
    assert kinds["A"] == kinds["B"] == torch.float32 and kinds["weight"] == torch.bfloat16
    assert torch.equal(tiny.logits(model), tiny.logits(handle.model))


def test_a_dropped_base_follows_the_dtype_asked_for(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(saved[0], dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_locked_configuration_is_copied_and_pickled(saved):
    config = AutoConfig.from_pretrained(saved[0])
    again = pickle.loads(pickle.dumps(config))
    assert isinstance(config, LlamaConfig) and config.model_type == "llama"
    assert again.to_dict() == config.to_dict()
    assert again.to_dict()["base_model_type"] == "llama"


# --- what is refused --------------------------------------------------------------------------


def test_a_missing_term_is_named_and_not_filled(saved):
    from safetensors.torch import save_file

    file = saved[0] / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.factors.A"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FileError, match=r"q_proj\.factors\.A +missing or misshapen"):
        AutoModelForCausalLM.from_pretrained(saved[0])


def test_an_architecture_that_transformers_lacks_is_named(saved):
    path = saved[0] / "config.json"
    path.write_text(json.dumps({**json_of(saved[0]), "base_model_type": "lama"}))
    with pytest.raises(FileError, match="base_model_type = lama"):
        AutoModelForCausalLM.from_pretrained(saved[0])


def test_a_model_without_terms_is_refused(tmp_path):
    with pytest.raises(UsageError, match="ordinary model"):
        factored.save(attached(tiny.llama(), eckart.Dense()), tmp_path / "a")


def test_the_size_lock_stops_a_loader_that_brings_its_own_configuration(saved):
    """Without it LlamaForCausalLM would run on random matrices and only warn."""
    held = load_file(saved[0] / "model.safetensors")
    assert [name for name, tensor in held.items() if not tensor.numel()] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    plain = LlamaConfig(**tiny.llama().config.to_dict())
    with pytest.raises(RuntimeError, match=r"size|mismatch"):
        LlamaForCausalLM.from_pretrained(saved[0], config=plain)


PLAIN = """
import sys, transformers
for cls in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", sys.argv[2]):
    try:
        getattr(transformers, cls).from_pretrained(sys.argv[1])
        print(cls, "loaded")
    except Exception as fault:
        print(cls, "refused", type(fault).__name__, "import eckart.hf" in str(fault))
assert not any(name.startswith("eckart") for name in sys.modules)
"""


def without_eckart(folder, cls):
    command = [sys.executable, "-c", textwrap.dedent(PLAIN), str(folder), cls]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_what_a_foreign_loop_saves_is_refused_without_eckart_and_whole_with_it(kind, tmp_path):
    """save_pretrained and Trainer do not know of the terms: without a lock they write the base."""
    handle = attached(tiny.MODELS[kind](), METHODS["lora"])
    model, expected = handle.model, tiny.logits(handle.model)
    before = set(model.state_dict())
    model.save_pretrained(tmp_path / "a")
    options = TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True, max_steps=1)
    Trainer(model, options).save_model(tmp_path / "b")
    assert set(model.state_dict()) == before

    name = type(model).__name__
    if kind == "llama":  # a fresh process takes a while
        assert without_eckart(tmp_path / "a", name) == [
            "AutoConfig refused ValueError False",
            "AutoModel refused ValueError False",
            "AutoModelForCausalLM refused ValueError False",
            f"{name} refused ValueError True",
        ]
    for folder in ("a", "b"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(tiny.logits(again), expected)


def test_a_plain_trainer_trains_and_saves_a_loaded_model(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    rows = [{"input_ids": row, "labels": row} for row in tiny.ids(4, 8)]
    options = TrainingArguments(
        str(tmp_path / "run"), report_to=[], use_cpu=True, max_steps=2, save_steps=2
    )
    Trainer(model, options, train_dataset=rows).train()
    assert not torch.allclose(tiny.logits(model), saved[1], atol=1e-5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_merged_or_removed_the_model_saves_as_an_ordinary_one(tmp_path):
    handle = attached(tiny.llama(), METHODS["lora"])
    handle.remove().save_pretrained(tmp_path / "a")
    assert "eckart" not in (tmp_path / "a" / "config.json").read_text()
    assert torch.equal(
        tiny.logits(LlamaForCausalLM.from_pretrained(tmp_path / "a")), tiny.logits(tiny.llama())
    )
