"""Three adapters on one base: in use by name, summed, another for each row, swapped in place.

    python examples/many_adapters.py [MODEL]

MODEL is a folder or hub id; without one, the small model of `eckart demo`. Offline. The adapters
are trained here for a few steps each; `eckart.load(FOLDER, model, name=NAME)` puts saved ones
(eckart's own or PEFT's) beside each other in the same way.
"""

import sys
from pathlib import Path

import torch

import eckart
from eckart.io import load_model, load_tokenizer

DEMO = Path(eckart.__file__).parent / "assets" / "llama-tiny"  # a model that comes along
PROMPT = "Eckart:"

TEXTS = {
    "english": " The best low-rank approximation is the truncated SVD. ",
    "german": " Die beste Näherung von kleinem Rang ist die gekürzte SVD. ",
    "french": " La meilleure approximation de rang faible est la SVD tronquée. ",
}


def main(source: str = "", steps: int = 40, out: str = "out/adapters") -> dict[str, str]:
    source = source or str(DEMO)
    model, tokenizer = load_model(source, torch.float32), load_tokenizer(source)

    handles = {}
    for name, text in TEXTS.items():  # the last one attached is in use, and trained
        handle = eckart.attach(model, eckart.Recipe(weights=eckart.LoRA(rank=8)), name=name)
        optimizer = handle.optimizer(lr=1e-2)
        batch = tokenizer(PROMPT + text, return_tensors="pt")
        for _ in range(steps):
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        eckart.export(handle, f"{out}/{name}", "peft", overwrite=True)  # no name in the file
        handles[name] = handle

    model.eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"].repeat(4, 1)
    rows = [*TEXTS, None]  # None is the base
    with handle.rows(rows):  # one batch, two batched products a map
        said = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=0,
        )
    found = {
        name or "base": tokenizer.decode(tokens, skip_special_tokens=True)
        for name, tokens in zip(rows, said, strict=True)
    }
    handle.use("german")  # for every row; handle.use(None) is the base
    handle.use({"german": 0.5, "french": 0.5})  # a sum of changes
    eckart.swap(handles["english"], f"{out}/german")  # in place: a compiled model stays compiled
    handles["french"].remove()
    print(f"left {list(handle.adapters)}")
    for name, text in found.items():
        print(f"{name:<8} {text!r}")
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:2])
