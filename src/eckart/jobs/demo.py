"""`eckart demo`: a first run, offline, in under three minutes on a laptop's CPU.

The base is a tiny language model pretrained with `eckart pretrain` on Python's standard library
(`assets/llama-tiny`, 2.2 M parameters). It is finetuned with LoRA on Python's reference texts,
which it has not seen, and the same prompt is completed before and after.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import eckart
from eckart.io.headers import read_json
from eckart.io.models import load_tokenizer
from eckart.io.opening import open_model
from eckart.jobs import finetune
from eckart.jobs.generate import complete
from eckart.jobs.settings.config import Flags, Job, resolve
from eckart.jobs.training import outcome
from eckart.jobs.training.screen import Screen

BASE = Path(eckart.__file__).parent / "assets" / "llama-tiny"
DATA = "pydoc-prose"
WORDS = (
    "method=lora",
    "weights.rank=16",
    "train.steps=300",
    "train.batch_size=8",
    "train.lr=1e-2",
    "data.seq_len=128",
    "data.eval=0.05",
    "eval.every=100",
    "train.save_every=100",
)
PROMPT = "When the function is called,"
TOKENS = 40


def run(job: Job) -> dict[str, Any]:
    """Finetune the packaged model and show what changed. Returns the --json document."""
    screen = Screen(quiet=job.flags.json)
    outcome.refuse_early(job)
    screen.line("demo", read_json(BASE / "MADE.json")["what"])
    flags = Flags(out=job.flags.out, json=job.flags.json, overwrite=job.flags.overwrite)
    before = sample(BASE)
    found = finetune.run(resolve("finetune", str(BASE), DATA, list(WORDS), flags=flags))
    after = sample(found["run"])
    screen.line("before", before, result=True)
    screen.line("after", after, result=True)
    yours = "eckart finetune MODEL DATA   (a folder or hub id; your text or chats)"
    screen.line("yours", yours, result=True)
    return {**found, "command": "demo", "samples": {"before": before, "after": after}}


def sample(source: str | Path) -> str:
    """The prompt and a model's completion, on one line."""
    model = open_model(source).model.eval()
    text = complete(model, load_tokenizer(source), [PROMPT], TOKENS, temperature=0.7)[0]
    return " ".join((PROMPT + text).split())
