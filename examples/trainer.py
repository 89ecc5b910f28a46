"""GaLore on all weights in transformers' Trainer: `eckart.trainer` puts the handle in.

    python examples/trainer.py [MODEL] [STEPS]

The optimizer, clipping, data order and checkpoints are the recipe's; the loop, logging, DDP
and FSDP stay Trainer's. Kill it and run it again with the same output folder: it resumes.
"""

import sys

from transformers import Trainer, TrainingArguments

import eckart
from eckart.io import (
    build_model,
    bytes_tokenizer,
    latest_checkpoint,
    load_model,
    load_tokenizer,
    read,
)


def main(source: str = "", steps: int = 60, out: str = "out/trainer") -> list[float]:
    model = load_model(source) if source else build_model("llama-tiny", vocab=257)
    tokenizer = load_tokenizer(source) if source else bytes_tokenizer()
    data = read("pydoc-prose", tokenizer, seq_len=128)

    update = eckart.GaLore(rank=32, every=20)
    recipe = eckart.Recipe(weights=eckart.Dense(), update=update)
    handle = eckart.attach(model, recipe, steps=steps)
    print(handle.coverage)
    trainer = eckart.trainer(Trainer)(
        handle,
        args=TrainingArguments(
            out,
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            max_grad_norm=1.0,  # of the gradients as applied: low-rank where projected
            logging_steps=10,
            save_steps=20,
            save_total_limit=2,
            report_to="none",
        ),
        train_dataset=data.train,
        data_collator=data.collate,
    )
    trainer.train(resume_from_checkpoint=latest_checkpoint(out) is not None)
    eckart.export(handle, f"{out}/final", "dense", tokenizer, overwrite=True)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
