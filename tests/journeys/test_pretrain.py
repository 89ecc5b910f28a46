"""`eckart pretrain`: from a preset or a configuration to a model that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from transformers import T5Config

from eckart.io.models import load_model, load_tokenizer
from eckart.io.presets import PRESETS, Preset
from tests.journeys.runs import eckart, model_folder, texts


@pytest.fixture
def small(monkeypatch):
    """A preset small enough for a test."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    monkeypatch.setitem(PRESETS, "llama-small", Preset("llama", shape, 300, "for a test"))
    return "llama-small"


def test_a_preset_gets_a_tokenizer_of_its_own_data_and_learns(small, tmp_path):
    data = texts(tmp_path / "d.jsonl", 200)
    out = tmp_path / "run"
    ran = eckart("pretrain", small, data, "train.steps=30", "train.lr=1e-2", "-o", out, "--json")
    assert ran.code == 0, ran.out
    found = ran.document
    assert found["recipe"]["weights"]["name"] == "dense"
    assert found["eval"]["after"]["loss"] < found["eval"]["before"]["loss"] - 1
    model, tokenizer = load_model(out / "final"), load_tokenizer(out / "final")
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.decode(tokenizer("low rank is enough")["input_ids"]) == "low rank is enough"
    assert json.loads((out / "final" / "config.json").read_text())["model_type"] == "llama"


def test_a_folder_gives_its_shape_and_tokenizer_but_not_its_weights(tmp_path):
    folder, data = model_folder(tmp_path / "m"), texts(tmp_path / "d.jsonl")
    out = tmp_path / "run"
    ran = eckart(
        "pretrain", folder, data, "update=galore", "update.rank=4", "train.steps=3", "-o", out
    )
    assert ran.code == 0, ran.err
    assert "dense + galore" in ran.err and "projected" in ran.err
    old, new = load_model(folder), load_model(out / "final")
    assert old.config.vocab_size == new.config.vocab_size == 257
    weights = old.model.layers[0].mlp.up_proj.weight, new.model.layers[0].mlp.up_proj.weight
    # random values of std 0.02 drawn anew: three steps do not carry one into the other
    assert torch.corrcoef(torch.stack([w.detach().flatten() for w in weights]))[0, 1] < 0.2


def test_terms_beside_random_weights_end_as_one_plain_model(small, tmp_path):
    data = texts(tmp_path / "d.jsonl")
    out = tmp_path / "run"
    ran = eckart("pretrain", small, data, "weights=lora", "train.steps=3", "-o", out)
    assert ran.code == 0, ran.err
    assert "lora leaves its matrices at random numbers; weights=dense trains them" in ran.err
    assert "plain transformers loads it" in ran.out
    load_model(out / "final")


def test_the_tokenizer_may_be_bytes_or_one_from_a_path(small, tmp_path):
    data, folder = texts(tmp_path / "d.jsonl"), model_folder(tmp_path / "m")
    for wanted in ("bytes", folder):
        out = tmp_path / Path(wanted).name
        words = (f"data.tokenizer={wanted}", "train.steps=1", "-o", out / "run")
        ran = eckart("pretrain", small, data, *words)
        assert ran.code == 0 and "vocab    257 tokens\n" in ran.err, ran.err
        assert len(load_tokenizer(out / "run")) == 257
    ran = eckart("pretrain", small, data, "data.tokenizer=./none", "-o", tmp_path / "no")
    assert ran.code == 3 and ran.err.startswith("no such file or folder\n  none\n"), ran.err


def test_an_adapter_is_no_shape(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    ran = eckart("pretrain", tmp_path / "a", texts(tmp_path / "d.jsonl"), "-o", tmp_path / "r")
    assert ran.code == 2 and "pretraining starts from a shape" in ran.err


def test_a_bare_configuration_of_an_encoder_decoder_is_enough(tmp_path):
    T5Config(
        vocab_size=300, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8
    ).save_pretrained(tmp_path)
    words = (tmp_path / "config.json", texts(tmp_path / "d.jsonl"), "train.steps=1")
    ran = eckart("pretrain", *words, "-o", tmp_path / "run")
    assert ran.code == 0, ran.err
    assert load_model(tmp_path / "run" / "final").config.decoder_start_token_id is not None
