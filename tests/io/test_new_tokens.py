"""Tokens added before attach: the embedding goes with the adapter, here and in plain PEFT."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests import tiny
from tests.journeys.runs import eckart as command
from tests.journeys.runs import model_folder, texts
from tests.tiny import logits, train_by_chance

import eckart
from eckart.errors import FileError
from eckart.io import native, peft
from eckart.io.corpora import bytes_tokenizer
from eckart.io.export import export, load
from eckart.io.models import load_model, load_tokenizer
from eckart.io.tensors import write_tensors

ROWS = tiny.VOCAB + 6
IDS = torch.arange(ROWS - 9, ROWS)[None]  # old tokens and new ones
MODELS = {"untied": tiny.llama, "tied": tiny.gemma}
TRAINED = {"untied": ("model.embed_tokens", "lm_head"), "tied": ("model.embed_tokens",)}


def with_new_tokens(kind, also=None):
    model = MODELS[kind]()
    model.resize_token_embeddings(ROWS)
    recipe = eckart.Recipe(weights=eckart.LoRA(rank=2))
    handle = eckart.attach(model, recipe, also_train=also or TRAINED[kind])
    train_by_chance(handle)
    return handle


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("form", ["native", "peft"])
def test_a_base_without_the_tokens_gets_them(kind, form, tmp_path):
    handle = with_new_tokens(kind)
    export(handle, tmp_path / "a", form)
    base = MODELS[kind]()
    again = load(tmp_path / "a", base)
    assert base.get_input_embeddings().num_embeddings == base.config.vocab_size == ROWS
    assert torch.equal(logits(again.model, IDS), logits(handle.model, IDS))
    export(again, tmp_path / "b", form)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("kind", MODELS)
def test_plain_peft_loads_them_on_a_resized_base(kind, tmp_path):
    handle = with_new_tokens(kind)
    peft.save(handle, tmp_path / "a")
    base = MODELS[kind]()
    base.resize_token_embeddings(ROWS)
    theirs = PeftModel.from_pretrained(base, tmp_path / "a")
    # fp32, the same products
    torch.testing.assert_close(logits(theirs, IDS), logits(handle.model, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("words", [None, ["embed_tokens"]], ids=["frozen", "trained"])
def test_what_peft_wrote_is_read_as_it_computes(kind, words, tmp_path):
    MODELS[kind]().save_pretrained(tmp_path / "m")  # PEFT looks there for the old size
    base = load_model(tmp_path / "m")
    base.resize_token_embeddings(ROWS)
    more = {"modules_to_save": words, "ensure_weight_tying": kind == "tied"} if words else {}
    theirs = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **more))
    tiny.move(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    ours = load(tmp_path / "a", MODELS[kind]())
    torch.testing.assert_close(logits(ours.model, IDS), logits(theirs, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("resize", [False, True], ids=["old", "resized"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tokens", [[3, 5], {"embed_tokens": [3, 5], "lm_head": [2]}], ids=str)
def test_rows_of_some_tokens_are_read_as_peft_computes(kind, tokens, resize, tmp_path):
    MODELS[kind]().save_pretrained(tmp_path / "m")
    base = load_model(tmp_path / "m")
    if resize:
        base.resize_token_embeddings(ROWS)
    if kind == "tied" and isinstance(tokens, dict):
        tokens = {"embed_tokens": [5, 3]}
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    theirs = get_peft_model(base, config)
    tiny.move(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    ours = load(tmp_path / "a", MODELS[kind]())
    ids = torch.arange(ROWS if resize else tiny.VOCAB)[None]
    torch.testing.assert_close(logits(ours.model, ids), logits(theirs, ids), rtol=0, atol=1e-5)
    export(ours, tmp_path / "b", "peft")
    again = load(tmp_path / "b", MODELS[kind]())
    assert torch.equal(logits(again.model, ids), logits(ours.model, ids))


@pytest.mark.parametrize("tokens", [[3], [3, 64], [3, 4, 5]], ids=str)
def test_rows_without_their_tokens_are_refused(tokens, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "m")
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    get_peft_model(load_model(tmp_path / "m"), config).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "trainable_token_indices": tokens}))
    with pytest.raises(FileError, match=r"shape \[2, 32\] for \d tokens up to \d+\n.* 64 tokens"):
        load(tmp_path / "a", tiny.llama())


def test_a_tied_pair_that_was_trained_apart_is_refused(tmp_path):
    tiny.gemma().save_pretrained(tmp_path / "m")
    base = load_model(tmp_path / "m")
    base.resize_token_embeddings(ROWS)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    theirs = get_peft_model(base, config)
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.modules_to_save["default"].weight.add_(0.1)
    theirs.save_pretrained(tmp_path / "a")
    fresh = tiny.gemma()
    with pytest.raises(FileError, match="does not act alike on both ends of a tied pair"):
        load(tmp_path / "a", fresh)
    assert fresh.get_input_embeddings().num_embeddings == tiny.VOCAB


def test_a_head_that_was_not_trained_has_its_new_rows_in_the_file_too(tmp_path):
    handle = with_new_tokens("untied", also=("model.embed_tokens",))
    assert not handle.model.lm_head.weight.requires_grad
    native.save(handle, tmp_path / "a")
    assert load_file(tmp_path / "a" / native.TENSORS)["lm_head.weight"].shape == (ROWS, 32)
    again = native.load(tiny.llama(), tmp_path / "a")
    assert torch.equal(logits(again.model, IDS), logits(handle.model, IDS))


def test_a_failure_leaves_the_base_with_its_old_tokens(tmp_path):
    native.save(with_new_tokens("tied"), tmp_path / "a")
    with pytest.raises(FileError, match="this adapter was made for another base"):
        native.load(tiny.gemma(seed=3), tmp_path / "a")
    file = tmp_path / "a" / native.TENSORS
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "lora" in name))
    write_tensors(file, tensors)
    base = tiny.gemma()
    before = {name: t.clone() for name, t in base.state_dict().items()}
    with pytest.raises(FileError, match="do not fit"):
        native.load(base, tmp_path / "a")
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert base.config.vocab_size == base.get_input_embeddings().num_embeddings == tiny.VOCAB
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(logits(base), logits(tiny.gemma()))


def test_the_adapter_writes_with_its_own_tokenizer(tmp_path):
    folder = model_folder(tmp_path / "m")
    model, tokenizer = load_model(folder), bytes_tokenizer()
    tokenizer.add_tokens(["<low>", "<rank>"])
    model.resize_token_embeddings(len(tokenizer))
    recipe = eckart.Recipe(weights=eckart.LoRA(rank=2))
    handle = eckart.attach(model, recipe, also_train=TRAINED["untied"])
    train_by_chance(handle)
    for form in ("native", "peft"):
        export(handle, tmp_path / form, form, tokenizer)
        assert len(load_tokenizer(tmp_path / form)) == len(tokenizer)
        ran = command("generate", tmp_path / form, "-p", "<low><rank>", "-n", 4, "--json")
        assert ran.code == 0, ran.err
        ids = tokenizer("<low><rank>", return_tensors="pt")["input_ids"]
        said = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        assert ran.document["texts"][0]["text"] == text


def test_a_run_goes_on_from_it_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    folder, data = model_folder(tmp_path / "m"), texts(tmp_path / "d.jsonl")
    model, tokenizer = load_model(folder), bytes_tokenizer()
    tokenizer.add_tokens(["<low>"])
    model.resize_token_embeddings(len(tokenizer))
    recipe = eckart.Recipe(weights=eckart.LoRA(rank=2))
    handle = eckart.attach(model, recipe, also_train=TRAINED["untied"])
    native.save(handle, tmp_path / "a", tokenizer=tokenizer)
    words = ("train.steps=4", "train.save_every=2", "-o", tmp_path / "run")
    ran = command("finetune", tmp_path / "a", data, *words)
    assert ran.code == 0, ran.err
    final = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert final["base_model.model.lm_head.weight"].shape[0] == len(tokenizer)
    (tmp_path / "run" / "final").rename(tmp_path / "final")
    (tmp_path / "run" / "checkpoints" / "step-4").rename(tmp_path / "step-4")
    ran = command("finetune", "--resume", tmp_path / "run")
    assert ran.code == 0, ran.err
    again = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in final.items())
