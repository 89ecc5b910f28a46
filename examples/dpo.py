"""Preferences (DPO) in TRL's DPOTrainer: of two answers, the chosen one becomes likelier.

    python examples/dpo.py [MODEL] [STEPS]

The reference is the model before its first step: an adapter that starts at zero makes that the
base, so its log-probabilities are computed once and no second model is kept.
"""

import sys

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import eckart
from eckart.io import build_model, bytes_tokenizer, load_model, load_tokenizer

PAIRS = [  # question, the answer that is preferred, the one that is not
    ("Which rank is enough?", "The smallest that works.", "The largest that fits."),
    ("How is a method judged?", "With its rate tuned.", "At one shared rate."),
    ("What is a refuted claim?", "A result.", "A failure."),
    ("What does a merge cost?", "One rounding.", "Nothing at all."),
]


def main(source: str = "", steps: int = 30, out: str = "out/dpo") -> list[float]:
    model = load_model(source) if source else build_model("llama-tiny", vocab=257)
    tokenizer = load_tokenizer(source) if source else bytes_tokenizer()
    rows = [{"prompt": f"{ask}\n", "chosen": good, "rejected": bad} for ask, good, bad in PAIRS]

    handle = eckart.attach(model, eckart.Recipe(weights=eckart.LoRA(rank=8)), steps=steps)
    trainer = eckart.trainer(DPOTrainer)(
        handle,
        args=DPOConfig(
            out,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            beta=0.1,  # how dearly a move away from the reference is paid
            precompute_ref_log_probs=True,
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
