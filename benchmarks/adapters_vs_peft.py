"""Adapters that PEFT has too, against PEFT's; and the cost of each of ours over a frozen base.

    python benchmarks/adapters_vs_peft.py [bfloat16 | float32] [NAME ...] [--write]

The model of lora_vs_peft.py with equal weights on both sides: PEFT writes the adapter, we read
its files. Aims: on a bf16 base with fp32 factors at least 1.1 times PEFT's speed with at most 0.7
of its bytes; in fp32 never slower, never more bytes. Bytes are counted for the whole step and
for the adapted maps alone. Where PEFT, too, keeps r numbers per token (Bone's tile and mini, 5 %
of a step's bytes), the whole step cannot be much smaller, so the frozen base's bytes are printed
as well. VeRA is PEFT's alone; LoRAM trains plain LoRA on a smaller base. The base's own step is
forward and backward down to the embedding's output with nothing trained, which keeps a little
more than a step whose first adapters come after a norm. With --write, results of earlier runs
for other names are kept.
"""

import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lora_vs_peft import ALPHA, MAPS, RANK, base, kept_bytes, tokens
from pairs import RESULTS, interval, judge, ratios, take_turns, versions, write
from peft import LoraConfig, MissConfig, RandLoraConfig, get_peft_model
from torch import nn

import eckart
from eckart.io import peft_read
from eckart.linear.products import BF16_ON_CPU
from eckart.recipe import Recipe, attach

LORA = {"r": RANK, "lora_alpha": ALPHA, "target_modules": MAPS}
SHARED = {"r": RANK, "target_modules": MAPS}
PEFTS: dict[str, Any] = {
    "lora": LoraConfig(**LORA),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "dora": LoraConfig(**LORA, use_dora=True),
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "olora": LoraConfig(**LORA, init_lora_weights="olora"),
    "bone tile": MissConfig(**SHARED),
    "bone mini": MissConfig(**SHARED, mini_r=RANK, init_weights="mini"),
    "bone bat": MissConfig(**SHARED, init_weights="bat"),
    "randlora": RandLoraConfig(**SHARED),
}
CHANGED_BASE = ("pissa", "olora")  # PEFT's files hold no whole adapter of these
OURS: dict[str, Any] = {
    "lora": eckart.LoRA(rank=RANK),
    "pissa": eckart.LoRA(rank=RANK, init="pissa"),
    "olora": eckart.LoRA(rank=RANK, init="olora"),
    "dora": eckart.DoRA(rank=RANK),
    "bone tile": eckart.Bone(rank=RANK),
    "bone mini": eckart.Bone(rank=RANK, mode="mini", mini_rank=RANK),
    "bone bat": eckart.Bone(rank=RANK, mode="bat"),
    "nola": eckart.NOLA(rank=RANK),
    "randlora": eckart.RandLoRA(rank=RANK),
    "loldu": eckart.LoLDU(rank=RANK),
    "lamda": eckart.LaMDA(rank=RANK),
    "lora-sb": eckart.LoRASB(rank=RANK),
    "codyra": eckart.CoDyRA(rank=RANK),
    "dylora": eckart.DyLoRA(rank=RANK),
    "block-lora": eckart.BlockLoRA(rank=RANK, blocks=2),
    "block-lora arms": eckart.BlockLoRA(rank=RANK, blocks=2, form="arms"),
    "block-lora row": eckart.BlockLoRA(rank=RANK, blocks=2, form="row"),
    "block-lora grid": eckart.BlockLoRA(rank=RANK, blocks=2, form="grid"),
}
AIMS = {"bfloat16": (1.1, 0.7), "float32": (1.0, 1.0)}
TURNS = {torch.bfloat16: 31 if BF16_ON_CPU else 3, torch.float32: 31}  # emulated it is slow


def step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """One training step with a small SGD update, so that tensors cached between steps expire."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=1e-6)
                    parameter.grad = None

    return run


def both(name: str, model: nn.Module, folder: str) -> tuple[nn.Module, nn.Module]:
    """Our model and PEFT's with the same adapter."""
    ours = copy.deepcopy(model)
    theirs = get_peft_model(model, PEFTS[name])  # type: ignore[arg-type]
    if name in CHANGED_BASE:
        return with_method(ours, OURS[name]), theirs
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    theirs.save_pretrained(folder)
    peft_read.load(ours, folder)
    return ours, theirs


