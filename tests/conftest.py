"""What all tests share: tiny models of every architecture, built here, and real text."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

VOCAB = 64


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**decoder(), num_key_value_heads=2))


def qwen() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**decoder(), num_key_value_heads=2))


def gemma() -> nn.Module:
    """Tied embedding and head, embeddings scaled by sqrt(d)."""
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(
        **{**decoder(), "tie_word_embeddings": True}, num_key_value_heads=2, head_dim=8
    )
    return GemmaForCausalLM(config)


def gpt2() -> nn.Module:
    """Conv1D: weights stored transposed; tied embedding and head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, **dropouts)
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def t5() -> nn.Module:
    """Four modules share one embedding."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=0,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            image_size=8, patch_size=2, num_channels=1, num_labels=10,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def mixtral() -> nn.Module:
    """Fused experts: one 3-D tensor for all."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **decoder(), num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # the grouped product knows no fp64
    return model


def decoder() -> dict[str, Any]:
    """The shape of the tiny decoders."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    }


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (llama, qwen, gemma, gpt2, bert, t5, vit, mixtral)
}


@functools.cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ARCHITECTURES[name]().eval()


def tiny(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh tiny random model of an architecture, the same weights every time."""
    return copy.deepcopy(_built(name)).to(dtype)


def batch_for(name: str, rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch with labels that the architecture takes."""
    g = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {
            "pixel_values": torch.randn(rows, 1, 8, 8, generator=g),
            "labels": torch.randint(0, 10, (rows,), generator=g),
        }
    ids = torch.randint(3, VOCAB, (rows, 12), generator=g)
    return {"input_ids": ids, "labels": ids.clone()}


def cast(batch: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating inputs in another dtype."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def randomise(handle: Any, seed: int = 1, std: float = 0.05) -> None:
    """Set every trained tensor to random non-zero values: a zero B passes everything."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.trainable().values():
            noise = torch.randn(parameter.shape, generator=g)
            parameter.add_(std * noise.to(parameter.dtype))


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between runs is kept for these tests alone, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECKART_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
