"""Wrote native_1/, adapters of format version 1. Kept to show how; never to be run again.

    PYTHONPATH=src:. python tests/io/golden/make_native_1.py

A base of 8 x 8 maps, an adapter that keeps the base (lora) and one that drops it (lowrank),
and the logits they gave.
"""

from pathlib import Path

from safetensors.torch import save_file
from tests import tiny

import eckart
from eckart.io import native

FOLDER = Path(__file__).parent / "native_1"
SHAPE = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


def make() -> None:
    """Write the base, both adapters and the logits."""
    tiny.llama(seed=1, **SHAPE).save_pretrained(FOLDER / "base")
    tokens = tiny.ids(1, 7) % 16
    expected = {"tokens": tokens}
    methods = {
        "lora": eckart.LoRA(rank=2, alpha=4.0, overrides=({"match": "mlp.down", "rank": 3},)),
        "lowrank": eckart.LowRank(share=0.5),
    }
    for name, method in methods.items():
        model = tiny.llama(seed=1, **SHAPE)
        handle = eckart.attach(model, eckart.Recipe(weights=method))
        tiny.train_by_chance(handle)
        native.save(handle, FOLDER / name)
        expected[name] = tiny.logits(model, tokens)
    save_file(expected, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    make()
