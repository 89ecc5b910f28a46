"""Conversations in TRL's SFTTrainer, with a distillation from the base beside the loss.

    python examples/sft.py [MODEL] [STEPS]

TRL formats, tokenizes and masks; loss on the assistant's words alone. The objective sees
logits with their gradient, which SFTTrainer's own fused head does not give.
"""

import sys

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import eckart
from eckart.io import build_model, bytes_tokenizer, load_model, load_tokenizer

TALKS = [
    ("What is a low-rank matrix?", "A product of two thin ones."),
    ("What is the best low-rank approximation?", "The truncated SVD, as Eckart and Young showed."),
    ("What does LoRA train?", "Two thin factors beside each frozen matrix."),
    ("What does GaLore project?", "The gradient, into a subspace that is renewed."),
]


def main(source: str = "", steps: int = 30, out: str = "out/sft") -> list[float]:
    model = load_model(source) if source else build_model("llama-tiny", vocab=257)
    tokenizer = load_tokenizer(source) if source else bytes_tokenizer()
    rows = [{"prompt": ask + "\n", "completion": answer} for ask, answer in TALKS]

    recipe = eckart.Recipe(
        weights=eckart.LoRA(rank=8), objective=(eckart.Distill(weight=0.1, temperature=1.0),)
    )
    handle = eckart.attach(model, recipe, steps=steps)
    trainer = eckart.trainer(SFTTrainer)(
        handle,
        args=SFTConfig(
            out,
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            max_length=128,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    eckart.export(handle, f"{out}/final", "peft", tokenizer, overwrite=True)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
