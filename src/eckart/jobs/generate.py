"""`eckart generate MODEL -p TEXT`: generates text with a model, an adapter or a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import torch

from eckart.errors import FileError, UsageError, did_you_mean
from eckart.io.export import load
from eckart.io.models import load_tokenizer, own_task, recognise
from eckart.io.opening import ADAPTERS, open_model
from eckart.io.tasks import TASKS
from eckart.jobs import classify
from eckart.jobs.settings.config import Job
from eckart.recipe import Handle


def run(job: Job) -> Mapping[str, Any]:
    """Complete each prompt, printed as it is generated, or returned in the --json document."""
    assert job.model is not None
    prompts = job.options.get("prompt") or read_prompts()
    require_room(job)
    begun = time.monotonic()
    task = own_task(job.model)
    if TASKS[task].classes:
        return classify.run(job, task, prompts, begun)
    require_language(job.model, task)
    model = open_model(job.model).model.eval()
    tokenizer = load_tokenizer(job.model)
    beside = adapters_beside(model, job.options.get("adapter") or (), task)
    if task == "masked":
        return filled_in(job, model, tokenizer, prompts, begun)
    said: list[dict[str, str]] = []
    for name, handle in beside.items() or [("", None)]:
        if handle is not None:
            handle.use(name)
        texts = complete(
            model,
            tokenizer,
            prompts,
            tokens=job.options["tokens"],
            temperature=job.options["temperature"],
            seed=job.train.seed,
        )
        which = {"adapter": name} if name else {}
        said += [{**which, "prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
    if not job.flags.json:
        answers = task == "seq2seq" or tokenizer.chat_template  # else it continues the prompt
        for one in said:
            text = one["text"] if answers else one["prompt"] + one["text"]
            if answers and len(prompts) > 1:
                text = f"{one['prompt']}\n{indent(text, '  ')}"
            print(f"{one['adapter']}: {text}" if beside else text)
    return {
        "command": "generate",
        "exit": 0,
        "seconds": time.monotonic() - begun,
        "texts": said,
    }


def require_room(job: Job) -> None:
    """Raise UsageError for options under which no token can be generated."""
    tokens, temperature = job.options["tokens"], job.options["temperature"]
    for name, value, fits, allowed in (
        ("-n", tokens, tokens >= 1, "a whole number >= 1"),
        ("-t", temperature, 0 <= temperature < float("inf"), "a number >= 0"),
    ):
        if not fits:
            raise UsageError(
                f"{name} is out of range",
                [(f"{name} {value}", "command line"), ("allowed", allowed)],
                "Leave it out for the default. All options: eckart generate --help",
            )


def adapters_beside(model: Any, words: Sequence[str], task: str) -> dict[str, Handle]:
    """Attach the adapters of --adapter NAME=PATH to one model; returns them by name."""
    found: dict[str, Handle] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not (name and path):
            raise UsageError(
                "--adapter needs a name and a path", [(f"--adapter {word}", "command line")],
                f"Type --adapter NAME={path or word}",
            )  # fmt: skip
        if task == "masked":
            raise UsageError(
                "--adapter is for models that go on from a text", [(word, task)],
                f"Type eckart generate {path} -p TEXT",
            )  # fmt: skip
        if name in found:
            raise UsageError(
                "two adapters have one name", [(f"--adapter {word}", "command line")],
                "Give each a name of its own.",
            )  # fmt: skip
        require_adapter(path)
        found[name] = load(path, model, name)
    return found


def require_adapter(path: str) -> None:
    """Raise FileError if the path does not exist, UsageError if it is not an adapter."""
    source = recognise(path)
    if source.kind == "hub" and not Path(path).exists():
        known = [p.name for p in Path(path).absolute().parent.glob("*") if p.is_dir()]
        raise FileError(
            "no such file or folder", [(path, "")],
            did_you_mean(Path(path).name, known, "Type --adapter NAME=FOLDER."),
        )  # fmt: skip
    if source.kind not in (*ADAPTERS, "run"):
        raise UsageError(
            "this is no adapter", [(path, f"a {source.kind}")],
            f"Let it write by itself: eckart generate {path} -p TEXT",
        )  # fmt: skip


def require_language(model: str, task: str) -> None:
    """Raise UsageError for a model without a language head."""
    if not TASKS[task].language:
        raise UsageError(
            "this model writes no text", [(model, task)], f"Measure it: eckart eval {model} DATA"
        )


def filled_in(
    job: Job, model: Any, tokenizer: Any, prompts: Sequence[str], begun: float
) -> Mapping[str, Any]:
    """Fill the masks of each prompt with the most probable tokens, and list alternatives."""
    found = [fill(model, tokenizer, prompt) for prompt in prompts]
    if not job.flags.json:
        for text, gaps in found:
            print(text)
            for gap in gaps:
                print("  " + "   ".join(f"{token.strip()} {p:.3f}" for token, p in gap))
    texts = [
        {
            "prompt": prompt,
            "text": text,
            "gaps": [[{"token": t, "probability": p} for t, p in gap] for gap in gaps],
        }
        for prompt, (text, gaps) in zip(prompts, found, strict=True)
    ]
    seconds = time.monotonic() - begun
    return {"command": "generate", "exit": 0, "seconds": seconds, "texts": texts}


@torch.inference_mode()
def fill(
    model: Any, tokenizer: Any, prompt: str, most: int = 5
) -> tuple[str, list[list[tuple[str, float]]]]:
    """The text with each mask filled, and the most probable tokens of each mask.

    All masks are predicted in one pass. UsageError for a prompt without a mask.
    """
    mask = tokenizer.mask_token
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)  # [1, t]
    at = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]  # [g]
    if mask is None or not len(at):
        example = f"Type -p '{prompt.split(' ')[0]} {mask or '[MASK]'} ...'"
        raise UsageError("the prompt has no gap to fill", [(prompt, f"no {mask}")], example)
    shares = model(input_ids=ids).logits[0, at].float().softmax(-1)  # [g, v]
    top = shares.topk(min(most, shares.shape[-1]))
    gaps = [
        [(tokenizer.decode([i]), float(p)) for i, p in zip(tokens, values, strict=True)]
        for tokens, values in zip(top.indices.tolist(), top.values, strict=True)
    ]
    pieces = prompt.split(mask)
    said = [gap[0][0] for gap in gaps[: len(pieces) - 1]]
    text = pieces[0] + "".join(
        a.lstrip() + b if before.endswith(" ") else a + b
        for before, a, b in zip(pieces, said, pieces[1:], strict=False)
    )
    return text, gaps


def read_prompts() -> list[str]:
    """Standard input as one prompt. UsageError if it is a terminal or empty."""
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
    """Yield the completion of each prompt; temperature 0 is greedy.

    The generator is seeded for each prompt, so that a completion does not depend on the others.
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
                eos_token_id=ends(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        new = out[0] if model.config.is_encoder_decoder else out[0, ids.shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts


def ends(model: Any, tokenizer: Any) -> list[int] | None:
    """The EOS tokens of the model and of the tokenizer, with which it was finetuned."""
    own = model.generation_config.eos_token_id
    found = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    return sorted(found) or None


def rendered(tokenizer: Any, prompt: str) -> torch.Tensor:
    """The prompt's token ids [1, t], as a user's turn if the tokenizer has a chat template."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    if not ids.shape[1]:
        raise UsageError("the prompt has no token", [(f"-p '{prompt}'", "")], "Type -p TEXT.")
    return ids
