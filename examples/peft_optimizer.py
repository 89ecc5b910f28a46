"""LoRA-Pro on a plain PEFT model: PEFT makes the adapters, eckart moves them.

    python examples/peft_optimizer.py [MODEL] [STEPS]

Any of eckart's update rules goes in the place of LoRAPro: AltLoRA(plus=True), LoRARITE(),
Riemannian(). The names of the pairs and their scales are found in the model; what is saved is
PEFT's, untouched.
"""

import sys
from pathlib import Path

import peft
import torch
from torch.utils.data import DataLoader

import eckart
from eckart.io import Shuffled, load_model, load_tokenizer, read

DEMO = Path(eckart.__file__).parent / "assets" / "llama-tiny"  # a model that comes along


def main(source: str = "", steps: int = 60, out: str = "out/peft_optimizer") -> list[float]:
    source = source or str(DEMO)
    base, tokenizer = load_model(source, torch.float32), load_tokenizer(source)
    data = read("pydoc-prose", tokenizer, seq_len=128)
    loader = DataLoader(
        data.train, 8, sampler=Shuffled(len(data.train), 0), collate_fn=data.collate
    )

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = peft.get_peft_model(base, config)
    optimizer = eckart.optimizer_for(model, eckart.LoRAPro(), lr=1e-3, clip=1.0)

    losses: list[float] = []
    model.train()
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"step {len(losses):>4}  loss {loss.item():.3f}  norm {optimizer.grad_norm:.2f}")
        if len(losses) == steps:
            break

    model.save_pretrained(out)
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
