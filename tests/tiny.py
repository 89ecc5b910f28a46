"""Tiny random models and trained-looking adapters for tests, the same every time."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from eckart.recipe import Recipe, attach

VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def built(cls, config, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).eval()


def llama(seed=0, **changes):
    config = LlamaConfig(**{**SHAPE, "num_key_value_heads": 2, **changes})
    return built(LlamaForCausalLM, config, seed)


def gemma(seed=0, **changes):
    """Tied embedding and head, embedding scaled by sqrt(d)."""
    shape = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    return built(GemmaForCausalLM, GemmaConfig(**{**shape, **changes}), seed)


def gpt2(seed=0, **changes):
    """Conv1D layers, tied embedding and head."""
    shape = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**{**shape, "bos_token_id": 0, "eos_token_id": 1, **changes})
    return built(GPT2LMHeadModel, config, seed)


def mixtral(seed=0, **changes):
    """Fused experts."""
    shape = {**SHAPE, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return built(MixtralForCausalLM, MixtralConfig(**{**shape, **changes}), seed)


def bert(seed=0, **changes):
    """An encoder with a classification head."""
    config = BertConfig(**{**SHAPE, "pad_token_id": 0, "num_labels": 3, **changes})
    return built(BertForSequenceClassification, config, seed)


MODELS = {"llama": llama, "gemma": gemma, "gpt2": gpt2, "mixtral": mixtral}


def ids(batch=2, length=9, seed=5):
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens=None):
    return model.eval()(input_ids=ids() if tokens is None else tokens).logits


def attached(model, method, **options):
    """A handle of the method on the model, every trained tensor moved from its start."""
    handle = attach(model, Recipe(weights=method), **options)
    train_by_chance(handle)
    return handle


def train_by_chance(handle, seed=7):
    """Give every trained tensor other values than it started with, none of them zero."""
    move(handle.trainable().values(), seed)


@torch.no_grad()
def move(tensors, seed=7):
    """The same for any tensors."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        tensor.add_(0.1 * noise)
