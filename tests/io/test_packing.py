"""Packed examples are computed as if each were alone; batches and shuffles hold no state."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eckart.io.packing import (
    IGNORE,
    Collate,
    Encoded,
    Shuffled,
    fit,
    isolates_documents,
    order,
    pack,
    pieces,
    repeated,
    rows,
)

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
GROUPED = {**SHAPE, "num_key_value_heads": 1, "head_dim": 16}
SLIDING = {
    **GROUPED,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100}
OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 64,
    "vocab_size": 100,
    "word_embed_proj_dim": 32,
}
ARCHITECTURES = {
    "llama": SHAPE,
    "qwen2": {**SHAPE, "num_key_value_heads": 1},
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma3_text": SLIDING,
    "mixtral": {**SHAPE, "num_key_value_heads": 1},
    "gpt2": GPT2,
}


def model_of(kind, shape, attention="sdpa"):
    config = AutoConfig.for_model(kind, attn_implementation=attention, **shape)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def example(length, start=0):
    ids = (np.arange(length, dtype=np.int32) * 7 + start) % 90 + 1
    return Encoded(ids, np.ones(length, bool))


def encoded(*lengths):
    return [example(length, 13 * i) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_packed_example_has_the_logits_it_has_alone(kind, attention):
    model = model_of(kind, ARCHITECTURES[kind], attention)
    examples = encoded(7, 2, 5, 9)
    packed = Collate()(list(pack(examples, 25, pad=0)))  # two tokens of padding at the end
    labels = packed.pop("labels")
    with torch.no_grad():
        logits = model(**packed).logits[0]
        at = 0
        for e in examples:
            ids = torch.as_tensor(e.ids.astype(np.int64))[None]
            alone = model(input_ids=ids).logits[0]
            # fp32 (eager softmax and Mixtral's experts know no fp64), logits up to 0.6, sums in
            # another order: 2e-7 measured; an example that sees its neighbour is off by 5e-2
            torch.testing.assert_close(logits[at : at + len(e.ids)], alone, rtol=0, atol=2e-6)
            assert labels[0, at] == IGNORE
            at += len(e.ids)
    assert (labels[0, at:] == IGNORE).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_a_cache_packed_examples_would_see_each_other(kind):
    """Why the batch carries use_cache=False: should this fail, transformers has changed."""
    model = model_of(kind, ARCHITECTURES[kind])
    batch = Collate()(list(pack(encoded(7, 5), 12, pad=0)))
    assert batch["use_cache"] is False
    with torch.no_grad():
        apart = model(**batch).logits
        batch["use_cache"] = True
        assert (model(**batch).logits - apart).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures_that_isolate_are_told_from_those_that_do_not(kind):
    model = model_of(kind, ARCHITECTURES[kind])
    assert isolates_documents(model.bfloat16())
    assert not isolates_documents(model_of("opt", OPT))


def test_asking_leaves_the_model_as_it_was():
    model = model_of("llama", SHAPE).train()
    before = torch.get_rng_state()
    isolates_documents(model)
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_packed_and_padded_rows_give_the_same_loss():
    model = model_of("llama", SHAPE).double()
    examples = encoded(7, 2, 5, 9)
    with torch.no_grad():
        packed = model(**Collate()(list(pack(examples, 25, pad=0)))).loss
        padded = model(**Collate()(list(rows(examples)))).loss
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-12)  # fp64


def test_blocks_hold_every_example_once_and_are_nearly_full():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 500).tolist()
    blocks = fit(lengths, 128)
    assert sorted(i for block in blocks for i in block) == list(range(500))
    assert max(sum(lengths[i] for i in block) for block in blocks) <= 128
    assert sum(lengths) / (128 * len(blocks)) > 0.95
    assert fit(lengths, 128) == blocks


def test_a_long_document_is_cut_into_pieces_that_lose_no_token():
    long = example(23)
    cut = pieces(long, 10)
    assert [len(p.ids) for p in cut] == [10, 10, 3]
    assert np.array_equal(np.concatenate([p.ids for p in cut]), long.ids)


def test_padding_is_on_the_right_and_without_labels():
    batch = Collate(pad=99)(list(rows(encoded(3, 5))))
    assert batch["input_ids"][0, 3:].tolist() == [99, 99]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"][0, 3:].tolist() == [IGNORE, IGNORE] and batch["labels"][0, 0] == IGNORE


def test_a_shuffle_depends_on_seed_and_epoch_alone():
    np.random.seed(1)
    torch.manual_seed(1)
    a = order(1000, 3, 1)
    np.random.seed(2)
    torch.manual_seed(2)
    assert np.array_equal(a, order(1000, 3, 1))
    assert sorted(a) == list(range(1000))
    assert not np.array_equal(a, order(1000, 3, 2)) and not np.array_equal(a, order(1000, 4, 1))
    assert order(5, 0, 0).tolist() == [4, 0, 1, 3, 2]  # the same on every machine, for ever


def test_the_sampler_follows_its_epoch():
    sampler = Shuffled(20, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == order(20, 3, 1).tolist() != first and len(sampler) == 20


def test_a_weight_repeats_whole_copies_and_a_fixed_share():
    data = rows(encoded(*[3] * 10))
    many = repeated(data, 2.5, "x")
    assert len(many) == 25 and many["input_ids"] == repeated(data, 2.5, "x")["input_ids"]
    assert len(repeated(data, 0.3, "x")) == 3
    assert repeated(data, 1.0, "x") is data


def test_packed_batches_pass_through_trainer_as_they_are(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = model_of("llama", SHAPE)
    data = pack(encoded(7, 2, 5, 9, 8, 8), 12, pad=0)
    seen = []
    inner = model.forward

    def forward(input_ids=None, labels=None, position_ids=None, use_cache=None, **rest):
        seen.append((use_cache, position_ids.tolist()))
        return inner(
            input_ids=input_ids, labels=labels, position_ids=position_ids, use_cache=use_cache
        )

    model.forward = forward
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    model.config.use_cache = True
    Trainer(model, arguments, train_dataset=data, data_collator=Collate()).train()
    assert len(seen) == 2 and all(cache is False for cache, _ in seen)
    assert all(row in data["position_ids"] for _, rows in seen for row in rows)
