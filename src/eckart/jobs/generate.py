"""`eckart generate MODEL -p TEXT`: let a model, an adapter or a run write."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from eckart.errors import UsageError
from eckart.io.models import load_tokenizer
from eckart.io.opening import open_model
from eckart.jobs.config import Job


def run(job: Job) -> Mapping[str, Any]:
    """Complete each prompt; printed as it is said, or in the document with --json."""
    assert job.model is not None
    prompts = job.options.get("prompt") or read_prompts()
    begun = time.monotonic()
    model = open_model(job.model).model.eval()
    tokenizer = load_tokenizer(job.model)
    texts = complete(
        model,
        tokenizer,
        prompts,
        tokens=job.options["tokens"],
        temperature=job.options["temperature"],
        seed=job.train.seed,
    )
    if not job.flags.json:
        for prompt, text in zip(prompts, texts, strict=True):
            print(prompt + text)
    return {
        "command": "generate",
        "exit": 0,
        "seconds": time.monotonic() - begun,
        "texts": [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)],
    }


def read_prompts() -> list[str]:
    """One prompt: all of standard input. UsageError where that is a terminal or empty."""
    text = "" if sys.stdin.isatty() else sys.stdin.read()
    if not text.strip():
        raise UsageError("nothing to go on from", fix="Type -p TEXT, or pipe text in.")
    return [text.rstrip("\n")]


@torch.inference_mode()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """What the model adds to each prompt, one after the other; temperature 0 is greedy.

    Draws come from a generator state seeded per prompt, so that a text does not depend on
    which other prompts are asked.
    """
    texts = []
    for prompt in prompts:
        ids = rendered(tokenizer, prompt).to(model.device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=temperature > 0,
                temperature=temperature if temperature > 0 else None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        new = out[0] if model.config.is_encoder_decoder else out[0, ids.shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts


def rendered(tokenizer: Any, prompt: str) -> torch.Tensor:
    """The prompt's ids [1, t], as a user's turn where the tokenizer has a chat template."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    return ids
