"""Presets: model shapes by name, for `pretrain`; plain data, so that listing them costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A shape of a transformers architecture. `vocab` is its default vocabulary size."""

    kind: str  # transformers' model_type
    shape: dict[str, Any]
    vocab: int
    about: str


def llama(d: int, mlp: int, layers: int, heads: int, size: str) -> Preset:
    """A Llama of the sizes that GaLore (Zhao et al. 2024, Table 5) pretrains on C4."""
    shape = {
        "hidden_size": d,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 1024,
    }
    return Preset("llama", shape, 32000, f"the {size} Llama of the GaLore paper")


PRESETS: dict[str, Preset] = {
    "llama-tiny": Preset(
        "llama",
        {
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        2048,
        "trains on a laptop in minutes",
    ),
    "llama-60m": llama(512, 1376, 8, 8, "60M"),
    "llama-130m": llama(768, 2048, 12, 12, "130M"),
    "llama-350m": llama(1024, 2736, 24, 16, "350M"),
    "llama-1b": llama(2048, 5461, 24, 32, "1B"),
    "gpt2": Preset("gpt2", {}, 50257, "GPT-2 small"),
    "bert-tiny": Preset(
        "bert",
        {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        2048,
        "an encoder that fills in hidden words",
    ),
    "t5-tiny": Preset(
        "t5",
        {
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 512,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        2048,
        "answers one text by another",
    ),
}
