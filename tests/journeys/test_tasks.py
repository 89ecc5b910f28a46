"""Models that fill in words, answer one text by another, or tag: from data to plain reload."""

import json

import pytest
import torch
from safetensors.torch import load_file

from eckart.io.corpora import MASK, bytes_tokenizer, train_tokenizer
from eckart.io.models import load_model, load_tokenizer
from eckart.io.opening import open_model
from eckart.io.presets import build_model
from eckart.io.run import read_metrics
from eckart.jobs.training import fit
from tests.journeys.runs import TALK, WORDS, eckart, labels, texts

SIZE = {
    "bert": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 48, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "t5": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, "dropout_rate": 0.0,
    },
}  # fmt: skip


def shape(folder, kind: str, tokenizer, weights: bool = True):
    """A tiny model of a kind on disk, or its configuration alone."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SIZE[kind])
    if weights:
        build_model(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    texts(folder / "d.jsonl")
    reading = train_tokenizer([TALK] * 3, 300, special=(MASK,))
    shape(folder / "bert", "bert", reading)
    shape(folder / "t5", "t5", bytes_tokenizer())
    questions = [{"prompt": f"say {w}", "completion": w} for w in WORDS * 4]
    tags = [
        {"tokens": words, "tags": ["B" if word[0] in "lime" else "O" for word in words]}
        for words in (WORDS[i % 7 :][:6] for i in range(40))
    ]
    for name, rows in (("q.jsonl", questions), ("n.jsonl", tags)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentences = [
        "\n".join(f"{a} - {b}" for a, b in zip(*row.values(), strict=True)) for row in tags
    ]
    (folder / "n.conll").write_text("\n\n".join(sentences) + "\n")
    return folder


@pytest.fixture(scope="module")
def filled(place):
    ran = eckart(
        "finetune", place / "bert", place / "d.jsonl", "train.steps=30", "train.lr=2e-2",
        "data.eval=0.2", "weights.targets=[attn,mlp]", "-o", place / "filled",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return ran


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


# --- filling in ----------------------------------------------------------------------------


def test_a_preset_learns_to_fill_in_words_with_a_tokenizer_of_its_own(place, tmp_path, monkeypatch):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from eckart.io.presets import PRESETS, Preset

    monkeypatch.setitem(PRESETS, "bert-small", Preset("bert", SIZE["bert"], 300, "for a test"))
    out = tmp_path / "run"
    ran = eckart(
        "pretrain", "bert-small", place / "d.jsonl", "train.steps=30", "train.lr=1e-2",
        "data.eval=0.2", "-o", out, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.out
    before, after = ran.document["eval"]["before"], ran.document["eval"]["after"]
    assert after["loss"] < before["loss"] - 1
    assert 0 <= after["accuracy"] <= 1 and "bits_per_byte" not in after
    model = AutoModelForMaskedLM.from_pretrained(out / "final")
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    assert tokenizer.mask_token == MASK and model.config.vocab_size == len(tokenizer)
    assert model.config.architectures == ["BertForMaskedLM"]
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_an_adapter_that_fills_in_words_loads_in_plain_peft(filled, place):
    from peft import PeftModel
    from transformers import AutoModelForMaskedLM

    facts = json.loads((place / "filled" / "run.json").read_text())["eval"]
    assert facts["after"]["loss"] < facts["before"]["loss"]
    assert "loss on 15 % of the tokens, masked" in filled.err
    base = AutoModelForMaskedLM.from_pretrained(place / "bert")
    theirs = PeftModel.from_pretrained(base, place / "filled" / "final")
    inputs = load_tokenizer(place / "bert")(f"low {MASK} is enough", return_tensors="pt")
    ids = {"input_ids": inputs["input_ids"]}
    ours = logits(open_model(place / "filled").model, ids)
    # merged nowhere: the same products in the same order but for the scale's place
    torch.testing.assert_close(logits(theirs, ids), ours, rtol=0, atol=1e-5)
    plain = AutoModelForMaskedLM.from_pretrained(place / "bert")
    assert not torch.allclose(logits(plain, ids), ours, atol=1e-2)


def test_gaps_are_shown_with_the_likeliest_tokens(filled, place):
    ran = eckart("generate", place / "filled", "-p", f"low {MASK} is enough for {MASK}")
    assert ran.code == 0, ran.err
    text, first, second = ran.out.splitlines()
    assert text.startswith("low ") and MASK not in text and " is enough for" in text
    shares = [float(entry.split()[-1]) for entry in first.strip().split("   ")]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and second.startswith("  ")
    ran = eckart("generate", place / "filled", "-p", f"low {MASK}", "--json")
    (found,) = ran.document["texts"]
    best = found["gaps"][0][0]
    assert found["text"].startswith("low ") and found["text"].endswith(best["token"].strip())
    ran = eckart("generate", place / "filled", "-p", "low rank")
    assert (ran.code, ran.out, ran.err) == (
        2,
        "",
        f"the prompt has no gap to fill\n  low rank  no {MASK}\nType -p 'low {MASK} ...'\n",
    )


def test_eval_measures_the_same_hidden_words_as_the_training(filled, place):
    after = json.loads((place / "filled" / "run.json").read_text())["eval"]["after"]
    ran = eckart("eval", place / "filled", place / "d.jsonl", "data.eval=0.2", "--json")
    assert ran.code == 0, ran.out
    # one row at a time here, padded batches there
    assert ran.document["eval"]["loss"] == pytest.approx(after["loss"], abs=1e-5)
    assert ran.document["eval"]["accuracy"] == pytest.approx(after["accuracy"], abs=1e-9)


def stop_at(monkeypatch, step: int) -> None:
    """A Ctrl-C heard at the end of a step."""
    told = fit.Interrupt.on_step_end

    def asked(self, args, state, control, **more):
        self.asked = self.asked or state.global_step == step
        return told(self, args, state, control, **more)

    monkeypatch.setattr(fit.Interrupt, "on_step_end", asked)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_resumed_run_sees_the_same_holes(place, tmp_path, monkeypatch, kind):
    words = ["finetune", place / kind, place / "d.jsonl", "train.batch_size=16", "train.steps=12"]
    words += ["weights.dropout=0.1", "data.eval=0"]  # three epochs of 60 rows
    assert eckart(*words, "-o", tmp_path / "whole").code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert eckart(*words, "-o", tmp_path / "run").code == 130
    ran = eckart("finetune", "--resume", tmp_path / "run")
    assert ran.code == 0, ran.err
    one, two = (
        load_file(tmp_path / name / "final" / "adapter_model.safetensors")
        for name in ("whole", "run")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_holes_move_from_epoch_to_epoch(place, tmp_path, monkeypatch):
    from eckart.io.noise import Noised

    seen: dict[int, set] = {}
    get = Noised.__getitem__

    def noted(self, i):
        row = get(self, i)
        if self.epoch >= 0 and i == 3:
            seen.setdefault(self.epoch, set()).add(tuple(row["labels"].tolist()))
        return row

    monkeypatch.setattr(Noised, "__getitem__", noted)
    words = ["train.batch_size=20", "train.steps=9", "data.eval=0"]
    ran = eckart("finetune", place / "bert", place / "d.jsonl", *words, "-o", tmp_path / "r")
    assert ran.code == 0, ran.err
    assert set(seen) == {0, 1, 2} and all(len(labels) == 1 for labels in seen.values())
    assert len(set.union(*seen.values())) == 3


# --- answering -----------------------------------------------------------------------------


def test_an_encoder_decoder_learns_answers_and_loads_in_plain_peft(place, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    out = tmp_path / "run"
    ran = eckart(
        "finetune", place / "t5", place / "q.jsonl", "method=dense", "train.steps=100",
        "train.lr=1e-2", "data.eval=0.1", "-o", out, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.out
    after = ran.document["eval"]["after"]
    assert after["loss"] < ran.document["eval"]["before"]["loss"] - 1
    assert after["bits_per_byte"] == pytest.approx(after["loss"] / 0.6931, rel=0.3)
    model = AutoModelForSeq2SeqLM.from_pretrained(out / "final")
    assert model.config.architectures == ["T5ForConditionalGeneration"]

    adapter = tmp_path / "adapter"
    words = ["train.steps=4", "train.lr=1e-2", "-o", adapter]
    assert eckart("finetune", out / "final", place / "q.jsonl", *words).code == 0
    described = json.loads((adapter / "final" / "adapter_config.json").read_text())
    assert described["task_type"] == "SEQ_2_SEQ_LM"
    base = AutoModelForSeq2SeqLM.from_pretrained(out / "final")
    theirs = PeftModel.from_pretrained(base, adapter / "final")
    inputs = load_tokenizer(out)("say rank", return_tensors="pt")
    ids = {"input_ids": inputs["input_ids"], "decoder_input_ids": torch.zeros(1, 1, dtype=int)}
    ours = open_model(adapter).model
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids), rtol=0, atol=1e-5)

    ran = eckart("eval", adapter, place / "q.jsonl")
    assert ran.code == 0 and "exact" in ran.out, ran.err
    ran = eckart("generate", out, "-p", "say rank", "-p", "say low", "-n", 8, "--json")
    assert ran.code == 0, ran.err
    tokenizer = load_tokenizer(out)
    for said in ran.document["texts"]:
        ids = tokenizer(said["prompt"], return_tensors="pt")["input_ids"]
        plain = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=0)
        assert said["text"] == tokenizer.decode(plain[0], skip_special_tokens=True)
    assert len({said["text"] for said in ran.document["texts"]}) == 2, "the question is heard"
    texts = [said["text"] for said in ran.document["texts"]]
    ran = eckart("generate", out, "-p", "say rank", "-p", "say low", "-n", 8)
    assert ran.out == f"say rank\n  {texts[0]}\nsay low\n  {texts[1]}\n"


def test_a_small_t5_is_pretrained_on_spans(place, tmp_path, monkeypatch):
    from transformers import AutoModelForSeq2SeqLM

    from eckart.io.presets import PRESETS, Preset

    monkeypatch.setitem(PRESETS, "t5-small-one", Preset("t5", SIZE["t5"], 320, "for a test"))
    out = tmp_path / "run"
    ran = eckart(
        "pretrain", "t5-small-one", place / "d.jsonl", "train.steps=20", "train.lr=1e-2",
        "data.eval=0.2", "-o", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "loss on spans left out, 15 % of the tokens" in ran.err
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out / "final"), load_tokenizer(out)
    assert model.config.decoder_start_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert eckart("generate", out, "-p", "low <extra_id_0> enough", "-n", 5).code == 0


def test_text_without_sentinels_is_cut_in_two(place, tmp_path):
    ran = eckart("finetune", place / "t5", place / "d.jsonl", "train.steps=2", "-o", tmp_path / "r")
    assert ran.code == 0 and "loss on the second part of each text" in ran.err


# --- tagging -------------------------------------------------------------------------------


def test_words_are_tagged_and_the_adapter_loads_in_plain_peft(place, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForTokenClassification

    out = tmp_path / "run"
    ran = eckart(
        "finetune", place / "bert", place / "n.conll", "train.steps=30", "train.lr=2e-2",
        "data.eval=0.2", "-o", out, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.out
    assert ran.document["eval"]["after"]["accuracy"] > 0.95
    base = AutoModelForTokenClassification.from_pretrained(place / "bert", num_labels=2)
    theirs = PeftModel.from_pretrained(base, out / "final")
    ids = {"input_ids": load_tokenizer(place / "bert")(TALK, return_tensors="pt")["input_ids"]}
    choice = logits(theirs, ids).argmax(-1)
    assert set(choice.unique().tolist()) == {0, 1}
    ran = eckart("eval", out, place / "n.jsonl", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["eval"]["accuracy"] > 0.95 and ran.document["format"] == "tokens+tags"

    thin = tmp_path / "thin"  # of fewer ranks, on a base that has another head: its own comes along
    ran = eckart("convert", out, "--to", "lora", "rank=4", "-o", thin, "--json")
    assert ran.code == 0 and not ran.document["exact"], ran.out
    same = logits(PeftModel.from_pretrained(base, thin), ids).argmax(-1) == choice
    assert same.float().mean() > 0.9  # of 26 tokens, a few near the border
    ran = eckart("convert", out, "--to", "native", "-o", tmp_path / "own")
    assert ran.code == 0, ran.err
    with pytest.raises(ValueError, match=r"type eckart\.load"):  # else a model of random matrices
        AutoModelForTokenClassification.from_pretrained(tmp_path / "own")


def test_a_tagger_trained_whole_knows_its_tags(place, tmp_path):
    from transformers import AutoModelForTokenClassification

    out = tmp_path / "run"
    words = ["method=dense", "train.steps=20", "train.lr=5e-3", "-o", out]
    ran = eckart("finetune", place / "bert", place / "n.jsonl", *words)
    assert ran.code == 0, ran.err
    model = AutoModelForTokenClassification.from_pretrained(out / "final")
    assert model.config.id2label == {0: "B", 1: "O"}
    ran = eckart("eval", out, place / "n.conll")
    assert ran.code == 0 and "accuracy" in ran.out
    ran = eckart("generate", out, "-p", "low rank", "--json")
    (found,) = ran.document["texts"]
    assert [(c["word"], c["class"]) for c in found["classes"]] == [("low", "B"), ("rank", "O")]
    ran = eckart("finetune", out, place / "d.jsonl", "-o", tmp_path / "no")
    assert ran.code == 2 and ran.err.startswith("this model gives classes, and the data is text\n")


# --- what holds for all --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data"), [("bert", "d"), ("bert", "n"), ("t5", "q"), ("bert", "l")]
)
def test_a_step_is_the_same_however_its_rows_are_split(place, tmp_path, kind, data):
    """Models that ignore the number of labels give means, to be weighted by their labels."""
    file = place / f"{data}.jsonl"
    if data == "l":
        file = tmp_path / "l.jsonl"
        file.write_text("".join(f'{{"text": "low rank", "label": {i % 2}}}\n' for i in range(16)))
    if data in "dq":  # of many lengths, so that the halves have other numbers of labels
        said = [TALK[: 8 + 4 * i] for i in range(16)]
        rows = [{"text": s} if data == "d" else {"prompt": "say", "completion": s} for s in said]
        file = tmp_path / "many.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    norms = []
    for size, parts in ((8, 1), (4, 2)):
        out = tmp_path / f"{size}"
        words = [f"train.batch_size={size}", f"train.accumulate={parts}", "train.steps=1"]
        words += ["data.eval=0", "train.clip=null", "-o", out]
        ran = eckart("finetune", place / kind, file, *words)
        assert ran.code == 0, ran.err
        norms += [row["grad_norm"] for row in read_metrics(out) if "grad_norm" in row]
    assert len(norms) == 2
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # fp32 sums in another order


def test_questions_are_not_for_a_model_that_fills_in_words(place, tmp_path):
    ran = eckart("finetune", place / "bert", place / "q.jsonl", "-o", tmp_path / "r")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith(
        "this model fills in words and does not answer\n"
        "  prompt+completion  loss on completions\n"
        "Give it text, text + label or tokens + tags, or take a decoder (llama, gpt2, ...).\n"
    )
    assert not (tmp_path / "r").exists()


def test_a_tokenizer_without_a_mask_is_named(place, tmp_path):
    folder = shape(tmp_path / "b", "bert", bytes_tokenizer())
    ran = eckart("finetune", folder, place / "d.jsonl", "-o", tmp_path / "r")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.endswith(
        "the tokenizer has no mask token\n"
        f"  {folder}  257 tokens\n"
        "Name one and save it: tokenizer.add_special_tokens({'mask_token': '[MASK]'}).\n"
    )


def test_a_tokenizer_that_ends_no_text_is_named_where_a_class_is_read_there(place, tmp_path):
    ran = eckart("finetune", place / "t5", labels(place / "l.jsonl"), "-o", tmp_path / "r")
    assert (ran.code, ran.out) == (2, "")
    assert "reads a text's class at its end token, which the tokenizer does not write" in ran.err


def test_an_encoder_decoder_gives_classes_and_its_adapter_keeps_the_head(place, tmp_path):
    from peft import PeftModel
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = train_tokenizer([TALK] * 3, 300, special=(MASK, "[PAD]"))
    tokenizer.pad_token = "[PAD]"
    end, ends = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(f"$A {end}", None, [(end, ends)])
    tokenizer.save_pretrained(tmp_path / "m")
    sizes = {**SIZE["t5"], "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model("t5", vocab_size=len(tokenizer), **sizes)
    build_model(config).save_pretrained(tmp_path / "m")
    data = labels(tmp_path / "l.jsonl")
    ran = eckart("finetune", tmp_path / "m", data, "train.steps=4", "-o", tmp_path / "r", "--json")
    assert ran.code == 0, ran.err
    again = eckart("eval", tmp_path / "r", data, "--json")
    assert again.code == 0, again.err
    config = AutoConfig.from_pretrained(tmp_path / "r" / "final")
    assert config.id2label == {0: "no", 1: "yes"}
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", config=config)
    theirs = PeftModel.from_pretrained(base, tmp_path / "r" / "final").eval()
    ids = tokenizer("low low", return_tensors="pt")["input_ids"]
    ours = open_model(tmp_path / "r").model.eval()
    with torch.no_grad():
        # fp32, the same products in another order
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-4)


def test_a_shape_with_a_tokenizer_is_pretrained_as_what_it_is(place, tmp_path):
    tokenizer = train_tokenizer([TALK] * 3, 300, special=(MASK,))
    folder = shape(tmp_path / "b", "bert", tokenizer, weights=False)
    out = tmp_path / "r"
    ran = eckart("pretrain", folder, place / "d.jsonl", "train.steps=2", "-o", out)
    assert ran.code == 0, ran.err
    assert type(load_model(out / "final")).__name__ == "BertForMaskedLM"