def with_method(model: nn.Module, method: Any) -> nn.Module:
    batch = {"input_ids": tokens(), "labels": tokens()}
    calibration = [batch] if method.needs else None
    attach(model, Recipe(weights=method), calibration=calibration, steps=100, lr=1e-3)
    return model


def against_peft(name: str, dtype: torch.dtype) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = both(name, base(dtype), folder)
    ids = tokens()
    with torch.no_grad():
        found, expected = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    seconds = take_turns({"eckart": step(ours, ids), "peft": step(theirs, ids)}, TURNS[dtype])
    whole = kept_bytes(theirs, ids)
    return {
        "peft_over_eckart_seconds": ratios(seconds["peft"], seconds["eckart"]),
        "eckart_over_peft_bytes": round(kept_bytes(ours, ids) / whole, 4),
        "base_over_peft_bytes": round(kept_bytes(frozen_base(dtype), ids) / whole, 4),
        "eckart_over_peft_bytes_of_maps": round(
            kept_bytes(ours, ids, MAPS) / kept_bytes(theirs, ids, MAPS), 4
        ),
        "difference_of_logits": round(float((found - expected).norm() / expected.norm()), 9),
    }


def frozen_base(dtype: torch.dtype) -> nn.Module:
    """The model with nothing trained, whose backward pass goes down to the embedding's output."""
    plain = base(dtype).requires_grad_(False)
    embedding: Any = plain.get_submodule("model.embed_tokens")
    embedding.register_forward_hook(lambda module, args, y: y.requires_grad_())
    return plain


def over_base(methods: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Seconds and kept bytes of a step beyond those of the frozen base."""
    ids, plain = tokens(), frozen_base(dtype)
    models = {name: with_method(base(dtype), method) for name, method in methods.items()}
    runs = {"base": step(plain, ids), **{name: step(m, ids) for name, m in models.items()}}
    seconds, own = take_turns(runs, TURNS[dtype]), kept_bytes(plain, ids)
    return {
        name: {
            "step_over_base": ratios(seconds[name], seconds["base"]),
            "bytes_over_base": round(kept_bytes(model, ids) / own, 4),
        }
        for name, model in models.items()
    }


def main() -> None:
    warnings.simplefilter("ignore")
    words = {word for word in sys.argv[1:] if not word.startswith("-")}
    names = words - AIMS.keys()
    for dtype, (speed, size) in AIMS.items():
        if words & AIMS.keys() and dtype not in words:
            continue
        print(f"{dtype}: against PEFT (speed: PEFT's step over ours, 95 % interval of the median)")
        for name in (name for name in PEFTS if name in names or not names):
            found = against_peft(name, getattr(torch, dtype))
            ratio, own = found["peft_over_eckart_seconds"], found["eckart_over_peft_bytes_of_maps"]
            judge(f"{name}, speed", ratio["median"], speed, remark=interval(ratio))
            alone = f"the frozen base alone {found['base_over_peft_bytes']:.3f}"
            judge(f"{name}, bytes", found["eckart_over_peft_bytes"], size, False, alone)
            judge(f"{name}, bytes of the adapted maps", own, size, at_least=False)
            keep(f"{dtype} against PEFT", {name: found})
        print(f"{dtype}: a step over that of the frozen base (95 % interval), and its bytes")
        chosen = {name: m for name, m in OURS.items() if name in names or not names}
        table = over_base(chosen, getattr(torch, dtype))
        for name, row in table.items():
            step_over = row["step_over_base"]
            print(
                f"  {name:16} {step_over['median']:5.2f} x the step ({interval(step_over)}), "
                f"{row['bytes_over_base']:5.2f} x the bytes"
            )
        keep(f"{dtype} over base", table)


def keep(table: str, rows: Mapping[str, Any]) -> None:
    """Merge rows into the results measured before."""
    path = RESULTS / "adapters_vs_peft.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    facts = {"what": "2 Llama layers of width 256, 4 x 128 tokens, rank 16, 1 thread"}
    tables = {**before, **facts, table: {**before.get(table, {}), **rows}}
    write("adapters_vs_peft", {**tables, "versions": versions("transformers", "peft")})


if __name__ == "__main__":
    main()
