"""LoRA in a loop of your own: five lines of eckart, the rest is PyTorch.

    python examples/bare_loop.py [MODEL] [STEPS]

MODEL is a folder or hub id; without one, the small model of `eckart demo`. Offline.
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import eckart
from eckart.io import Shuffled, load_model, load_tokenizer, read

DEMO = Path(eckart.__file__).parent / "assets" / "llama-tiny"  # a model that comes along


def main(source: str = "", steps: int = 60, out: str = "out/bare_loop") -> list[float]:
    source = source or str(DEMO)
    model, tokenizer = load_model(source, torch.float32), load_tokenizer(source)
    data = read("pydoc-prose", tokenizer, seq_len=128)
    loader = DataLoader(
        data.train, 8, sampler=Shuffled(len(data.train), 0), collate_fn=data.collate
    )

    recipe = eckart.Recipe(weights=eckart.LoRA(rank=16), update=eckart.AdamW())
    handle = eckart.attach(model, recipe, steps=steps, lr=1e-2)
    optimizer = handle.optimizer(clip=1.0)
    print(handle.coverage)

    losses: list[float] = []
    model.train()
    for batch in loader:
        loss = handle.loss(batch, model(**batch))  # the task's own where no objective is chosen
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"step {len(losses):>4}  loss {loss.item():.3f}  norm {optimizer.grad_norm:.2f}")
        if len(losses) == steps:
            break

    eckart.export(handle, out, "peft", tokenizer, overwrite=True)  # plain PEFT loads it
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
