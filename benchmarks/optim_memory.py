"""Exact bytes of optimizer state, and of gradients at their peak.

    python benchmarks/optim_memory.py [--model 7B] [--rules galore,fira] [--write]

Every registered rule trains a small Llama (width 256, 4 blocks, fp32) or a block of another model,
in full or, for rules for factor pairs, through LoRA of rank 8, and is compared with AdamW on the
same parameters. State is what the optimizer holds after the steps. Gradients are the parameters'
and those kept by layer-wise hooks, just after a gradient was computed, in a step without a
refresh: normally all of them; in layer-wise mode one projected parameter's at a time.
"""

import gc
from dataclasses import asdict, replace
from typing import Any

import torch
from counting import chosen, option, state_bytes, titled
from pairs import versions, write
from transformers import LlamaConfig, LlamaForCausalLM

import eckart
from eckart.errors import EckartError
from eckart.recipe import Recipe, Update
from eckart.recipe.registry import load, methods

STEPS, WORDS = 3, 512
((NAME, SHAPE),) = chosen("tiny").items()


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": SHAPE.width, "intermediate_size": SHAPE.mlp, "vocab_size": WORDS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=SHAPE.blocks, **sizes, **heads))


def update_of(name: str) -> Update:
    cls: Any = load(name)
    fields = {"rank": SHAPE.rank, "every": 200, "stagger": False}  # of a rule that has them
    return cls(**{key: value for key, value in fields.items() if key in asdict(cls())})


def measured(update: Update, pairs: bool, layerwise: bool = False) -> dict[str, int]:
    """Bytes of state, of trained parameters, and of gradients at the peak of the last step."""
    gc.collect()  # the previous model is only freed with its reference cycles
    lora = eckart.LoRA(rank=8)
    weights = replace(lora, **update.asks(lora)) if pairs else eckart.Dense()
    handle = eckart.attach(model(), Recipe(weights=weights, update=update), lr=1e-3, steps=STEPS)
    optimizer: Any = handle.optimizer()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    peak = 0

    def look(_: torch.Tensor) -> None:
        nonlocal peak
        held = [p.grad for p in trained if p.grad is not None]
        held += list(optimizer.projected.low.values()) if layerwise else []
        peak = max(peak, sum(t.numel() * t.element_size() for t in held))

    hooks = []
    for p in trained:  # those of resting blocks too
        trains = p.requires_grad
        hooks.append(p.requires_grad_(True).register_post_accumulate_grad_hook(look))
        p.requires_grad_(trains)
    if layerwise:  # after ours, which sees a gradient before this frees it
        optimizer.attach_layerwise("first")
    tokens = torch.randint(0, WORDS, (1, 16))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = handle.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    for _ in range(STEPS):
        peak = 0
        optimizer.step(closure)
    optimizer.detach_layerwise()
    for hook in hooks:  # they would keep the model
        hook.remove()
    return {
        "trained": sum(p.numel() * p.element_size() for p in trained),
        "state": state_bytes(optimizer.state.values()),
        "gradients": peak,
    }


def main() -> None:
    torch.set_num_threads(1)
    known = [name for name, entry in methods().items() if entry.axis == "update"]
    names = option("--rules").split(",") if option("--rules") else known
    base = {pairs: measured(update_of("adamw"), pairs) for pairs in (False, True)}
    rows: dict[str, Any] = {}
    head = f"{'KB':<14}{'trains':>10}{'state':>12}{'of AdamW':>10}"
    print(head + f"{'gradients':>12}{'by layer':>10}")
    for name in names:
        update = update_of(name)
        pairs = update.wants == "pairs"
        row: dict[str, Any] = measured(update, pairs)
        row["state_over_adamw"] = round(row["state"] / base[pairs]["state"], 3)
        try:
            row["gradients_layer_by_layer"] = measured(update, pairs, layerwise=True)["gradients"]
        except EckartError as refused:
            row["refused_layer_by_layer"] = str(refused).splitlines()[0]
        rows[name] = row
        by_layer = row.get("gradients_layer_by_layer")
        print(f"{name:<14}{'factors' if pairs else 'all':>10}{row['state'] / 1024:>12,.0f}"
              f"{row['state_over_adamw']:>10.2f}{row['gradients'] / 1024:>12,.0f}"
              f"{'refused' if by_layer is None else f'{by_layer / 1024:,.0f}':>10}")  # fmt: skip
    what = "bytes of state and of gradients alive at once, blocks of a Llama, fp32"
    facts = {"what": what, "model": NAME, **asdict(SHAPE)}
    write(titled("optim_memory"), {**facts, "rules": rows, "versions": versions()})


if __name__ == "__main__":
    main()
